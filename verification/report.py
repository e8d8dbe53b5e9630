"""The outcome of a run as one self-contained page, and as a document for the repository.

Both are functions of the record alone (``record.of``, ``verification.json``). The page's central
picture is one line per check, on a logarithmic axis of relative deviation: the right code at the
left, at round-off; the wrong variants at the right; the tolerance between them, with room on both
sides. Nothing is fetched, nothing is scripted.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

_LOW, _HIGH = -17.0, 1.5  # powers of ten of the axis

_ROUTES = {
    "proof": "symbols: what is left of the difference",
    "pathwise": "two formulas on the same paths",
    "expectation": "exact expectation, by quadrature or recursion through the library's code",
    "bound": "an inequality: by how much it is violated",
    "limit": "convergence: an extrapolated limit, or a local order",
    "sampled": "random numbers, a sequential test with both error rates stated",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d656d; --page: #f7f8f9; --card: #fff;
  --line: #dfe3e6; --good: #14713d; --bad: #b3261e; --right: #0b62a8; --wrong: #b85300;
  --over: #fdf0e4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a5acb3; --page: #16181b;
  --card: #202327; --line: #3a3f45; --good: #7ad39b; --bad: #ff9d94; --right: #79bbf2;
  --wrong: #f5a45d; --over: #33271c; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 72rem; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; color: var(--soft); font-weight: 600; }
p { max-width: 46rem; } .muted, small { color: var(--soft); font-size: .92rem; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; }
.tile, article, .scroll { background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; }
.tile { padding: .9rem 1.1rem; } .tile b { display: block; font-size: 1.7rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
article { padding: 1.1rem clamp(.8rem, 2vw, 1.5rem) 1.3rem; margin-top: 1.2rem;
  scroll-margin-top: 1rem; }
article header { display: flex; gap: .2rem 1rem; align-items: baseline;
  justify-content: space-between; }
.statement { white-space: pre-wrap; margin: .5rem 0 .3rem; font: .95rem/1.5 ui-monospace, monospace;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; padding: .3rem 1.1rem; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .4rem 1.1rem .4rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: break-word; min-width: 8rem; }
td:last-child { min-width: 15rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .86em; overflow-wrap: anywhere; } td code { display: block; }
.check { margin: 1rem 0 0; font-size: .95rem; } .check small { display: block; }
.track { position: relative; height: 1.5rem; border-bottom: 1px solid var(--soft);
  margin: .1rem 0; }
.track i { position: absolute; font-style: normal; transform: translateX(-50%); line-height: 1; }
.track .over { inset: 0 0 0 auto; background: var(--over); transform: none; }
.track .edge { top: 0; bottom: 0; width: 0; border-left: 2px solid var(--ink); }
.track .right { color: var(--right); top: .12rem; font-size: 1.15rem; }
.track .wrong { color: var(--wrong); top: .12rem; font-size: 1.15rem; font-weight: 600; }
.ticks { position: relative; height: 1.2rem; font-size: .75rem; color: var(--soft); }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.key { display: inline-block; width: 1.1em; text-align: center; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); }
details .scroll { border: 0; padding: 0; margin-top: .3rem; }
.curves { display: grid; gap: 1rem; grid-template-columns:
  repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); max-width: 60rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; max-width: 26rem; display: block; }
figcaption { font-size: .85rem; color: var(--soft); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .data { stroke: var(--right); fill: none; stroke-width: 2; }
svg circle { fill: var(--right); } svg .guide { stroke: var(--soft); stroke-dasharray: 3 4;
  fill: none; }
pre { overflow-x: auto; font-size: .85rem; }
"""


def page(record: Record) -> str:
    """The record as HTML: an overview, then a card for every claim."""
    claims = record["claims"]
    parts = [
        f"<header><h1>{_headline(record)}</h1>"
        f"<p class='muted'>{_circumstances(record)}</p></header>",
        _tiles(record),
        _how_to_read(),
        _overview(claims),
        *(_card(claim) for claim in claims),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Verification: {_headline(record)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


# -- words ---------------------------------------------------------------------------------------


def _headline(record: Record) -> str:
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
        f"<td class='number'>{_share(claim)}</td><td class='number'>{claim['seconds']:.1f}</td>"
        f"<td>{html.escape(claim['source'])}</td></tr>"
        for claim in claims
    )
    return (
        "<div class='scroll'><table><thead><tr><th>claim</th><th></th>"
        "<th class='number'>checks</th><th class='number'>mistakes</th>"
        "<th class='number'>seconds</th><th>source</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _share(claim: Record) -> str:
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
                title = html.escape(f"{wrong['name']}: {_short(size)}", quote=True)
                marks.append(
                    f"<i class='wrong' style='left:{_place(size):.2f}%' title='{title}'>&#215;</i>"
                )
    size = check["deviation"]
    title = html.escape(f"right code: {_short(size)}", quote=True)
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
    route, off = check["route"], f"deviation {_short(check['deviation'])}"
    if check["tolerance"] is not None:
        off += f", tolerance {_short(check['tolerance'])}"
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
            how = f"{_short(wrong['deviations'][wrong['by']])} by {html.escape(wrong['by'])}"
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


def _short(value: float | str) -> str:
    number = float(value)
    return f"{number:.1e}" if math.isfinite(number) else str(value)


def _digits(value: float | str) -> str:
    number = float(value)
    return f"{number:.8g}" if math.isfinite(number) else str(value)


# -- for the repository --------------------------------------------------------------------------


def document(record: Record) -> str:
    """The record as Markdown, with what does not change from run to run."""
    claims = record["claims"]
    checks = sum(len(claim["checks"]) for claim in claims)
    wrongs = sum(len(claim["mistakes"]) for claim in claims)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# What is verified",
        "",
        "Generated: `python -m verification --full --document docs/verification.md`.",
        "",
        f"{_headline(record)}: {checks} checks on the right code, and {wrongs} planted mistakes, "
        f"of which {sum(w['rejected'] for c in claims for w in c['mistakes'])} are rejected "
        f"({record['precision']}, {record['device']}, {versions}).",
        "",
        "A claim is a statement from the literature. Its checks run the library's own code on "
        "problems whose answers are known by another route, and compare. Then a mistake is planted "
        "in that code, one at a time, and the same checks must fail. A *deviation* is relative to "
        "the size of what is claimed; a *tolerance* is derived from what the right code shows and "
        "from the smallest effect of a mistake that the check is to see "
        "(`verification/tolerances.py`), never chosen. `python -m verification --claim NAME` shows "
        "one claim; the run's `report.html` shows all, with pictures and the planted lines.",
        "",
        "| route | what is compared |",
        "| --- | --- |",
        *(f"| {name} | {text} |" for name, text in _ROUTES.items()),
        "",
        "| claim | checks | mistakes rejected | source |",
        "| --- | --- | --- | --- |",
        *(
            f"| [{c['name']}](#{c['name']}) | {len(c['checks'])} | {_share(c)} | {c['source']} |"
            for c in claims
        ),
    ]
    for claim in claims:
        lines += ["", f"## {claim['name']}", "", "```text", claim["statement"], "```", ""]
        lines += [f"{claim['source']}. `{claim['file']}`"]
        if claim["why_double"]:
            lines += ["", f"In float64 only: {claim['why_double']}."]
        lines += ["", "| check | route | found | claimed | deviation | tolerance |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for check in claim["checks"]:
            tolerance = "" if check["tolerance"] is None else _short(check["tolerance"])
            own = check.get("precision") or record["precision"]
            route = check["route"] + ("" if own == record["precision"] else f", in {own}")
            lines.append(
                f"| {_cell(check['name'])} | {route} | {_digits(check['found'])} | "
                f"{_digits(check['claimed'])} | {_short(check['deviation'])} | {tolerance} |"
            )
        lines += ["", f"<details><summary>{len(claim['mistakes'])} mistakes rejected</summary>", ""]
        for wrong in claim["mistakes"]:
            how = _short(wrong["deviations"][wrong["by"]]) if wrong["by"] else wrong["note"]
            where = ", ".join(f"`{edit['target']}`" for edit in wrong["edits"])
            lines.append(f"- {wrong['name']} ({where}): {how}")
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
