"""Claims on pages: their statement, their checks, and how far each is from what it rejects.

On a page of theory a line with a comment ``claim: NAME`` stands for that claim::

    Checked by [path-kl](../verification.md#path-kl). <!-- claim: path-kl -->

GitHub shows what stands before the comment (which may be nothing); on the site the whole line is
replaced by the claim's statement, a table of its checks, and a picture of deviation, tolerance and
the smallest deviation of a mistake that the check rejects. The numbers are those of
``docs/verification.json``, which ``python -m verification`` writes. A name that is not there fails
the build.
"""

import html
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_MARKER = re.compile(r"^(.*)<!-- claim: ([\w-]+) -->[ \t]*$", re.MULTILINE)
_SECTION = re.compile(r"^#{2,3} (\S+)$", re.MULTILINE)
_LEAST, _WIDTH, _LEFT, _ROW = 1e-18, 640, 34, 20


@cache
def claims(docs: Path) -> dict[str, dict[str, Any]]:
    """What ``verification.json`` says of each claim; nothing if the file is not there."""
    file = docs / "verification.json"
    if not file.exists():
        return {}
    return {claim["name"]: claim for claim in json.loads(file.read_text())["claims"]}


@cache
def listed(docs: Path) -> frozenset[str]:
    """The claims that ``verification.md`` has a section for."""
    file = docs / "verification.md"
    return frozenset(_SECTION.findall(file.read_text()) if file.exists() else ())


def expanded(text: str, uri: str, docs: Path) -> str:
    """A page with its markers replaced.

    Raises:
        PluginError: a marker names no claim.
    """
    known, up = claims(docs), "../" * uri.count("/")
    first_at = next((match.start() for match in _MARKER.finditer(text)), -1)

    def claim(match: re.Match[str]) -> str:
        name = match[2]
        if name in known:
            first = match.start() == first_at
            return shown(known[name], f"{up}verification.md", legend=first)
        if not known and name in listed(docs):
            return match[1] or f"[{name}]({up}verification.md#{name})"
        raise PluginError(f"{uri} names a claim that is not there: {name}")

    return _MARKER.sub(claim, text)


def shown(claim: dict[str, Any], page: str, *, legend: bool = True) -> str:
    """A claim as Markdown.

    Args:
        claim: of ``verification.json``.
        page: that lists all claims, relative to this one.
        legend: whether the picture's signs are explained below it.
    """
    name, checks = claim["name"], claim["checks"]
    mistakes = len(claim["mistakes"])
    seen = sum(1 for mistake in claim["mistakes"] if mistake.get("by"))
    statement = "\n".join(f"    {line}".rstrip() for line in claim["statement"].splitlines())
    rest = ""
    if seen < mistakes:
        rest = " A mistake that none of them rejects is refused by the code itself, or by `--full`."
    folded = [
        f'??? abstract "Claim `{name}`: {len(checks)} checks reject {seen} of {mistakes} planted '
        'mistakes"',
        "",
        "    ```text",
        statement,
        "    ```",
        "",
        f"    Source: {_text(claim['source'])}. Again on this machine: "
        f"`python -m verification --claim {name}`; [all claims]({page}#{name}).{rest}",
        "",
        "    | | check | route | deviation | tolerance | smallest rejected |",
        "    | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row, check in enumerate(checks, 1):
        numbers = " | ".join(_number(check[k]) for k in ("deviation", "tolerance", "rejected"))
        folded.append(f"    | {row} | {_text(check['name'])} | {check['route']} | {numbers} |")
    return "\n".join(["", *folded, "", picture(claim, legend=legend), ""])


def _text(words: str) -> str:
    """Plain words as Markdown shows them."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", words.replace("\n", " "))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def picture(claim: dict[str, Any], *, legend: bool = True) -> str:
    """Each check on one logarithmic line: deviation, tolerance, smallest rejected effect.

    Colours are the page's own, so that it reads in the light and in the dark.
    """
    checks = [c for c in claim["checks"] if _finite(c["deviation"]) and _finite(c["tolerance"])]
    values = [c[k] for c in checks for k in ("deviation", "tolerance", "rejected")]
    sizes = [v for v in values if _finite(v) and v > 0]
    if not sizes:
        return ""
    low = math.floor(math.log10(max(min(sizes), _LEAST)))
    if any(c["deviation"] <= _LEAST for c in checks):
        low -= 1  # room for exact zeros, at the left edge
    high = max(math.ceil(math.log10(max(sizes))), low + 1)

    def at(value: float) -> float:
        place = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return _LEFT + place * (_WIDTH - _LEFT - 12)

    height = _ROW * len(checks) + 34
    label = f"{claim['name']}: deviation, tolerance and smallest rejected effect of each check"
    parts = [
        f'<svg class="claim" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(label)}">'
    ]
    step = max(1, (high - low) // 7)
    for power in range(low, high + 1, step):
        x = at(10.0**power)
        parts.append(f'<path class="line" d="M{x:.1f} 4V{height - 28}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 12}">10<tspan dy="-5" '
            f'class="power">{power}</tspan></text>'
        )
    for row, check in enumerate(checks):
        y = _ROW * row + 16
        deviation, tolerance, rejected = (
            check["deviation"],
            check["tolerance"],
            check.get("rejected"),
        )
        title = html.escape(
            f"{check['name']} ({check['route']}): deviation {_number(deviation)}, tolerance "
            f"{_number(tolerance)}"
            + ("" if rejected is None else f", smallest rejected {_number(rejected)}")
        )
        number = claim["checks"].index(check) + 1
        parts.append(f"<g><title>{title}</title>")
        parts.append(f'<text class="number" x="{_LEFT - 12}" y="{y + 4}">{number}</text>')
        parts.append(f'<path class="within" d="M{_LEFT} {y}H{at(tolerance):.1f}"/>')
        parts.append(f'<path class="tolerance" d="M{at(tolerance):.1f} {y - 7}V{y + 7}"/>')
        parts.append(f'<circle class="deviation" cx="{at(deviation):.1f}" cy="{y}" r="4"/>')
        if rejected is not None and _finite(rejected):
            x = at(rejected)
            parts.append(f'<path class="rejected" d="M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8"/>')
        parts.append("</g>")
    parts.append("</svg>")
    words = (
        '<span class="deviation">&#9679;</span> deviation of the right code, by check; '
        '<span class="tolerance">&#10072;</span> tolerance; <span class="rejected">&#10005;</span>'
        " smallest deviation of a planted mistake that the check rejects; all relative to the size "
        "of what is claimed"
    )
    caption = f'<figcaption class="claim">{words}</figcaption>' if legend else ""
    return f'<figure class="claim">{"".join(parts)}{caption}</figure>'


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Expand the claims that a page names."""
    return expanded(markdown, page.file.src_uri, Path(config.docs_dir))
