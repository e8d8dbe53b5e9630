"""Every claim on this machine: a table, ``verification.json``, a report, an exit code.

python -m verification                    every claim, and every mistake that it must reject
python -m verification --full             the slow checks too
python -m verification --claim path-kl    one claim, with all its checks and mistakes
"""

import difflib
import fcntl
import fnmatch
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from verification import document, measuring, record, report, tolerances
from verification.claim import Setting
from verification.claims import CLAIMS
from verification.kernels import MEASURED
from verification.running import Outcome, Rates, run
from verification.statistics import Verdict


@dataclass(frozen=True)
class Options:
    """Check every theorem, and that every check can fail.

    Attributes:
        names: claims to run, or patterns such as "policy-*"; all, if none is given.
        claim: the same, as an option.
        full: the slow checks too (nightly: under 20 minutes).
        output: folder for verification.json and report.html.
        precision: of all tensors. In float32 claims that need float64 are left out, and only the
            right code is run.
        device: cpu or cuda.
        seed: of the sequential tests' random numbers.
        fresh: a new seed instead, which is recorded.
        most: samples that a sequential test may use.
        list: print the claims and stop.
        plant: plant the mistakes too (--no-plant: the right code alone, under another kernel).
        measure: measure the tolerances of these claims anew, under several kernels, and write them
            to the table (all of them: about 10 minutes on 2 cores).
        document: write the outcome to this Markdown file too, its picture and numbers beside it.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    claim: tuple[str, ...] = ()
    full: bool = False
    output: Path = Path("runs/verification")
    precision: Literal["float64", "float32"] = "float64"
    device: str = "cpu"
    seed: int = 0
    fresh: bool = False
    most: int = 2_000_000
    list: bool = False
    plant: bool = True
    measure: bool = False
    document: Path | None = None


class UnknownClaimError(ValueError):
    """No claim has this name, or matches this pattern."""


def chosen(names: Sequence[str]) -> list[str]:
    """The claims that these names and patterns stand for, in the order of the files.

    Raises:
        UnknownClaimError: a name that nothing has; the nearest are suggested.
    """
    if not names:
        return list(CLAIMS)
    matches: set[str] = set()
    for name in names:
        matching = fnmatch.filter(CLAIMS, name)
        if not matching:
            near = difflib.get_close_matches(name, CLAIMS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --list"
            raise UnknownClaimError(f"there is no claim {name!r}: {hint}")
        matches |= set(matching)
    return [name for name in CLAIMS if name in matches]


def main(options: Options) -> int:
    """Run what was asked for; 0 where every claim holds and every mistake is rejected."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        names = chosen([*options.names, *options.claim])
    except UnknownClaimError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    if options.list:
        for name in names:
            console.print(f"{name}  [dim]{CLAIMS[name].source}[/]")
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        console.print("device cuda: this machine has none that torch can use", style="red")
        return 2
    if options.document and options.document.resolve().parent == options.output.resolve():
        console.print(
            f"document {options.document}: its numbers and those of the run would have "
            f"one name; choose another folder than {options.output}",
            style="red",
        )
        return 2
    if options.measure:
        return _measure(names, options, console)
    dtype = getattr(torch, options.precision)
    if dtype == torch.float32:
        names = [name for name in names if CLAIMS[name].single]
    if not names:
        console.print("no claim is left to run: an empty run verifies nothing", style="red")
        return 2
    seed = secrets.randbits(31) if options.fresh else options.seed
    setting = Setting(dtype, torch.device(options.device), options.full, seed)
    lines = tolerances.load().get(options.precision, {})
    false_fail = 1e-8 if options.fresh else 1e-6  # nightly runs add up (see statistics)
    rates = Rates(false_fail=false_fail, most=options.most)
    began = time.perf_counter()
    outcomes = [
        run(
            CLAIMS[name],
            setting,
            lines.get(name, {}),
            rates,
            options.plant and dtype == torch.float64,
        )
        for name in track(names, "claims", console=console, transient=True)
    ]
    recorded = record.of(outcomes, setting, rates, time.perf_counter() - began)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "verification.json").write_text(json.dumps(recorded, indent=1) + "\n")
    page = options.output / "report.html"
    page.write_text(report.page(recorded), encoding="utf-8")
    if options.document is not None:
        document.write(recorded, options.document)
    for outcome in outcomes:
        if len(outcomes) == 1 or not outcome.holds:
            _details(outcome, console)
    console.print(_table(outcomes))
    held = sum(outcome.holds for outcome in outcomes)
    rejected = sum(w.rejected for outcome in outcomes for w in outcome.mistakes)
    variants = sum(len(outcome.mistakes) for outcome in outcomes)
    console.print(
        f"{held} of {len(outcomes)} claims hold, {rejected} of {variants} mistakes rejected, "
        f"{recorded['seconds']:.0f} s. {page}",
        style="green" if held == len(outcomes) else "bold red",
        highlight=False,
    )
    return 0 if held == len(outcomes) else 1


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("claim", no_wrap=True)
    for name in ("checks", "of tolerance", "mistakes", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for outcome in outcomes:
        ratios = [c.deviation / c.tolerance for c in outcome.checks if c.tolerance]
        worst = max(ratios, default=float("nan"))
        rejected = sum(w.rejected for w in outcome.mistakes)
        verdict = "holds" if outcome.holds else outcome.verdict.value
        if outcome.verdict is Verdict.PASS and not outcome.holds:
            verdict = "accepts a mistake"
        table.add_row(
            outcome.claim.name,
            str(len(outcome.checks)),
            f"{worst:.0e}",
            f"{rejected}/{len(outcome.mistakes)}",
            f"{outcome.seconds:.1f}",
            f"[{'green' if outcome.holds else 'bold red'}]{verdict}[/]",
        )
    return table


def _details(outcome: Outcome, console: Console) -> None:
    def line(text: str, good: bool) -> None:
        console.print(text, style=None if good else "red", markup=False, highlight=False)

    line(f"{outcome.claim.name}  ({outcome.claim.source})", True)
    line(outcome.claim.statement, True)
    for check in outcome.checks:
        limit = "none" if check.tolerance is None else f"{check.tolerance:.1e}"
        more = f"; about {check.needed} samples would decide" if check.needed else ""
        text = f"  {check.verdict.value}: {check.name}: {check.deviation:.1e}, tolerance {limit}"
        line(f"{text} {check.note}{more}".rstrip(), check.verdict is Verdict.PASS)
    for rejection in outcome.mistakes:
        how = rejection.note
        if rejection.by:
            deviation = rejection.deviations[rejection.by]
            how = f"{deviation:.1e} by {rejection.by!r} {rejection.note}".rstrip()
        line(
            f"  {'rejected' if rejection.rejected else 'ACCEPTED'}: {rejection.name}: {how}",
            rejection.rejected,
        )
    if outcome.error:
        line(outcome.error, False)


def _measure(names: Sequence[str], options: Options, console: Console) -> int:
    """Measure right code and mistakes, write the table; 1 if float64 has complaints."""

    def told(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    began = time.perf_counter()
    seen = measuring.over_kernels(names, MEASURED, told)
    bad = 0
    for precision, claims in seen.items():
        for name, observation in claims.items():
            single = seen["float32"].get(name) if precision == "float64" else None
            lines, complaints = measuring.lines(CLAIMS[name], observation, single)
            with Path(f"{tolerances.TABLE}.lock").open("w") as lock:  # others may measure too
                fcntl.flock(lock, fcntl.LOCK_EX)
                table = tolerances.load()
                table.setdefault(precision, {})[name] = lines
                tolerances.save(table)
            for complaint in complaints:
                told(f"{precision} {name}: {complaint}")
                bad += precision == "float64"
    told(f"{len(names)} claims measured in {time.perf_counter() - began:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
