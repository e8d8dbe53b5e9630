"""The outcome of a run as one self-contained page.

A function of the record alone (``record.of``, ``verification.json``). Its first screen says what
holds and shows all checks at once (``margins``); below, each claim has a line for every check, on a
logarithmic axis of relative deviation: the right code at the left, at round-off; the mistakes at
the right; the tolerance between them, with room on both sides. Nothing is fetched or scripted.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verification.margins import picture

Record = Mapping[str, Any]

_LOW, _HIGH = -17.0, 1.5  # powers of ten of the axis

ROUTES = {
    "proof": "symbols: what is left of the difference",
    "pathwise": "two formulas on the same paths",
    "expectation": "exact expectation, by quadrature or recursion through the library's code",
    "bound": "an inequality: by how much it is violated",
    "limit": "convergence: an extrapolated limit, or a local order",
    "sampled": "random numbers, a sequential test with both error rates stated",
}

_STYLE = (Path(__file__).parent / "report.css").read_text()


def page(record: Record) -> str:
    """The record as HTML: an overview, then a card for every claim."""
    claims = record["claims"]
    parts = [
        f"<header><h1>{headline(record)}</h1>"
        f"<p class='muted'>{_circumstances(record)}</p></header>",
        _tiles(record),
        picture(record),
        _how_to_read(),
        _overview(claims),
        *(_card(claim) for claim in claims),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Verification: {headline(record)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


# -- words ---------------------------------------------------------------------------------------


def headline(record: Record) -> str:
    """How many claims hold, in words."""
    claims = record["claims"]
    held = sum(claim["holds"] for claim in claims)
    if held == len(claims):
        return f"All {held} claims hold" if held > 1 else "The claim holds"
    return f"{len(claims) - held} of {len(claims)} claims do not hold"


def _circumstances(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    extent = "every check" if record["full"] else "the quick checks"
    return html.escape(
        f"{extent}, {record['precision']}, {record['device']}, {record['threads']} thread, "
        f"seed {record['seed']}, {record['seconds']:.0f} s; {versions}"
    )


def _tiles(record: Record) -> str:
    claims = record["claims"]
    checks = sum(len(claim["checks"]) for claim in claims)
    wrongs = [wrong for claim in claims for wrong in claim["mistakes"]]
    rejected = sum(wrong["rejected"] for wrong in wrongs)
    held = sum(claim["holds"] for claim in claims)
    tiles = [
        (f"{held} / {len(claims)}", "claims hold", held == len(claims)),
        (f"{checks}", "checks on the right code", True),
        (f"{rejected} / {len(wrongs)}", "planted mistakes rejected", rejected == len(wrongs)),
        (f"{record['false_fail']:.0e}", "false alarms, of each sequential test, at most", True),
    ]
    return (
        "<div class='tiles'>"
        + "".join(
            f"<div class='tile'><b class='{'good' if good else 'bad'}'>{number}</b>{text}</div>"
            for number, text, good in tiles
        )
        + "</div>"
    )


def _how_to_read() -> str:
    return (
        "<p>Every claim is a statement from the literature, measured on the library's own code in "
        "problems whose answers are known by another route. Then a mistake is planted in that code "
        "and the same measurement is made again. In the pictures, "
        "<i class='key' style='color:var(--right)'>&#9679;</i>is the right code, "
        "<i class='key' style='color:var(--wrong)'>&#215;</i>a mistake, and the line is the "
        "tolerance, which was derived from both: what lies to its right is rejected. The axis is "
        "the deviation from the answer, relative to it; 1e-16 is the computer's round-off.</p>"
    )


def _overview(claims: Sequence[Record]) -> str:
    rows = "".join(
        f"<tr><th><a href='#{claim['name']}'>{claim['name']}</a></th>"
        f"<td>{_verdict(claim)}</td><td class='number'>{len(claim['checks'])}</td>"
        f"<td class='number'>{share(claim)}</td><td class='number'>{claim['seconds']:.1f}</td>"
        f"<td>{html.escape(claim['source'])}</td></tr>"
        for claim in claims
    )
    return (
        "<div class='scroll'><table><thead><tr><th>claim</th><th></th>"
        "<th class='number'>checks</th><th class='number'>mistakes</th>"
        "<th class='number'>seconds</th><th>source</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def share(claim: Record) -> str:
    """Mistakes rejected, of those planted."""
    return f"{sum(w['rejected'] for w in claim['mistakes'])} / {len(claim['mistakes'])}"


def _words(claim: Record) -> str:
    if claim["holds"]:
        return "holds"
    if claim["verdict"] == "pass":
        return "accepts a mistake"
    return "fails" if claim["verdict"] == "fail" else "not decided"


def _verdict(claim: Record) -> str:
    return f"<b class='{'good' if claim['holds'] else 'bad'}'>{_words(claim)}</b>"


# -- one claim -----------------------------------------------------------------------------------


def _card(claim: Record) -> str:
    checks = "".join(_check(check, claim["mistakes"]) for check in claim["checks"])
    curves = "".join(_curve(check) for check in claim["checks"] if check.get("curve"))
    error = f"<pre class='bad'>{html.escape(claim['error'])}</pre>" if claim["error"] else ""
    return (
        f"<article id='{claim['name']}'><header><h2>{claim['name']}</h2>{_verdict(claim)}</header>"
        f"<div class='statement'>{html.escape(claim['statement'])}</div>"
        f"<small>{html.escape(claim['source'])} &middot; <code>{claim['file']}</code></small>"
        f"{error}{checks}{_ticks() if checks else ''}"
        f"{f'<h3>Convergence</h3><div class=curves>{curves}</div>' if curves else ''}"
        f"{_mistakes(claim)}</article>"
    )


def _check(check: Record, wrongs: Iterable[Record]) -> str:
    tolerance = check["tolerance"]
    marks = []
    if tolerance is not None:
        edge = _place(tolerance)
        marks.append(f"<i class='over' style='width:{100 - edge:.2f}%'></i>")
        marks.append(f"<i class='edge' style='left:{edge:.2f}%'></i>")
        for wrong in wrongs:
            if check["name"] in wrong["deviations"]:
                size = wrong["deviations"][check["name"]]
                title = html.escape(f"{wrong['name']}: {short(size)}", quote=True)
                marks.append(
                    f"<i class='wrong' style='left:{_place(size):.2f}%' title='{title}'>&#215;</i>"
                )
    size = check["deviation"]
    title = html.escape(f"right code: {short(size)}", quote=True)
    marks.append(f"<i class='right' style='left:{_place(size):.2f}%' title='{title}'>&#9679;</i>")
    bad = "" if check["verdict"] == "pass" else f" <b class='bad'>{check['verdict']}</b>"
    note = check.get("note", "")
    if check.get("needed"):
        note = f"{note} about {check['needed']} samples would decide".strip()
    note = f"<div class='muted'>{html.escape(note)}</div>" if note else ""
    return (
        f"<div class='check'><div><span>{html.escape(check['name'])}{bad}</span>"
        f"<small>{_numbers(check)}</small></div>{note}"
        f"<div class='track'>{''.join(marks)}</div></div>"
    )


def _numbers(check: Record) -> str:
    """The two numbers, and how far they are apart."""
    route, off = check["route"], f"deviation {short(check['deviation'])}"
    if check["tolerance"] is not None:
        off += f", tolerance {short(check['tolerance'])}"
    value, claimed = _digits(check["found"]), _digits(check["claimed"])
    relation = "&le;" if route == "bound" else "="
    pair = "" if route == "proof" else f"{value} {relation} {claimed} &middot; "
    several = f", worst of {check['count']}" if check["count"] > 1 else ""
    samples = f", {check['n']} samples" if "n" in check else ""
    return f"{route}: {pair}{off}{several}{samples}"


def _mistakes(claim: Record) -> str:
    if not claim["mistakes"]:
        return ""
    rows = []
    for wrong in claim["mistakes"]:
        where = "".join(
            f"<code>{html.escape(edit['target'])}</code>"
            f"<code class='good'>&minus; {html.escape(edit['right'])}</code>"
            f"<code class='bad'>+ {html.escape(edit['wrong'])}</code>"
            for edit in wrong["edits"]
        )
        if wrong["by"]:
            how = f"{short(wrong['deviations'][wrong['by']])} by {html.escape(wrong['by'])}"
        else:
            how = html.escape(wrong["note"])
        state = "" if wrong["rejected"] else "<b class='bad'>accepted</b> "
        rows.append(
            f"<tr><th>{html.escape(wrong['name'])}</th><td>{where}</td><td>{state}{how}</td></tr>"
        )
    opened = "" if claim["holds"] else " open"
    return (
        f"<details{opened}><summary>{len(claim['mistakes'])} mistakes that are planted, and what "
        "rejects them</summary><div class='scroll'><table><thead><tr><th>mistake</th>"
        "<th>planted in</th><th>largest deviation</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


# -- pictures ------------------------------------------------------------------------------------


def _place(value: float | str) -> float:
    """Position of a deviation on the axis, in per cent; NaN lies at its end."""
    number = float(value)
    power = math.log10(max(number, 10**_LOW)) if math.isfinite(number) else _HIGH
    return 100 * (min(max(power, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)


def _ticks() -> str:
    marks = "".join(
        f"<span style='left:{_place(float(size)):.2f}%'>{size}</span>"
        for size in ("1e-16", "1e-12", "1e-8", "1e-4", "1")
    )
    return f"<div class='ticks'>{marks}</div>"


def _curve(check: Record) -> str:
    """Errors against step sizes, both logarithmic, with the line of the order that fits the end."""
    points = [(float(h), float(e)) for h, e in check["curve"] if float(h) > 0 and float(e) > 0]
    if len(points) < 2:
        return ""
    points.sort()
    xs = [math.log10(h) for h, _ in points]
    ys = [math.log10(e) for _, e in points]
    slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
    order = round(2 * slope) / 2
    left, right, top, bottom = 56.0, 330.0, 10.0, 170.0
    low, high = min(ys), max(max(ys), min(ys) + 0.5)

    def place(x: float, y: float) -> str:
        across = left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0])
        return f"{across:.1f},{bottom - (bottom - top) * (y - low) / (high - low):.1f}"

    data = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
    reach = min(xs[-1], xs[0] + (high - low) / order) if order > 0 else xs[-1]
    guide = f"{place(xs[0], ys[0])} {place(reach, ys[0] + order * (reach - xs[0]))}"
    dots = "".join(
        "<circle cx='{}' cy='{}' r='3.5'/>".format(*place(x, y).split(","))
        for x, y in zip(xs, ys, strict=True)
    )
    return (
        "<figure><svg viewBox='0 0 340 200' role='img'>"
        f"<path class='axis' d='M{left} {top}V{bottom}H{right}' fill='none'/>"
        f"<text x='{left - 6}' y='{top + 8}' text-anchor='end'>{10**high:.0e}</text>"
        f"<text x='{left - 6}' y='{bottom}' text-anchor='end'>{10**low:.0e}</text>"
        f"<text x='{left}' y='{bottom + 16}'>{10 ** xs[0]:.2g}</text>"
        f"<text x='{right}' y='{bottom + 16}' text-anchor='end'>step {10 ** xs[-1]:.2g}</text>"
        f"<polyline class='guide' points='{guide}'/><polyline class='data' points='{data}'/>{dots}"
        f"</svg><figcaption>{html.escape(check['name'])}; dotted: order {order:g}</figcaption>"
        "</figure>"
    )


def short(value: float | str) -> str:
    """A deviation with two digits."""
    number = float(value)
    return f"{number:.1e}" if math.isfinite(number) else str(value)


def _digits(value: float | str) -> str:
    number = float(value)
    return f"{number:.8g}" if math.isfinite(number) else str(value)
