"""How many network calls until DDPO's final reward, and what each part of the difference gives.

The baseline is DDPO-IS on the embedded image model: 10 steps of DDIM with eta 1, every step
trained, as its paper has it. Its learning rate is the better of two *in hindsight*, on the seeds
that are reported (0.001 ends at a gain of 0.02 on one seed, 0.03 collapses); the other rows have
sweeps on a seed of their own, and a third of the baseline's calls (``fraction``). Each changes
one thing against the row that its name goes on from.

All are evaluated on held-out samples of the 10-step sampler, whatever they were trained on. A row's
cost is the number of network calls at which its mean reward over seeds, between two evaluations in
a straight line, passes the mean that the baseline ends with.

    python -m benchmarks.calls_to_reward

Single runs are stored in ``runs`` and not repeated.
"""

import csv
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.compared_methods import Budget, Entry, Runs, TinyProblem, swept
from diffusion_envs import objectives as o
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.samplers import Scheduler

DOCS = Path(__file__).parent.parent / "docs"
BASELINE = "DDPO-IS"


def _ours(kl_weight: float, denoised: bool = True) -> o.Objective:
    """Values from denoised images; or from final rewards alone, and then advantages are returns."""
    rate = o.ScoreAsAction.gae_rate if denoised else 0.0
    return o.ScoreAsAction(kl_weight=kl_weight, clip=1.0, denoised=denoised, gae_rate=rate)


def ladder(steps: int) -> dict[str, Entry]:
    """The rows, where the evaluation takes so many steps; half as many are few."""
    few = max(1, steps // 2)
    half = (("train_steps", few),)
    accurate = Scheduler("DPMSolverMultistepScheduler")
    return {
        BASELINE: Entry(lambda b: o.DDPO()),
        f"{BASELINE}, {few} steps": Entry(lambda b: o.DDPO(), steps=few),
        "score-as-action, final rewards": Entry(partial(_ours, denoised=False)),
        "score-as-action": Entry(_ours),
        "score-as-action, half of the steps trained": Entry(_ours, size=half),
        f"score-as-action, {few} steps": Entry(_ours, steps=few),
        f"DiffusionNFT, {few} steps of DPM-Solver++": Entry(
            lambda b: o.DiffusionNFT(), sampler=accurate, steps=few
        ),
    }


@dataclass(frozen=True)
class Options:
    """Network calls until DDPO's final reward.

    Attributes:
        calls: of the baseline.
        fraction: of it, for all others.
        samples: an update.
        steps: of the baseline's and of the evaluation's sampler.
        every: updates, between two evaluations.
        baseline_every: of the baseline's, whose runs are longer.
        seeds: that are reported.
        sweep_seeds: of the learning rates' sweep.
        learning_rates: that the sweep begins with.
        baseline_rates: that the baseline is run with.
        rows: of the ladder, by name; all, if none is given.
        runs: folder of the single runs.
        output: folder of the results.
    """

    calls: int = 36_000
    fraction: float = 1 / 3
    samples: int = 40
    steps: int = 10
    every: int = 4
    baseline_every: int = 9
    seeds: int = 5
    sweep_seeds: int = 1
    learning_rates: tuple[float, ...] = (1e-2,)
    baseline_rates: tuple[float, ...] = (3e-3, 1e-2)
    rows: tuple[str, ...] = ()
    runs: Path = Path("runs") / "leaderboard"
    output: Path = DOCS

    def budget(self, name: str) -> Budget:
        """Budget of a row of the ladder."""
        if name == BASELINE:
            return Budget(10**9, self.calls, self.samples, self.steps, self.baseline_every)
        calls = round(self.calls * self.fraction)
        return Budget(10**9, calls, self.samples, self.steps, self.every)


def gain(result: dict[str, Any], at: int = -1, key: str = "reward") -> float:
    """Over the pretrained model, at an evaluation; minus infinity, if there is none."""
    if not result["curve"]:
        return -math.inf
    return result["curve"][at][key] - result["start"][key]


def mean_curve(runs: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(calls, mean gain in reward) at every evaluation that all seeds have, from (0, 0)."""
    length = min(len(one["curve"]) for one in runs)
    return [(0.0, 0.0)] + [
        (
            statistics.fmean(one["curve"][k]["calls"] for one in runs),
            statistics.fmean(gain(one, k) for one in runs),
        )
        for k in range(length)
    ]


def calls_until(curve: Sequence[tuple[float, float]], target: float) -> float:
    """First crossing of the target by a piecewise linear curve; infinity if there is none."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 >= target:
            return x1 if y1 == y0 else x0 + (x1 - x0) * max(0.0, (target - y0) / (y1 - y0))
    return math.inf


def main(options: Options) -> None:
    """Run what is missing; then write the table, the CSV and the picture."""
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    store = Runs(options.runs / "calls_to_reward.jsonl", console.print)
    problem = TinyProblem()
    entries = ladder(options.steps)
    chosen = options.rows or tuple(entries)
    if unknown := set(chosen) - set(entries):
        raise SystemExit(f"unknown rows {sorted(unknown)}; there are {', '.join(entries)}")
    results: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    reported, sweep = range(options.seeds), range(100, 100 + options.sweep_seeds)
    for name in chosen:
        get = partial(store.get, name, entries[name], problem, options.budget(name))

        def score(
            rate: float,
            get: Callable[..., Any] = get,
            seeds: range = reported if name == BASELINE else sweep,
        ) -> float:
            return statistics.fmean(gain(get(rate, seed)) for seed in seeds)

        if name == BASELINE:
            rate = max(options.baseline_rates, key=score)
        else:
            rate = swept(score, options.learning_rates)
        results[name] = rate, [one for seed in reported if (one := get(rate, seed))["curve"]]
    if BASELINE in results:
        _write(results, options, console)


def _row(runs: Sequence[dict[str, Any]], rate: float, target: float) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> tuple[float, float]:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return statistics.fmean(values), std / math.sqrt(len(values))

    last = [one["curve"][-1] for one in runs]
    until = calls_until(mean_curve(runs), target)
    return {
        "rate": rate,
        "seeds": len(runs),
        "gain": mean([gain(one) for one in runs]),
        "held_out_gain": mean([gain(one, key="held_out") for one in runs]),
        "path_kl": mean([p["path_kl"] for p in last]),
        "calls": statistics.fmean(p["calls"] for p in last),
        "queries": statistics.fmean(p["queries"] for p in last),
        "seconds": statistics.fmean(p["seconds"] for p in last),
        "calls_to_target": until if math.isfinite(until) else None,
    }


def _write(
    ladder: dict[str, tuple[float, list[dict[str, Any]]]], options: Options, console: Console
) -> None:
    target = statistics.fmean(gain(one) for one in ladder[BASELINE][1])
    rows = {name: _row(runs, rate, target) for name, (rate, runs) in ladder.items()}
    spent = rows[BASELINE]["calls"]
    shown = Table(box=None, header_style="dim")
    shown.add_column("method", no_wrap=True)
    for name in ("gain", "held out", "path KL", "calls", "queries", "to target", "ratio", "rate"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        reached = row["calls_to_target"]
        row["ratio"] = None if reached is None else spent / reached
        shown.add_row(
            name,
            *(f"{row[k][0]:.3f}({row[k][1]:.3f})" for k in ("gain", "held_out_gain")),
            f"{row['path_kl'][0]:.1f}",
            *(f"{row[k]:,.0f}" for k in ("calls", "queries")),
            *(("-", "-") if reached is None else (f"{reached:,.0f}", f"{row['ratio']:.1f}")),
            f"{row['rate']:g}",
        )
    console.print(shown)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "calls_to_reward.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "calls", "queries", "gain", "held-out gain", "path KL"])
        for name, (_, runs) in ladder.items():
            for one in runs:
                for k, p in enumerate(one["curve"]):
                    gains = (f"{gain(one, k, key):.5g}" for key in ("reward", "held_out"))
                    cost = [p["calls"], p["queries"]]
                    writer.writerow([name, one["seed"], *cost, *gains, f"{p['path_kl']:.5g}"])
    record = {
        "options": dataclasses.asdict(options) | {"runs": "", "output": ""},
        "versions": versions(),
        "target": target,
        "rows": rows,
    }
    path = options.output / "calls_to_reward.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, (_, runs) in ladder.items():
        x, y = zip(*mean_curve(runs), strict=True)
        axes.plot(x, y, label=name, linewidth=1.6, color="black" if name == BASELINE else None)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="network calls", ylabel="gain in held-out samples' reward")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(options.output / "calls_to_reward.png", dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
