"""All methods on one loop, with equal reward queries: what they reach, and what it costs.

Every method starts from the same pretrained model, gets the same adapter, optimiser and number of
reward queries, and is evaluated on the same sampler; it trains on that sampler too, unless it
learns from data and does better with another (``benchmarks.compared_methods``). Its learning rate
falls linearly to 0 with the queries that are spent; where it begins is chosen by a sweep on seeds
of its own, which widens until its best lies inside, and in which a run that falls far below the
pretrained model on its way counts as that; then the method is run on the seeds that are reported.
On problems whose optimum is known (``diffusion_envs.exact``) what is reported is exact, not
sampled: the policy is evaluated on the chain of the evaluation's sampler,

    share    (J - J_pretrained) / (J_optimum - J_pretrained),  J = E[reward] - kl_weight path KL
    KL       of the generated law from the optimum's, nats

at the end, and at the best moment of the run (what a perfect stop rule would have kept). Costs are
counted in reward queries, network calls and seconds.

    python -m benchmarks.leaderboard --problem gaussian
    python -m benchmarks.leaderboard --problem mixture --methods score-as-action ddpo

On images, where the optimum is bounded and not known: ``benchmarks.image_leaderboard``.

Runs are appended to a JSON-lines file in ``runs`` and not repeated; the table, CSV and pictures are
made anew from all of it.
"""

import csv
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.compared_methods import (
    PROBLEMS,
    Budget,
    Entry,
    MissingRunError,
    Runs,
    methods,
    swept,
    swept_score,
)
from diffusion_envs.runs.run_folder import versions

DOCS = Path(__file__).parent.parent / "docs"
UNSAID = ("problem", "methods", "runs", "output")  # that change no number of the table


@dataclass(frozen=True)
class Options:
    """Compare methods at equal reward queries.

    Attributes:
        problem: gaussian (two dimensions, quadratic reward) or mixture (scalar, cosine reward).
        methods: some of them; all, if none is given.
        queries: of the reward, for every run.
        calls: of the network, for every run; whichever ends first.
        every: updates, between two evaluations.
        samples: an update.
        steps: of the sampler.
        seeds: that are reported.
        sweep_seeds: of the learning rates' sweep.
        learning_rates: that the sweep begins with; from 1, 3, 10, 30, ...
        runs: folder of the single runs.
        output: folder of the results.
    """

    problem: Literal["gaussian", "mixture"] = "gaussian"
    methods: tuple[str, ...] = ()
    queries: int = 12_800
    calls: int = 10**9
    every: int = 4
    samples: int = 64
    steps: int = 20
    seeds: int = 5
    sweep_seeds: int = 2
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    runs: Path = Path("runs") / "leaderboard"
    output: Path = DOCS

    @property
    def budget(self) -> Budget:
        """Budget of every run."""
        return Budget(self.queries, self.calls, self.samples, self.steps, self.every)


def summary(name: str, entry: Entry, runs: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Means over seeds, with standard errors."""
    last = [one["curve"][-1] for one in runs]
    best = [max(point["share"] for point in one["curve"]) for one in runs]

    def mean(values: Sequence[float]) -> tuple[float, float]:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return statistics.fmean(values), std / math.sqrt(len(values))

    return {
        "method": name,
        "aims": entry.aims,
        "rate": rate,
        "seeds": len(runs),
        "diverged": sum(one["diverged"] for one in runs),
        "share": mean([p["share"] for p in last]),
        "best": mean(best),
        "kl": mean([p["kl_to_optimum"] for p in last]),
        "path_kl": mean([p["path_kl"] for p in last]),
        "queries": statistics.fmean(p["queries"] for p in last),
        "calls": statistics.fmean(p["calls"] for p in last),
        "seconds": statistics.fmean(p["seconds"] for p in last),
        "queries_to_90": _first(runs, "queries", 0.9),
        "calls_to_90": _first(runs, "calls", 0.9),
    }


def _first(runs: Sequence[dict[str, Any]], measure: str, share: float) -> float | None:
    """Median over seeds of what it cost until 90 % of the gap were closed; None if not in most."""
    costs = []
    for one in runs:
        reached = [p[measure] for p in one["curve"] if p["share"] >= share]
        costs.append(reached[0] if reached else math.inf)
    middle = statistics.median(costs)
    return middle if math.isfinite(middle) else None


def main(options: Options) -> None:
    """Run what is missing; then write the table, the CSV and the pictures."""
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    entries = methods()
    unknown = set(options.methods) - set(entries)
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}; there are {', '.join(entries)}")
    chosen = options.methods or tuple(entries)
    problem = PROBLEMS[options.problem]()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.runs / f"{options.problem}.jsonl", console.print)
    sweep_seeds = range(100, 100 + options.sweep_seeds)
    rows: list[dict[str, Any]] = []
    used: dict[str, list[dict[str, Any]]] = {}
    for name, entry in entries.items():
        need = partial(runs.get, name, entry, problem, options.budget, make=name in chosen)

        def score(rate: float, need: Callable[..., Any] = need) -> float:
            return statistics.fmean(swept_score(need(rate, s)) for s in sweep_seeds)

        try:
            rate = swept(score, options.learning_rates)
            reported = [need(rate, seed) for seed in range(options.seeds)]
        except MissingRunError:  # of a method that was not asked for: its row needs all of them
            continue
        used[name] = [one for one in reported if one["curve"]]
        if used[name]:
            rows.append(summary(name, entry, used[name], rate))
    rows.sort(key=lambda row: -row["share"][0])
    _write(rows, used, options, console)


def _write(
    rows: Sequence[dict[str, Any]],
    used: Mapping[str, Sequence[dict[str, Any]]],
    options: Options,
    console: Console,
) -> None:
    with (options.output / f"leaderboard_{options.problem}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        keys = ("share", "best", "kl", "path_kl")
        writer.writerow(
            ["method", "aims at the optimum", "learning rate", "seeds"]
            + [f"{key} {what}" for key in keys for what in ("mean", "standard error")]
            + ["queries", "calls", "seconds", "queries to 90 %", "calls to 90 %"]
        )
        for row in rows:
            writer.writerow(
                [row["method"], row["aims"], row["rate"], row["seeds"]]
                + [f"{value:.6g}" for key in keys for value in row[key]]
                + [f"{row[key]:.6g}" for key in ("queries", "calls", "seconds")]
                + [row["queries_to_90"], row["calls_to_90"]]
            )
    table_ = Table(box=None, header_style="dim")
    table_.add_column("method", no_wrap=True)
    for name in ("J share", "best", "KL to optimum", "path KL", "calls", "to 90 %", "s", "rate"):
        table_.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table_.add_row(
            row["method"] + ("" if row["aims"] else " *"),
            *(f"{row[k][0]:.4f}({row[k][1]:.4f})" for k in ("share", "best")),
            *(f"{row[k][0]:.3f}" for k in ("kl", "path_kl")),
            f"{row['calls']:.3g}",
            "-" if row["calls_to_90"] is None else f"{row['calls_to_90']:.3g}",
            f"{row['seconds']:.1f}",
            f"{row['rate']:g}",
        )
    console.print(table_)
    (options.output / f"leaderboard_{options.problem}.md").write_text(markdown(rows, options))
    _picture(rows, used, options)
    record = {
        "options": dataclasses.asdict(options) | {"runs": "", "output": ""},
        "versions": versions(),
    }
    record["rows"] = rows
    path = options.output / f"leaderboard_{options.problem}.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")


ABOUT = {
    "gaussian": "Gaussian data in two dimensions, quadratic reward, an affine adapter",
    "mixture": "a mixture of Gaussians on a line, cosine reward, a small network",
}


def _in_brackets(pair: tuple[float, float]) -> str:
    """0.9916(7): the standard error in units of the last digit."""
    mean, error = pair
    if not (math.isfinite(mean) and math.isfinite(error)):
        return "-"
    digits = 4 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f}({round(error * 10**digits)})"


def markdown(rows: Sequence[dict[str, Any]], options: Options) -> str:
    """The table, as a page."""
    command = f"python -m benchmarks.leaderboard --problem {options.problem}"
    fields = [field for field in dataclasses.fields(options) if field.name not in UNSAID]
    for field in fields:
        value = getattr(options, field.name)
        if value != field.default:
            shown = " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
            command += f" --{field.name.replace('_', '-')} {shown}"
    lines = [
        f"# Leaderboard: {options.problem}",
        "",
        f"Problem: {ABOUT[options.problem]}; kl_weight {PROBLEMS[options.problem]().kl_weight:g}. "
        "Evaluated on DDIM with eta "
        f"1 and {options.steps} steps; {options.samples} samples an update where the method has no",
        f"need of its own; at most {options.queries:,} reward queries; "
        f"{max(row['seeds'] for row in rows)} seeds, standard error of the mean in brackets; "
        "starred: not aimed at the optimum.",
        "Written by",
        "",
        f"    {command}",
        "",
        "| method | share of the gap in J | best moment | KL to the optimum's law | path KL "
        "| reward queries | network calls | queries, calls until 90 % | learning rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        until = (row["queries_to_90"], row["calls_to_90"])
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        both = "-" if until[0] is None else f"{until[0]:,.0f}, {until[1]:,.0f}"
        cells = [
            row["method"] + ("" if row["aims"] else " *") + diverged,
            *(_in_brackets(row[key]) for key in ("share", "best")),
            *(f"{row[key][0]:.3f}" for key in ("kl", "path_kl")),
            *(f"{row[key]:,.0f}" for key in ("queries", "calls")),
            both,
            f"{row['rate']:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    picture = f"leaderboard_{options.problem}.png"
    lines += ["", f"![share of the gap against queries, calls and seconds]({picture})", ""]
    return "\n".join(lines)


def _picture(
    rows: Sequence[dict[str, Any]],
    used: Mapping[str, Sequence[dict[str, Any]]],
    options: Options,
) -> None:
    """Share of the gap against each measure, the median run of each method."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, measure in zip(
        figure.subplots(1, 3, sharey=True), ("queries", "calls", "seconds"), strict=True
    ):
        for k, row in enumerate(rows):
            picked = used[row["method"]]
            length = min(len(one["curve"]) for one in picked)
            x = [
                statistics.fmean(one["curve"][i][measure] for one in picked) for i in range(length)
            ]
            y = [
                statistics.median(one["curve"][i]["share"] for one in picked) for i in range(length)
            ]
            style = "-" if row["aims"] else ":"
            axes.plot(x, y, style, color=f"C{k % 10}", label=row["method"], linewidth=1.4)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xlabel=measure, xscale="log", ylim=(-0.2, 1.05))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share of the gap in J that is closed")
    figure.axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(options.output / f"leaderboard_{options.problem}.png", dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
