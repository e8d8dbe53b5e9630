"""Pages of the site that are made from files outside ``docs/``, and the links that lead there.

A link on a page is written for GitHub: relative to the file. On the site the changelog, examples
and sources have pages of their own, and a link to one of these files leads to its page.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# What stands beside docs/ and is a page as it is.
MARKDOWN = {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "AGENTS.md": "project/agents.md",
}
LANGUAGES = {
    ".py": "python",
    ".md": "markdown",
    ".toml": "toml",
    ".json": "json",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".sbatch": "bash",
    ".sh": "bash",
    ".c": "c",
}
_CODE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$|(`+)(?!`).+?(?<!`)\3(?!`)", re.M | re.S)
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)(\))")


def site_uri(path: str) -> str:
    """The page (or file) of the site that shows a file of the repository.

    Args:
        path: from the repository's root.
    """
    if path == "docs" or path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if path in MARKDOWN:
        return MARKDOWN[path]
    if re.fullmatch(r"examples/\w+\.py", path):
        return path.removesuffix(".py") + ".md"
    if re.fullmatch(r"examples/tutorials/\w+\.py", path):
        return "source/" + path + ".md"
    return f"source/{path}.md"


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is made from."""
    for path, page in MARKDOWN.items():
        if uri == page:
            return path
    return f"docs/{uri}"


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Markdown with everything changed but code, fenced and in backticks."""
    parts, at = [], 0
    for code in _CODE.finditer(text):
        parts += [change(text[at : code.start()]), code.group()]
        at = code.end()
    return "".join([*parts, change(text[at:])])


def targets(text: str, path: str) -> Iterator[str]:
    """Files of the repository that a page links to, from the root.

    Args:
        text: of the page.
        path: of the file that it is made from.
    """
    for link in _LINK.finditer(_CODE.sub("", text)):
        target = link[2].split("#")[0]
        yield normpath(str(PurePosixPath(path).parent / target))


def rewritten(text: str, uri: str) -> str:
    """A page's Markdown with links for the site in place of links for the repository."""
    path = repository_path(uri)

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        file = normpath(str(PurePosixPath(path).parent / target))
        # Anchors of lines are GitHub's alone.
        anchor = f"#{anchor}" if anchor and not re.fullmatch(r"L\d+.*", anchor) else ""
        there = relpath(site_uri(file), str(PurePosixPath(uri).parent))
        return f"{match[1]}{there}{anchor}{match[3]}"

    # Links may have code as their text, so code is put aside rather than cut at.
    return _with_code_aside(text, lambda prose: _LINK.sub(link, prose))


def _with_code_aside(text: str, change: Callable[[str], str]) -> str:
    kept: list[str] = []

    def aside(match: re.Match[str]) -> str:
        kept.append(match.group())
        return f"\x00{len(kept) - 1}\x00"

    changed = change(_CODE.sub(aside, text))
    return re.sub(r"\x00(\d+)\x00", lambda m: kept[int(m[1])], changed)


def example_page(source: str, name: str) -> str:
    """A script as a page: what its docstring says, how to run it, and its code."""
    described = ast.get_docstring(ast.parse(source)) or ""
    first, _, rest = described.partition("\n\n")
    words = first.replace("\n", " ")
    return (
        f"# {name}\n\n{words}\n\n{_paragraphs(rest)}\n\n"
        f"```\npython {name}\n```\n\n```python\n{source}```\n"
    )


def _paragraphs(text: str) -> str:
    """Docstring text with its aligned lines kept as they are."""
    blocks = [b for b in text.split("\n\n") if b.strip()]
    return "\n\n".join(
        f"```text\n{b}\n```" if re.search(r"\S {2,}\S|^ {2,}", b, re.M) else b for b in blocks
    )


def source_page(path: str) -> str:
    """A file, or the files of a folder, to read."""
    place = ROOT / path
    files = [place]
    if place.is_dir():
        files = sorted(
            p for p in place.iterdir() if p.is_file() and p.suffix in LANGUAGES | {"": 0}
        )
    title = f"# {path}\n\n"
    shown = []
    for file in files:
        text = file.read_text()
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall(r"`{3,}", text))])
        heading = f"## {file.name}\n\n" if len(files) > 1 else ""
        language = LANGUAGES.get(file.suffix, "text")
        shown.append(f"{heading}{fence}{language}\n{text.rstrip()}\n{fence}\n")
    return title + "\n".join(shown)


def generated() -> dict[str, Callable[[], str]]:
    """Pages by their address on the site, each with what makes its Markdown."""
    pages: dict[str, Callable[[], str]] = {}
    for path, uri in MARKDOWN.items():
        if (ROOT / path).exists():
            pages[uri] = (ROOT / path).read_text
    for script in sorted((ROOT / "examples").glob("*.py")):
        name = f"examples/{script.name}"
        pages[f"examples/{script.stem}.md"] = lambda s=script, n=name: example_page(
            s.read_text(), n
        )
    texts = {f"docs/{p.relative_to(ROOT / 'docs').as_posix()}": p.read_text() for p in markdown()}
    texts |= {path: (ROOT / path).read_text() for path in MARKDOWN if (ROOT / path).exists()}
    for path, text in texts.items():
        for target in targets(text, path):
            uri = site_uri(target)
            if uri.startswith("source/") and (ROOT / target).exists():
                pages.setdefault(uri, lambda t=target: source_page(t))
    return pages


def markdown() -> list[Path]:
    """The pages that are files in ``docs/``."""
    return sorted((ROOT / "docs").rglob("*.md"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for uri, text in generated().items():
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    uri = page.file.src_uri
    if uri.startswith(("reference/", "source/", "examples/")):
        return markdown
    if uri in ("verification.md", "mutants.md", "changelog.md"):
        page.meta["search"] = {"exclude": True}  # a word or two of everything drowns the rest
    return rewritten(markdown, uri)
