"""The navigation: a name with a star in ``mkdocs.yml`` stands for all pages that it fits."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import outside
import reference
from mkdocs.config.defaults import MkDocsConfig

# Pages of a folder stand in the order in which this page links to them; the rest follow by name.
ORDERED_BY = {"theory": "theorems.md", "tutorials": "tutorials/index.md", "howto": "howto/index.md"}


def in_order(uris: list[str], folder: str, docs: Path) -> list[Any]:
    """Pages of a folder in the order, and under the headings, of the page that leads to them."""
    leading = docs / ORDERED_BY.get(folder, "-")
    text = leading.read_text() if leading.is_file() else ""
    prefix = "" if leading.parent.name == folder else f"{folder}/"
    left, groups = sorted(uris), list[tuple[str, list[str]]]()
    heading = ""
    for title, target in re.findall(r"^## (.*)$|\]\(([^)#\s]+)", text, re.MULTILINE):
        heading = title or heading
        uri = f"{folder}/{target.removeprefix(prefix)}"
        if target and uri in left:
            left.remove(uri)
            if not groups or groups[-1][0] != heading:
                groups.append((heading, []))
            groups[-1][1].append(uri)
    grouped = len(groups) > 1 and all(title for title, _ in groups)
    found = [{t: us} for t, us in groups] if grouped else [u for _, us in groups for u in us]
    return [*found, *left]


def expanded(
    nav: list[Any], pages: list[str], docs: Path, named: set[str] | None = None
) -> list[Any]:
    """``nav`` with patterns replaced by pages that are not named in it otherwise.

    Args:
        nav: of ``mkdocs.yml``, or a part of it.
        pages: all that there are.
        docs: their folder.
        named: pages that the whole of it names; those of ``nav`` if left out.
    """
    if named is None:
        named = set(re.findall(r"[\w/.-]+\.md", repr(nav)))
    made: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            ((title, inner),) = item.items()
            filled = expanded(inner, pages, docs, named) if isinstance(inner, list) else inner
            if filled:
                made.append({title: filled})
        elif item == "reference/*":
            made += reference.navigation()
        elif "*" in item:
            deep = item.count("/")
            fitting = [p for p in pages if fnmatch(p, item) and p.count("/") == deep]
            made += in_order([p for p in fitting if p not in named], item.split("/")[0], docs)
        else:
            made.append(item)
    return made


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the pages that the patterns of the navigation stand for."""
    docs = Path(config.docs_dir)
    pages = [p.relative_to(docs).as_posix() for p in outside.markdown()]
    pages = sorted({*pages, *outside.generated()})
    config.nav = expanded(config.nav or [], pages, docs)
    return config
