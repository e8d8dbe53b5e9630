"""What the results of the mutants say: docs/mutants.md, and whether it is good enough."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutants.mutate import ROOT, path_of

LEAST = 0.95  # share of the mutants that must be killed
REASONS = ROOT / "docs" / "mutants.json"
DOCUMENT = ROOT / "docs" / "mutants.md"

Results = dict[str, dict[str, Any]]
"""key -> result, of one module."""
Reasons = dict[str, dict[str, dict[str, str]]]
"""module -> key -> diff, kind and reason."""


@dataclass(frozen=True)
class Tally:
    """One module's mutants.

    Attributes:
        module: its name.
        total: how many mutants it has.
        results: of those that were tried.
        reasons: for survivors, by key.
    """

    module: str
    total: int
    results: Results
    reasons: dict[str, dict[str, str]]

    @property
    def killed(self) -> Counter[str]:
        """Number of killed mutants by what killed them."""
        kinds = (one["by"] for one in self.results.values() if one["verdict"] == "killed")
        return Counter(kind if kind in ("assertion", "time") else "error" for kind in kinds)

    @property
    def survivors(self) -> Results:
        """Those that were tried and not killed."""
        return {k: one for k, one in self.results.items() if one["verdict"] != "killed"}

    @property
    def unexplained(self) -> Results:
        """Survivors without a reason."""
        return {k: one for k, one in self.survivors.items() if k not in self.reasons}

    @property
    def share(self) -> float:
        """Killed, of all."""
        return self.killed.total() / self.total if self.total else 0.0

    @property
    def complete(self) -> bool:
        """Whether every mutant was tried."""
        return 0 < self.total == len(self.results)


def tally(module: str, folder: Path, reasons: Reasons) -> Tally:
    """Count what ``folder``/results.jsonl has for the module as its file is now."""
    source = hashlib.sha256(path_of(module).read_bytes()).hexdigest()[:12]
    results, total = read(folder, module, source)
    return Tally(module, total, results, reasons.get(module, {}))


def read(folder: Path, module: str, source: str) -> tuple[Results, int]:
    """The latest result of every mutant of a module with this text, and how many it has."""
    results: Results = {}
    keys: list[str] = []
    file = folder / "results.jsonl"
    for text in file.read_text().splitlines() if file.exists() else []:
        line = json.loads(text)
        if (line["module"], line["source"]) == (module, source):
            if "keys" in line:
                keys = line["keys"]
            else:
                results[line["key"]] = line
    return {key: results[key] for key in keys if key in results}, len(keys)


def table(tallies: list[Tally]) -> str:
    """Every module and the sum, as Markdown."""
    head = "| module | mutants | killed | by an assertion | an error | time | survivors | share |"
    rows = [head, "| --- |" + " ---: |" * 7]
    for each in tallies:
        rows.append(_row(f"`{each.module}`", each.total, each.killed, len(each.survivors)))
    killed = sum((each.killed for each in tallies), Counter[str]())
    survivors = sum(len(each.survivors) for each in tallies)
    rows.append(_row("all", sum(each.total for each in tallies), killed, survivors))
    return "\n".join(rows)


def _row(name: str, total: int, killed: Counter[str], survivors: int) -> str:
    kinds = " | ".join(str(killed[kind]) for kind in ("assertion", "error", "time"))
    share = f"{killed.total() / total:.1%}" if total else "-"
    return f"| {name} | {total} | {killed.total()} | {kinds} | {survivors} | {share} |"


def document(tallies: list[Tally]) -> str:
    """docs/mutants.md."""
    killed = sum((each.killed for each in tallies), Counter[str]())
    survivors = sum(len(each.survivors) for each in tallies)
    strict = killed["assertion"] / max(1, killed["assertion"] + survivors)
    kinds = Counter(
        each.reasons[key]["kind"]
        for each in tallies
        for key in each.survivors
        if key in each.reasons
    )
    meanings = "\n".join(f"| {kind} | {_KINDS.get(kind, '')} | {n} |" for kind, n in kinds.items())
    parts = [_HEAD, table(tallies), _AFTER.format(strict=strict), meanings]
    for each in tallies:
        if each.survivors:
            parts.append(f"\n## `{each.module}`\n\n| where | mistake | kind | why |")
            parts[-1] += "\n| --- | --- | --- | --- |"
            for key, one in sorted(each.survivors.items(), key=lambda pair: pair[1]["line"]):
                why = each.reasons.get(key, {"kind": "unexplained", "reason": ""})
                where = f"`{key.split()[0]}`"
                cells = (where, f"`` {one['diff']} ``", why["kind"], why["reason"])
                parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def verdict(tallies: list[Tally]) -> list[str]:
    """Reasons why the result is not good enough, in words."""
    wrong = []
    for each in tallies:
        if not each.complete:
            wrong.append(f"{each.module}: {len(each.results)} of {each.total} mutants were tried")
        if each.unexplained:
            wrong.append(f"{each.module}: {len(each.unexplained)} survivors have no reason")
        if stale := sorted(set(each.reasons) - set(each.survivors)) if each.complete else []:
            wrong.append(f"{each.module}: reasons for what is no survivor: {', '.join(stale)}")
    killed, total = sum(t.killed.total() for t in tallies), sum(t.total for t in tallies)
    if killed < LEAST * total:
        wrong.append(f"{killed} of {total} mutants were killed, less than {LEAST:.0%}")
    return wrong


def reasons() -> Reasons:
    """docs/mutants.json."""
    return json.loads(REASONS.read_text()) if REASONS.exists() else {}


_KINDS = {
    "same": "the same number, by algebra or by what torch does with it",
    "speed": "the same numbers, only in more time or memory",
    "search": "how an answer is looked for changes, not the answer: it is checked where it ends",
    "device": "only a GPU would see it",
    "boundary": "differs only where two floating point numbers are exactly equal, or in round-off",
    "message": "only the text or the type of a refusal changes",
    "guard": "what would differ is refused before or after, so no caller can see it",
}

_HEAD = """\
# Which mistakes would the tests not notice?

Made by `make mutants`; reasons are kept in `docs/mutants.json`. Each mutant is a module with one
small mistake: an operator, a number, an argument, a constant or a branch changed as
[mutmut](https://github.com/boxed/mutmut) changes them, or a formula's function swapped (a mean for
a sum, `detach` dropped). It is killed when a test fails. Left alone are docstrings, annotations,
imports, assertions, what is raised and said (not the conditions of refusals), `strict=` of `zip`,
and `device=`, which only a GPU sees. The tests run without the shape checks that they have
otherwise, so the share is a lower bound. A survivor has outlived seconds of its own module's tests
and of all others that reach its line, the quickest first.
"""

_AFTER = """
Many mutants crash at once, which any test notices. Of those that return an answer, {strict:.1%}
were found by an assertion (killed by an assertion, over that plus the survivors). The survivors:

| kind | meaning | survivors |
| --- | --- | ---: |"""
