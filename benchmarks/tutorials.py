"""Make the tutorials' pages from their scripts: prose, code, what it prints, its pictures.

    python -m benchmarks.tutorials                # all pages, some minutes on one core
    python -m benchmarks.tutorials path_kl        # one of them

A tutorial is a script in ``examples/tutorials`` in the percent format, which editors and jupytext
read too: a line ``# %%`` begins a cell of code, ``# %% [markdown]`` one of prose. What a cell
prints stands below it on the page. Where its last line is an expression, as in a notebook, and a
figure or a picture, the page shows that. A script runs alone as well; then it shows no pictures.

Comments before the first cell, ``# run with: OLD -> NEW``, make a tutorial small for the tests.
"""

import ast
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPTS, PAGES = ROOT / "examples" / "tutorials", ROOT / "docs" / "tutorials"
CHANGE = re.compile(r"^# run with: (.+) -> (.+)$", re.MULTILINE)
CELL = re.compile(r"^# %%(?P<prose> \[markdown\])?$", re.MULTILINE)
_LARGEST = 100_000  # bytes of a picture


@dataclass(frozen=True)
class Cell:
    """A piece of a script.

    Attributes:
        text: its code, or its prose without the comment signs.
        is_code: whether it is code.
        line: of the script at which its text begins, from 1.
    """

    text: str
    is_code: bool
    line: int


@dataclass(frozen=True)
class Result:
    """What a cell of code left.

    Attributes:
        printed: on standard output.
        shown: value of its last expression, where that is a figure or a picture.
    """

    printed: str
    shown: Figure | Image.Image | None


def cells(source: str) -> list[Cell]:
    """The cells of a script in the percent format.

    Raises:
        ValueError: the script does not begin with a cell, or a line of prose is no comment.
    """
    starts = list(CELL.finditer(source))
    if not starts or CHANGE.sub("", source[: starts[0].start()]).strip():
        raise ValueError("a tutorial must begin with a cell: '# %% [markdown]' or '# %%'")
    ends = [*(start.start() for start in starts[1:]), len(source)]
    return [_cell(source, start, end) for start, end in zip(starts, ends, strict=True)]


def _cell(source: str, start: re.Match[str], end: int) -> Cell:
    body = source[start.end() + 1 : end]
    line = source.count("\n", 0, start.end()) + 2 + len(body) - len(body.lstrip("\n"))
    if start["prose"] is None:
        return Cell(body.strip("\n"), True, line)
    lines = body.strip("\n").splitlines()
    for k, text in enumerate(lines):
        if not re.match(r"#( |$)", text):
            raise ValueError(
                f"prose must be comments, but line {line + k} is {text!r}; begin a cell of code "
                "with '# %%'"
            )
    return Cell("\n".join(text[2:] for text in lines), False, line)


def changes(source: str) -> list[tuple[str, str]]:
    """What makes a script small, (old, new) each: the comments before its first cell.

    Raises:
        ValueError: what is to be changed does not stand in a cell of code exactly once.
    """
    made = [(old, new) for old, new in CHANGE.findall(source.partition("# %%")[0])]
    for old, _ in made:
        if sum(cell.text.count(old) for cell in cells(source) if cell.is_code) != 1:
            raise ValueError(f"{old!r} must stand in one cell of code, once")
    return made


def smaller(source: str) -> str:
    """A script as the tests run it."""
    head, mark, body = source.partition("# %%")
    for old, new in changes(source):
        body = body.replace(old, new)
    return head + mark + body


def executed(script: Sequence[Cell], name: str) -> Iterator[Result | None]:
    """Run the cells one after the other in one module; None for each of prose."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    for cell in script:
        if not cell.is_code:
            yield None
            continue
        tree = ast.parse(cell.text)
        ast.increment_lineno(tree, cell.line - 1)  # errors name the line of the script
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed, shown = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, name, "exec", dont_inherit=True), names)
            if isinstance(last, ast.Expr):
                expression = compile(ast.Expression(last.value), name, "eval", dont_inherit=True)
                shown = eval(expression, names)
        picture = shown if isinstance(shown, Figure | Image.Image) else None
        yield Result(printed.getvalue(), picture)


def page(source: str, results: Sequence[Result | None], name: str) -> tuple[str, dict[str, bytes]]:
    """The page of a tutorial, and its pictures by file name."""
    script, small = cells(source), changes(source)
    parts, pictures = list[str](), dict[str, bytes]()
    for cell, result in zip(script, results, strict=True):
        if result is None:
            parts.append(cell.text)
            continue
        here = "; ".join(f"{old} -> {new}" for old, new in small if old in cell.text)
        comment = f"<!-- run with: {here} -->\n" if here else ""
        parts.append(f"{comment}```python\n{cell.text}\n```")
        if result.printed.strip():
            parts.append(f"```text\n{result.printed.rstrip()}\n```")
        if result.shown is not None:
            file = f"{name}-{len(pictures) + 1}.png"
            pictures[file] = png(result.shown)
            parts.append(f"![{caption(result.shown)}]({file})")
    made = (
        f"<!-- Made from examples/tutorials/{name}.py by `python -m benchmarks.tutorials {name}`: "
        "edit that, not this. -->"
    )
    return "\n\n".join([*parts, made]) + "\n", pictures


def caption(shown: Figure | Image.Image) -> str:
    """What a picture shows, in words: the figure's title, or what the picture says of itself.

    Raises:
        ValueError: it has neither: a reader who cannot see it would know nothing.
    """
    words = shown.get_label() if isinstance(shown, Figure) else shown.info.get("caption", "")
    if not str(words):
        raise ValueError(
            "a picture must say what it shows: figure.set_label(...), or picture.info['caption']"
        )
    return str(words)


def png(shown: Figure | Image.Image) -> bytes:
    """A picture as a file, the same bytes from the same picture.

    Raises:
        ValueError: it is larger than a page should have.
    """
    file = io.BytesIO()
    if isinstance(shown, Figure):
        drawn = io.BytesIO()
        shown.savefig(drawn, format="png", dpi=110)
        few = Image.open(drawn).convert("RGB").quantize(64)  # colours: a third of the bytes
        few.save(file, format="PNG", optimize=True)
    else:
        shown.convert("RGB").save(file, format="PNG", optimize=True)
    if len(file.getvalue()) > _LARGEST:
        raise ValueError(
            f"a picture must have at most {_LARGEST} bytes, this has {len(file.getvalue())}"
        )
    return file.getvalue()


def without_results(text: str) -> str:
    """A page without what was printed and shown: what follows from the script alone."""
    text = re.sub(r"(?<=\n```\n\n)```text\n.*?\n```\n\n", "", text, flags=re.DOTALL)
    return re.sub(r"(?m)^!\[[^\]]*\]\([\w-]+\.png\)\n\n", "", text)


def write(name: str, output: Path = PAGES) -> None:
    """Run one tutorial and write its page and pictures; earlier pictures of it go."""
    source = (SCRIPTS / f"{name}.py").read_text()
    text, pictures = page(source, list(executed(cells(source), f"{name}.py")), name)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob(f"{name}-*.png"):
        old.unlink()
    (output / f"{name}.md").write_text(text)
    for file, data in pictures.items():
        (output / file).write_bytes(data)


def main(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (), output: Path = PAGES
) -> None:
    """Write pages.

    Args:
        names: of the tutorials; all, if none is named.
        output: folder of the pages.
    """
    known = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    if unknown := set(names) - set(known):
        raise SystemExit(f"there is no tutorial {sorted(unknown)}; there are {', '.join(known)}")
    for name in names or known:
        write(name, output)
        print(output / f"{name}.md")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
