"""LaTeX becomes MathML when the site is built, so that pages need no script to show a formula."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

_OPERATOR = re.compile(
    r"<mi>(log|exp|sin|cos|tan|tanh|sinh|cosh|arg|dim|det|ln|sign)</mi>"
    r"((?:<mrow>)?<mo [^>]*>(?:&#x00028;|\(|&#x0005B;|\[)</mo>)?"
)


def mathml(latex: str, *, block: bool) -> str:
    """A formula as MathML.

    Args:
        latex: without its dollars.
        block: whether it stands on lines of its own.

    Raises:
        ValueError: a command in it is unknown.
    """
    try:
        made = convert(latex, display="block" if block else "inline")
    except Exception as error:  # it has errors of a dozen kinds
        raise ValueError(f"no formula: {latex!r} ({type(error).__name__}: {error})") from error
    left = re.findall(r"\\[a-zA-Z]+", html.unescape(re.sub(r"<[^>]*>", " ", made)))
    if left:
        raise ValueError(f"{latex!r} has commands that latex2mathml does not know: {left}")
    return _OPERATOR.sub(_spaced, made)


def _spaced(match: re.Match[str]) -> str:
    """A named operator with TeX's thin spaces, but none before a parenthesis."""
    after = "0" if match[2] else "0.167em"
    return f'<mo lspace="0.167em" rspace="{after}">{match[1]}</mo>{match[2]}'


def on_page_content(content: str, /, page: Page, **_: object) -> str:
    """Replace what arithmatex has marked."""
    return typeset(content, page.file.src_uri)


def typeset(text: str, name: str) -> str:
    """A page with its formulas as MathML."""

    def formula(match: re.Match[str]) -> str:
        block = match[2] == "["
        try:
            made = mathml(html.unescape(match[3]).strip(), block=block)
        except ValueError as error:
            raise PluginError(f"{name}: {error}") from error
        return f'<div class="formula">{made}</div>' if block else made

    return _FORMULA.sub(formula, text)
