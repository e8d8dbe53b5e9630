"""No page fetches anything: a script, style, font or picture from elsewhere fails the build."""

import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*"
    r"\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|@import\s+(?:url\()?[\"']?((?:https?:)?//[^\"')\s]+)"
)


def fetched(page: str) -> list[str]:
    """Addresses that a browser asks for when it shows a page."""
    return ["".join(groups) for groups in _FETCHED.findall(page)]


def on_post_page(output: str, /, page: Page, **_: object) -> str:
    """Refuse a page that needs a network."""
    if elsewhere := fetched(output):
        raise PluginError(f"{page.file.src_uri} fetches {', '.join(elsewhere)}")
    return output
