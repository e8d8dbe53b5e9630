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


def in_order(uris: list[str], folder: str, docs: Path) -> list[str]:
    """Pages of a folder in the order of the page that leads to them."""
    leading = docs / ORDERED_BY.get(folder, "-")
    text = leading.read_text() if leading.is_file() else ""
    prefix = "" if leading.parent.name == folder else f"{folder}/"
    place: dict[str, int] = {}
    for n, target in enumerate(re.findall(r"\]\(([^)#\s]+)", text)):
        place.setdefault(target.removeprefix(prefix), n)
    last = len(place) + len(text)
    return sorted(uris, key=lambda uri: (place.get(uri.removeprefix(f"{folder}/"), last), uri))


def expanded(nav: list[Any], pages: list[str], docs: Path) -> list[Any]:
    """``nav`` with patterns replaced by pages that are not named in it otherwise."""
    named = set(re.findall(r"[\w/.-]+\.md", repr(nav)))
    made: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            ((title, inner),) = item.items()
            filled = expanded(inner, pages, docs) if isinstance(inner, list) else inner
            if filled:
                made.append({title: filled})
        elif item == "reference/*":
            made += reference.navigation()
        elif "*" in item:
            fitting = [p for p in pages if fnmatch(p, item) and p not in named]
            made += in_order(fitting, item.split("/")[0], docs)
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
