"""The outcome of a run as one self-contained page, and as a document for the repository."""

from typing import Any


def page(found: dict[str, Any]) -> str:
    """HTML."""
    return ""


def document(found: dict[str, Any]) -> str:
    """Markdown."""
    return ""
