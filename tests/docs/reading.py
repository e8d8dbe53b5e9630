"""The pages of the documentation, and the modules that build the site from them."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def hook(name: str):
    """A module of ``docs/hooks``, which import each other by their plain names."""
    folder = str(DOCS / "hooks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def pages() -> list[Path]:
    """Every page: README, what stands beside it, and all of ``docs``."""
    beside = [ROOT / name for name in ("README.md", *hook("outside").MARKDOWN)]
    return [path for path in [*beside, *hook("outside").markdown()] if path.exists()]


def name(path: Path) -> str:
    """A page's address from the root, to name a test by."""
    return path.relative_to(ROOT).as_posix()
