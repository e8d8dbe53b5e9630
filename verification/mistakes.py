r"""Mistakes as tables: a line each, under the function into which they are planted.

    ctrl.girsanov.path_kl
        no 1/2 | 0.5 * rate => rate
        a sign [full] | first - second => first + second
        a negative time [ValueError] | times[0] => -times[0]
    shared
        generator: no 1/2

A line is a name, what stands in the function's source, and what a mistaken author would have
written. ``[full]``: only a full run has a check that sees it. ``[ValueError]``: the code itself
refuses it. A line break in the source is written ``\n``, a backslash twice; text that begins or
ends with a space, or is empty, stands in backticks. A line that is indented more continues the one
before. Lines of one name under several functions are one mistake in several places. Under
``shared`` stand names of ``shared_mistakes``, which several claims reject.
"""

import builtins
import re
from dataclasses import dataclass, replace

from verification.planting import Edit
from verification.shared_mistakes import SHARED

_LINE = re.compile(r"(?P<name>[^|\[\]]+?)(?P<flags>( \[\w+\])*)( \| (?P<old>.*) => (?P<new>.*))?")


@dataclass(frozen=True)
class Mistake:
    """A mistake that a claim must reject.

    Attributes:
        name: the mistake, in words.
        edits: that plant it.
        full: only where ``Setting.full`` is there a check that sees it.
        raises: the error with which the code itself refuses the mistake, if it does.
    """

    name: str
    edits: tuple[Edit, ...]
    full: bool = False
    raises: type[Exception] | None = None


def read(text: str) -> tuple[Mistake, ...]:
    """The mistakes of a table, in its order.

    Raises:
        ValueError: a line that is none, or the name of no shared mistake.
    """
    return _read(text, _shared())


def _shared() -> dict[str, Mistake]:
    return {mistake.name: mistake for mistake in _read(SHARED, {})}


def _read(text: str, shared: dict[str, Mistake]) -> tuple[Mistake, ...]:
    mistakes: dict[str, Mistake] = {}
    target = ""
    for line in re.sub(r"\n {5,}", " ", text).splitlines():
        if not line.startswith(" "):
            target = line or target
            continue
        match = _LINE.fullmatch(line.strip(" "))
        if match is None or not target or (match["old"] is None) != (target == "shared"):
            raise ValueError(f"no line of a table of mistakes, under {target!r}: {line!r}")
        name, flags = match["name"], re.findall(r"\w+", match["flags"])
        if target == "shared":
            if name not in shared:
                raise ValueError(f"there is no shared mistake {name!r}: see shared_mistakes.py")
            mistake = shared[name]
        else:
            edit = Edit(target, _code(match["old"]), _code(match["new"]))
            before = mistakes[name].edits if name in mistakes else ()
            if any(edit.target == target for edit in before):
                raise ValueError(f"two mistakes in {target} are called {name!r}")
            mistake = Mistake(name, (*before, edit))
        raised = [getattr(builtins, flag) for flag in flags if flag != "full"]
        mistakes[name] = replace(
            mistake, full="full" in flags, raises=raised[0] if raised else mistake.raises
        )
    return tuple(mistakes.values())


def _code(text: str) -> str:
    """Source as it stands in a function, from how it is written in a table."""
    text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "`" else text
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)
