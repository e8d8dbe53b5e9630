"""Wrong formulas, planted into the code that users run.

A variant is an edit of one function's source: a piece of its text, found there exactly once, is
replaced, the function is compiled anew and its code object exchanged. Whoever holds the function,
under whatever name and however it was imported, then runs the wrong formula; on leaving, the right
one is back. So what is shown to be rejected is the production code itself with one mistake in it,
and an edit that no longer fits the source cannot go unnoticed: it does not load.
"""

import ast
import functools
import importlib
import inspect
import linecache
import textwrap
import tokenize
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType


class PlantingError(ValueError):
    """An edit does not fit the source that it is meant for."""


@dataclass(frozen=True)
class Edit:
    """One piece of a function's source, and what a mistaken author would have written.

    Attributes:
        target: dotted name of a function, method or property, as "ctrl.girsanov.path_kl".
        old: text that stands in its source exactly once, its docstring left aside.
        new: text in its place.
    """

    target: str
    old: str
    new: str

    def code(self) -> CodeType:
        """The function compiled with the mistake.

        Raises:
            PlantingError: the target is no Python function, or ``old`` is not there exactly once.
        """
        function = _function(self.target)
        right = function.__code__
        module = inspect.getmodule(function)
        assert module is not None
        source, first, last = _source(function)
        at = self._place(function)
        body = "".join(source[first:last])
        body = body[:at] + self.new + body[at + len(self.old) :]
        text = "".join([*source[:first], body, *source[last:]])
        whole = compile(text, right.co_filename, "exec", dont_inherit=True)
        matches = [
            code
            for code in _inner(whole)
            if code.co_qualname == right.co_qualname and code.co_firstlineno - 1 == first
        ]
        if len(matches) != 1 or matches[0].co_freevars != right.co_freevars:
            raise PlantingError(f"{self.target} cannot be compiled by itself")
        return matches[0]

    def lines(self) -> tuple[str, str]:
        """The lines of source that differ, right and wrong, for a reader."""
        function = _function(self.target)
        source, first, last = _source(function)
        at = self._place(function)
        body = "".join(source[first:last])
        start = body.rfind("\n", 0, at) + 1
        end = body.find("\n", at + len(self.old))
        end = end if end >= 0 else len(body)
        wrong = body[start:at] + self.new + body[at + len(self.old) : end]
        return inspect.cleandoc(body[start:end]), inspect.cleandoc(wrong)

    def _place(self, function: FunctionType) -> int:
        """Position of the text in the function's source, its docstring left aside."""
        source, first, last = _source(function)
        body = "".join(source[first:last])
        start, end = _docstring(body)
        places = [
            at for at in range(len(body)) if body.startswith(self.old, at) and not start <= at < end
        ]
        if len(places) != 1 or self.old == self.new:
            raise PlantingError(
                f"{self.old!r} must stand exactly once in {self.target} (and differ from what "
                f"replaces it), but stands there {len(places)} times"
            )
        return places[0]


@contextmanager
def planted(*edits: Edit) -> Iterator[None]:
    """Run with these mistakes in the code; the right code is back at the end, come what may.

    Raises:
        PlantingError: an edit does not fit, or two of them change one function.
    """
    codes = [(_function(edit.target), edit.code()) for edit in edits]
    if len({id(function) for function, _ in codes}) < len(codes):
        raise PlantingError("edits must be of different functions: join those of one function")
    with ExitStack() as undo:
        for function, wrong in codes:
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = wrong
        yield


def _source(function: FunctionType) -> tuple[list[str], int, int]:
    """Lines of its file, and where in them the function begins and ends."""
    linecache.checkcache(function.__code__.co_filename)
    first = function.__code__.co_firstlineno - 1
    try:
        lines, _ = inspect.findsource(function.__code__)
        return lines, first, first + len(inspect.getblock(lines[first:]))
    except (OSError, SyntaxError, tokenize.TokenError) as error:
        raise PlantingError(
            f"the source of {function.__qualname__} cannot be read: {error}"
        ) from error


def _docstring(body: str) -> tuple[int, int]:
    """Begin and end of the docstring in a function's source; both 0 if there is none."""
    plain = textwrap.dedent(body)
    indent = len(body) - len(body.lstrip())
    try:
        node = ast.parse(plain).body[0]
    except SyntaxError:
        node = None
    if not isinstance(node, ast.FunctionDef):
        raise PlantingError("the source has changed since it was imported")
    if ast.get_docstring(node) is None:
        return 0, 0
    string = node.body[0]
    assert string.end_lineno is not None
    lines = body.splitlines(keepends=True)
    start = sum(len(line) for line in lines[: string.lineno - 1]) + string.col_offset + indent
    return start, sum(len(line) for line in lines[: string.end_lineno])


def _function(target: str) -> FunctionType:
    """The function that a dotted name stands for, without its decorators."""
    parts = target.split(".")
    member: object = None
    for length in range(len(parts) - 1, 0, -1):
        try:
            member = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            try:
                member = (
                    getattr(member, part)
                    if isinstance(member, ModuleType)
                    else inspect.getattr_static(member, part)
                )
            except AttributeError:
                raise PlantingError(f"there is no {target}: no {part} in {member!r}") from None
        break
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    elif isinstance(member, staticmethod | classmethod):
        member = member.__func__
    member = inspect.unwrap(member) if callable(member) else member
    if not isinstance(member, FunctionType):
        raise PlantingError(f"{target} is no function written in Python, but {member!r}")
    return member


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)
