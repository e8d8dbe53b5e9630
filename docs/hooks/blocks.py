"""Blocks of code on the pages, and what the tests do with each.

A block is run by the tests (Python) or checked against the command lines that it names (shell). A
comment on the line before it may say otherwise, with a reason that the site shows::

    <!-- not run: asks a model hub, which tests do not -->
    <!-- run with: updates=50 -> updates=1; steps=20 -> steps=2 -->
    <!-- run before: grid = ctrl.uniform_grid(1.0, steps=10) -->
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Instruction = Literal["not run", "run with", "run before"]

_BLOCK = re.compile(
    r"^(?P<comments>(?:[ ]*<!-- (?:not run|run with|run before): [^\n]*-->[ ]*\n)*)"
    r"(?P<indent>[ ]*)(?P<fence>```+|~~~+)(?P<language>[\w+-]*)(?P<info>[^\n]*)\n"
    r"(?P<source>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- (not run|run with|run before): (.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: after the fence; "" if there is none.
        source: between the fences, without their indentation.
        line: of the opening fence, from 1.
        not_run: why the tests do not run it; None if they do.
        changes: what the tests read in place of what, to make it small.
        before: statements that the tests execute first.
        file: that the block is the text of (``title="NAME"`` after the language); None if of none.
    """

    language: str
    source: str
    line: int
    not_run: str | None
    changes: tuple[tuple[str, str], ...]
    before: str
    file: str | None = None

    def smaller(self) -> str:
        """The source as the tests run it.

        Raises:
            ValueError: what is to be changed does not stand in it.
        """
        source = self.source
        for old, new in self.changes:
            if old not in source:
                raise ValueError(f"line {self.line}: {old!r} is to be changed but not there")
            source = source.replace(old, new)
        return f"{self.before}\n{source}" if self.before else source


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for match in _BLOCK.finditer(text):
        said = _COMMENT.findall(match["comments"])
        lines = match["source"].splitlines(keepends=True)
        indent = len(match["indent"])
        yield Block(
            match["language"],
            "".join(line[indent:] if line.strip() else line for line in lines),
            text.count("\n", 0, match.start("fence")) + 1,
            next((words for kind, words in said if kind == "not run"), None),
            tuple(
                _change(change)
                for kind, words in said
                if kind == "run with"
                for change in words.split("; ")
            ),
            "\n".join(words for kind, words in said if kind == "run before"),
            title[1] if (title := re.search(r'title="([^"]+)"', match["info"])) else None,
        )


def _change(words: str) -> tuple[str, str]:
    old, arrow, new = words.partition(" -> ")
    if not arrow:
        raise ValueError(f"a change reads OLD -> NEW, not {words!r}")
    return old, new


def on_page_markdown(markdown: str, **_: object) -> str:
    """Show why a block is not run."""

    def visible(match: re.Match[str]) -> str:
        why = [words for kind, words in _COMMENT.findall(match["comments"]) if kind == "not run"]
        indent = match["indent"]
        block = match.group()[len(match["comments"]) :]
        words = "".join(
            f'\n{indent}<small class="not-run">Not run by the tests: {w}</small>\n' for w in why
        )
        return block + ("\n" + words if words else "")

    return _BLOCK.sub(visible, markdown)
