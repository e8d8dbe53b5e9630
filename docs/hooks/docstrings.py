"""Docstrings as Markdown: aligned entries of a module become a list, formulas stay plain."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import reference

_ENTRY = re.compile(r"^([A-Z][\w-]*) {2,}(\S.*)$")


def as_markdown(text: str) -> str:
    """A docstring whose aligned entries (``Setting     dX = ...``) are a list.

    An entry is a capitalised word, two blanks or more, and text that may go on, indented.
    """
    lines, made, inside = text.split("\n"), [], False
    for line in lines:
        entry = _ENTRY.match(line)
        if entry:
            if not inside and made and made[-1].strip():
                made.append("")
            made.append(f"- **{entry[1]}**: {_escaped(entry[2])}")
            inside = True
        elif inside and line.startswith("  ") and line.strip():
            made.append(f"  {_escaped(line.strip())}")
        else:
            if inside and line.strip():
                made.append("")
            inside = False
            made.append(line)
    return "\n".join(made)


def _escaped(text: str) -> str:
    """Formulas in plain text, safe from emphasis and references."""
    parts = re.split(r"(``?[^`]*``?)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_\[\]<])", r"\\\1", p) for p in parts)


_ALIGNED = re.compile(r"\S {3,}\S")
_SECTION = re.compile(r"^(Args|Arguments|Attributes|Returns|Raises|Yields|Examples?|Note):$")


def with_tables_kept(text: str) -> str:
    """A docstring whose paragraphs with aligned columns are shown as they were typed."""
    paragraphs = text.split("\n\n")
    for n, paragraph in enumerate(paragraphs):
        lines = paragraph.strip("\n").split("\n")
        if _SECTION.match(lines[0]) or any(_ENTRY.match(line) for line in lines):
            continue
        is_code = "```" in paragraph or all(line.startswith("    ") for line in lines)
        if len(lines) > 1 and not is_code and any(_ALIGNED.search(line) for line in lines):
            paragraphs[n] = "\n".join(["```text", *lines, "```"])
    return "\n\n".join(paragraphs)


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def commented_fields(cls: griffe.Class) -> dict[str, str]:
    """Fields of a class and the comments that end their lines."""
    comments: dict[str, str] = {}
    for name, member in cls.members.items():
        if member.is_alias or not member.is_attribute or name.startswith("_"):
            continue
        if "instance-attribute" not in member.labels or not member.lineno:
            continue
        line = _lines(Path(str(cls.filepath)))[member.lineno - 1]
        code, mark, comment = line.partition("  # ")
        if mark and code.strip().startswith(name) and not comment.startswith(("noqa", "pyright")):
            comments[name] = comment.strip()
    return comments


class Docstrings(griffe.Extension):
    """Rewrites docstrings of modules and classes as they are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change what has aligned entries; list fields that comments explain."""
        if (
            isinstance(obj, griffe.Class)
            and obj.docstring
            and "Attributes:" not in obj.docstring.value
        ):
            fields = "\n".join(f"    {k}: {v}" for k, v in commented_fields(obj).items())
            if fields:
                obj.docstring.value += f"\n\nAttributes:\n{fields}"
        if obj.docstring and obj.is_module:
            obj.docstring.value = with_tables_kept(obj.docstring.value)
        if obj.docstring and any(_ENTRY.match(x) for x in obj.docstring.value.split("\n")):
            obj.docstring.value = as_markdown(obj.docstring.value)
        if obj.docstring and obj.package.path in reference.packages():
            text = obj.docstring.value
            obj.docstring.value = reference.linked_docstring(text, obj.path, obj.module.path)
