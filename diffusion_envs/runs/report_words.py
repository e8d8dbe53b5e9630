"""Numbers, tables and pictures of a report as HTML."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_envs.runs.plots import decimals

_MINUS = "\N{MINUS SIGN}"
_LONGEST = 500  # characters of a prompt or name; reports of long ones stay small
_MOST_DIGITS = 6  # behind the point; smaller numbers are written with an exponent


def number(estimate: Mapping[str, Any], sign: str = "") -> str:
    """The mean to the second digit of its standard error, and the error."""
    mean, error = estimate["mean"], estimate["standard_error"]
    if not error:
        text = f"{mean:{sign}.4g}"
    elif (digits := decimals(error)) <= _MOST_DIGITS:
        text = f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"
    else:
        text = f"{mean:{sign}.3g} ± {error:.2g}"
    return text.replace("-", _MINUS)


def escaped(text: str, most: int = _LONGEST) -> str:
    """A run's own words as HTML: all that means something to a page is escaped, and cut if long.

    Args:
        text: a prompt, a name, a setting, whatever comes from outside.
        most: characters.
    """
    shown = text if len(text) <= most else f"{text[:most]}\N{HORIZONTAL ELLIPSIS}"
    return html.escape(shown)


def in_errors(estimate: Mapping[str, Any]) -> str:
    """How many standard errors the mean is away from 0."""
    mean, error = estimate["mean"], estimate["standard_error"]
    return f"{mean / error:+.1f}".replace("-", _MINUS) if error else "?"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Rows whose first cell is their heading; cells are HTML."""
    kind = ' class="number"' if numbers else ""
    head = "".join(
        f'<th scope="col"{kind if column else ""}>{text}</th>' for column, text in enumerate(heads)
    )
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{cell}</td>" for cell in others)
        body += f'<tr><th scope="row" dir="auto">{first}</th>{cells}</tr>'
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def image(data: bytes, kind: str, alt: str) -> str:
    """A picture inside the page."""
    inside = base64.b64encode(data).decode()
    drawn = ' class="plot"' if kind == "svg+xml" else ""
    return f'<img{drawn} src="data:image/{kind};base64,{inside}" alt="{escaped(alt)}">'


def figure(content: str, caption: str) -> str:
    """A picture or chart with its caption below."""
    return f'<figure>{content}<figcaption dir="auto">{escaped(caption)}</figcaption></figure>'


def folded(summary: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"
