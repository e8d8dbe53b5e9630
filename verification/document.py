"""The outcome of a run for the repository: a page of Markdown, its picture, and the numbers.

All are functions of the record (``record.of``). The page names every claim with its statement, and
folds away the checks; the numbers (``numbers``) are what the documentation's pages of theorems show
of each claim. What changes from run to run is left out or rounded.
"""

import html
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from verification.margins import picture, rejected
from verification.report import ROUTES, headline, share, short

Record = Mapping[str, Any]


def write(record: Record, page: Path) -> None:
    """Write the page, and beside it the picture (.svg) and the numbers (.json)."""
    page.write_text(markdown(record, page.with_suffix(".svg").name), encoding="utf-8")
    page.with_suffix(".svg").write_text(picture(record) + "\n", encoding="utf-8")
    page.with_suffix(".json").write_text(numbers(record), encoding="utf-8")


def markdown(record: Record, image: str = "verification.svg") -> str:
    """The page: what is verified, theme by theme."""
    claims = record["claims"]
    checks = sum(len(claim["checks"]) for claim in claims)
    mistakes = [mistake for claim in claims for mistake in claim["mistakes"]]
    count = sum(mistake["rejected"] for mistake in mistakes)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# What is verified",
        "",
        "Generated: `python -m verification --full --document docs/verification.md`.",
        "",
        f"**{headline(record)}**: {checks} checks on the right code, and {len(mistakes)} planted "
        f"mistakes, of which {count} are rejected ({record['precision']}, {record['device']}, "
        f"{versions}).",
        "",
        f"![Deviations of all checks: right code, tolerance, smallest mistake]({image})",
        "",
        "A claim is a statement from the literature. Its checks run the library's own code on "
        "problems whose answers are known by another route, and compare. Then a mistake is planted "
        "in that code, one at a time, and the same checks must fail. A *deviation* is relative to "
        "the size of what is claimed; a *tolerance* is derived from what the right code shows and "
        "from the smallest effect of a mistake that the check is to see "
        "(`verification/tolerances.py`), never chosen. The mistakes stand at the end of each "
        "claim's file; `python -m verification --claim NAME` shows one claim, and the run's "
        "`report.html` all of them, with what each mistake changes.",
        "",
        "| route | what is compared |",
        "| --- | --- |",
        *(f"| {name} | {text} |" for name, text in ROUTES.items()),
    ]
    for theme, group in groupby(claims, key=lambda claim: claim["theme"]):
        lines += ["", f"## {theme.replace('_', ' ').capitalize()}"]
        for claim in group:
            lines += ["", f"### {claim['name']}", "", *_claim(claim, record["precision"])]
    return "\n".join(lines) + "\n"


def _claim(claim: Record, precision: str) -> list[str]:
    statement = html.escape(" ".join(claim["statement"].split()), quote=False)
    where = f"{html.escape(claim['source'], quote=False)}. `{claim['file']}`"
    if claim["why_double"]:
        where += f". In float64 only: {claim['why_double']}."
    if not claim["holds"]:
        where = f"**does not hold.** {where}"
    rows = "".join(_row(check, claim, precision) for check in claim["checks"])
    heads = ("check", "route", "found", "claimed", "deviation", "tolerance", "mistakes from")
    head = "".join(f"<th>{words}</th>" for words in heads)
    return [
        f"<code>{_markdown(statement)}</code>",
        "",
        where,
        "",
        f"<details><summary>{len(claim['checks'])} checks, {share(claim)} mistakes rejected"
        f"</summary><table><tr>{head}</tr>{rows}</table></details>",
    ]


def _row(check: Record, claim: Record, precision: str) -> str:
    own = check.get("precision") or precision
    least = rejected(check, claim["mistakes"])
    cells = (
        check["name"],
        check["route"] + ("" if own == precision else f", in {own}"),
        _digits(check["found"]),
        _digits(check["claimed"]),
        short(check["deviation"]),
        "" if check["tolerance"] is None else short(check["tolerance"]),
        "" if least is None else short(least),
    )
    return "<tr>" + "".join(f"<td>{_markdown(html.escape(cell))}</td>" for cell in cells) + "</tr>"


def _markdown(text: str) -> str:
    """Text in which Markdown sees no marks of its own."""
    for mark in "*_`[|$":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


def _digits(value: float | str) -> str:
    return f"{float(value):.6g}"


def numbers(record: Record) -> str:
    """What pages show of each claim, as JSON with a line for each."""
    lines = [
        json.dumps(
            {
                **{key: claim[key] for key in ("name", "title", "theme", "file", "statement")},
                "source": claim["source"],
                "checks": [
                    {
                        "name": check["name"],
                        "route": check["route"],
                        "deviation": check["deviation"],
                        "tolerance": check["tolerance"],
                        "rejected": rejected(check, claim["mistakes"]),
                    }
                    for check in claim["checks"]
                ],
                "mistakes": [
                    {
                        "name": mistake["name"],
                        "edits": mistake["edits"],
                        "by": mistake["by"],
                        "deviation": mistake["deviations"].get(mistake["by"]),
                    }
                    for mistake in claim["mistakes"]
                ],
            }
        )
        for claim in record["claims"]
    ]
    machine = {
        key: record[key]
        for key in ("versions", "precision", "device", "threads", "full", "false_fail")
    }
    body = ",\n".join(f"  {line}" for line in lines)
    return f'{{\n "machine": {json.dumps(machine)},\n "claims": [\n{body}\n ]\n}}\n'
