"""All methods on one loop, with equal reward queries: what they reach, and what it costs.

On problems whose optimum is known exactly (``diffusion_envs.exact``) every method starts from the
same pretrained model and gets the same sampler, adapter, optimiser and number of reward queries.
Its learning rate falls linearly to 0 with the queries that are spent; where it begins is chosen by
a sweep on seeds of its own, then the method is run on the seeds that are reported. What is reported
is exact, not sampled: the policy is judged on the sampler's own chain,

    share    (J - J_pretrained) / (J_optimum - J_pretrained),  J = E[reward] - kl_weight path KL
    KL       of the generated law from the optimum's, nats

at the end, and at the best moment of the run (what a perfect stop rule would have kept). Costs are
counted in reward queries, network calls and seconds.

    python -m benchmarks.leaderboard --problem gaussian
    python -m benchmarks.leaderboard --problem mixture --methods score-as-action ddpo-is
    python -m benchmarks.leaderboard --problem tiny --calls 40000 --samples 40 --steps 10

The tiny image model has no known optimum: there ``share`` is the gain in J itself, from 100
held-out samples with the same seeds as the pretrained model's.

Runs are appended to a JSON-lines file and not repeated; the table, CSV and pictures are made anew
from all of it.
"""

import csv
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from diffusion_envs import objectives as o
from diffusion_envs import rewards
from diffusion_envs.exact import GaussianProblem, MixtureProblem, Outcome, Problem, table
from diffusion_envs.samplers import DDIM, BoundDDIM
from diffusion_envs.sd15.__main__ import CLASS_PROMPTS
from diffusion_envs.sd15.build import ATTENTION, build
from diffusion_envs.training.evaluation import evaluate
from diffusion_envs.training.loop import NonFiniteError, Schedule, Trainer
from diffusion_envs.training.run_folder import versions

DOCS = Path(__file__).parent.parent / "docs"


@dataclass
class TinyProblem:
    """The embedded image model and the reward of its demonstration; judged on held-out seeds."""

    kl_weight: float = 0.01
    samples: int = 100
    _environment: Any = None

    def environment(self, sampler: BoundDDIM, seed: int) -> Any:
        """A fresh adapter on the embedded model."""
        built = build(
            model="tiny",
            reward=rewards.PromptAlignment("reward"),
            prompts=CLASS_PROMPTS,
            sampler=DDIM(sampler.eta),
            steps=sampler.steps,
            guidance=1.0,
            batch=64,
            lora_rank=8,
            lora_targets=ATTENTION,
            precision="float32",
            resolution=None,
            device=torch.device("cpu"),
            seed=seed,
        )
        self._environment = built.environment
        return built.environment, built.parameters

    def evaluate(self, score: Any, sampler: BoundDDIM) -> Outcome:
        """Means over held-out samples."""
        found = evaluate(self._environment, self.samples, batch=50)
        reward, nats = float(found.rewards.mean()), float(found.path_kl.mean())
        return Outcome(reward, nats, reward - self.kl_weight * nats, math.nan)

    def optimum(self, sampler: BoundDDIM) -> Outcome:
        """Unknown: one unit of J above the pretrained model, so that shares are gains."""
        with self._environment.score.pretrained():
            start = self.evaluate(None, sampler)
        return dataclasses.replace(start, objective=start.objective + 1)


PROBLEMS: dict[str, Any] = {
    "gaussian": GaussianProblem,
    "mixture": MixtureProblem,
    "tiny": TinyProblem,
}


@dataclass(frozen=True)
class Entry:
    """A method as it takes part.

    Attributes:
        objective: kl_weight -> the objective; where it has no KL term, that is part of the method.
        schedule: what differs from the common schedule.
        aims: whether it should reach the KL-regularised optimum.
    """

    objective: Any
    schedule: tuple[tuple[str, Any], ...] = ()
    aims: bool = True


def methods() -> dict[str, Entry]:
    """Every method, with the settings that do not follow from the problem."""
    return {
        # continuous time
        "score-as-action": Entry(lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0, denoised=False)),
        "score-as-action (r(x0) in V)": Entry(
            lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0, denoised=True)
        ),
        "score-as-action (drawn)": Entry(
            lambda b: o.ScoreAsActionSampled(kl_weight=b, clip=1.0, denoised=False)
        ),
        "score-as-action (released)": Entry(
            lambda b: o.ScoreAsActionReleased(clip_per_pixel=0.1), aims=False
        ),
        # policy gradients in discrete time
        "ddpo": Entry(lambda b: o.DDPO(), aims=False),
        "ddpo-sf": Entry(lambda b: o.DDPOScoreFunction(), aims=False),
        "dpok": Entry(lambda b: o.DPOK(reward_weight=1.0, kl_weight=b), aims=False),
        "dpok (exact KL)": Entry(lambda b: o.DPOK(reward_weight=1.0, kl_weight=b, exact_kl=True)),
        "grpo": Entry(lambda b: o.GRPO(kl_weight=b), aims=False),  # in units of the reward's spread
        "tdpo": Entry(lambda b: o.TDPO(), aims=False),
        "tdpo-r": Entry(lambda b: o.TDPOReset(), aims=False),
        # preferences
        "d3po": Entry(lambda b: o.D3PO(), aims=False),
        "dense-reward": Entry(lambda b: o.DenseReward(members=4), aims=False),
        # the reward's derivative
        "refl": Entry(lambda b: o.ReFL(enough=10.0, scale=1.0), aims=False),
        "draft-1": Entry(lambda b: o.DRaFT(last=1), aims=False),
        "draft (all steps, KL)": Entry(lambda b: o.DRaFT(last=1000, kl_weight=b)),
        "align-prop": Entry(lambda b: o.AlignProp(target=3.0, scale=1.0), aims=False),
        "adjoint-matching": Entry(lambda b: o.AdjointMatching(kl_weight=b), aims=False),  # chain KL
        "adjoint-matching (path KL)": Entry(lambda b: o.AdjointMatching(kl_weight=b, path_kl=True)),
        # a value's derivative
        "dxmi": Entry(lambda b: o.DxMI(), aims=False),
        "dxmi-continuous": Entry(lambda b: o.ContinuousDxMI(), aims=False),
        # data
        "nft": Entry(lambda b: o.DiffusionNFT(), aims=False),
        "ram": Entry(lambda b: o.ReinforceAdjointMatching(kl_weight=b), aims=False),
        "distributional": Entry(lambda b: o.DistributionalOptimisation(kl_weight=b)),
        "ram (path cost)": Entry(lambda b: o.ReinforceAdjointMatching(kl_weight=b, path_cost=True)),
    }


@dataclass(frozen=True)
class Options:
    """Compare methods at equal reward queries.

    Attributes:
        problem: gaussian (two dimensions, quadratic reward), mixture (scalar, cosine reward) or
            tiny (the embedded image model).
        methods: some of them; all, if none is given.
        queries: of the reward, for every run.
        calls: of the network, for every run; whichever ends first.
        every: updates, between two judgements.
        samples: an update.
        steps: of the sampler.
        seeds: that are reported.
        sweep_seeds: of the learning rates' sweep.
        learning_rates: of the sweep.
        output: folder of the results.
    """

    problem: Literal["gaussian", "mixture", "tiny"] = "gaussian"
    methods: tuple[str, ...] = ()
    queries: int = 12_800
    calls: int = 10**9
    every: int = 4
    samples: int = 64
    steps: int = 20
    seeds: int = 5
    sweep_seeds: int = 2
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    output: Path = DOCS


def run(name: str, entry: Entry, problem: Problem, options: Options, rate: float, seed: int) -> Any:
    """One run: the curve of exact outcomes, and what it cost.

    A run that diverges (a gradient that is not finite) ends there; its last outcome stands.
    """
    sampler = DDIM(eta=1.0).bind(table(), options.steps)
    environment, parameters = problem.environment(sampler, seed)
    sampler = environment.sampler
    assert isinstance(sampler, BoundDDIM)
    batch = 64 if options.problem == "tiny" else 1_000_000
    schedule = Schedule(
        samples=options.samples, batch=batch, weight_decay=0.0, **dict(entry.schedule)
    )
    objective = dataclasses.replace(entry.objective(problem.kl_weight), learning_rate=rate)
    trainer = Trainer(
        environment, objective, schedule, parameters, accelerator=Accelerator(cpu=True)
    )
    score: Any = environment.score
    best, start = problem.optimum(sampler), problem.evaluate(score, sampler)
    gap = best.objective - start.objective
    curve: list[dict[str, float]] = []
    began, judged = time.perf_counter(), 0.0
    while (left := _left(environment, options)) > 0:
        for group in trainer.optimiser.param_groups:
            group["lr"] = rate * left
        try:
            trainer.step()
        except NonFiniteError:
            break
        now = time.perf_counter()
        if trainer.update % options.every == 0 or _left(environment, options) <= 0:
            outcome = problem.evaluate(score, sampler)
            judged += time.perf_counter() - now
            curve.append(
                {
                    "queries": environment.reward_queries,
                    "calls": environment.score.calls,
                    "seconds": time.perf_counter() - began - judged,
                    "share": (outcome.objective - start.objective) / gap,
                    "reward": outcome.reward,
                    "path_kl": outcome.path_kl,
                    "kl": outcome.kl_to_optimum,
                }
            )
    return {
        "problem": options.problem,
        "method": name,
        "rate": rate,
        "seed": seed,
        "queries": options.queries,
        "calls": options.calls,
        "samples": options.samples,
        "steps": options.steps,
        "updates": trainer.update,
        "curve": curve,
        "optimum": dataclasses.asdict(best),
        "start": dataclasses.asdict(start),
    }


def _left(environment: Any, options: Options) -> float:
    """Share of the budget that is left."""
    queries = environment.reward_queries / options.queries
    return 1 - max(queries, environment.score.calls / options.calls)


# -- what is kept ---------------------------------------------------------------------------------


def _final(found: dict[str, Any]) -> float:
    share = found["curve"][-1]["share"] if found["curve"] else -math.inf
    return share if math.isfinite(share) else -math.inf


def _of(runs: Sequence[dict[str, Any]], name: str, rate: float, seed: int, options: Options) -> Any:
    wanted = {
        "method": name,
        "rate": rate,
        "seed": seed,
        "queries": options.queries,
        "calls": options.calls,
        "samples": options.samples,
        "steps": options.steps,
    }
    for one in runs:
        if all(one[key] == value for key, value in wanted.items()):
            return one
    return None


def summary(name: str, entry: Entry, runs: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Means over seeds, with standard errors."""
    last = [one["curve"][-1] for one in runs]
    best = [max(point["share"] for point in one["curve"]) for one in runs]

    def mean(values: Sequence[float]) -> tuple[float, float]:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return statistics.fmean(values), spread / math.sqrt(len(values))

    return {
        "method": name,
        "aims": entry.aims,
        "rate": rate,
        "seeds": len(runs),
        "share": mean([p["share"] for p in last]),
        "best": mean(best),
        "kl": mean([p["kl"] for p in last]),
        "path_kl": mean([p["path_kl"] for p in last]),
        "queries": statistics.fmean(p["queries"] for p in last),
        "calls": statistics.fmean(p["calls"] for p in last),
        "seconds": statistics.fmean(p["seconds"] for p in last),
        "queries_to_90": _first(runs, "queries", 0.9),
        "calls_to_90": _first(runs, "calls", 0.9),
    }


def _first(runs: Sequence[dict[str, Any]], currency: str, share: float) -> float | None:
    """Median over seeds of what it cost until 90 % of the gap were closed; None if not in most."""
    costs = []
    for one in runs:
        reached = [p[currency] for p in one["curve"] if p["share"] >= share]
        costs.append(reached[0] if reached else math.inf)
    middle = statistics.median(costs)
    return middle if math.isfinite(middle) else None


def main(options: Options) -> None:
    """Run what is missing; then write the table, the CSV and the pictures."""
    torch.set_num_threads(1)
    console = Console()
    entries = methods()
    unknown = set(options.methods) - set(entries)
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}; there are {', '.join(entries)}")
    chosen = options.methods or tuple(entries)
    problem: Problem = PROBLEMS[options.problem]()
    options.output.mkdir(parents=True, exist_ok=True)
    stored = options.output / f"leaderboard_{options.problem}.jsonl"
    runs = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []

    def need(name: str, rate: float, seed: int) -> dict[str, Any]:
        found = _of(runs, name, rate, seed, options)
        if found is None:
            found = run(name, entries[name], problem, options, rate, seed)
            runs.append(found)
            with stored.open("a") as file:
                file.write(json.dumps(found) + "\n")
            console.print(f"{name}  rate {rate:g}  seed {seed}  share {_final(found):.4f}")
        return found

    swept_on = range(100, 100 + options.sweep_seeds)
    rows = []
    for name in entries:
        if name not in chosen and not any(one["method"] == name for one in runs):
            continue
        swept = {
            rate: statistics.fmean(max(_final(need(name, rate, s)), -10.0) for s in swept_on)
            for rate in options.learning_rates
        }
        rate = max(swept, key=lambda r: swept[r])
        reported = [need(name, rate, seed) for seed in range(options.seeds)]
        rows.append(summary(name, entries[name], [r for r in reported if r["curve"]], rate))
    rows = [row for row in rows if row["seeds"]]
    rows.sort(key=lambda row: -row["share"][0])
    _write(rows, runs, problem, options, console)


def _write(
    rows: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
    problem: Problem,
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
    _picture(rows, runs, options)
    record = {"options": dataclasses.asdict(options) | {"output": ""}, "versions": versions()}
    record["rows"] = rows
    path = options.output / f"leaderboard_{options.problem}.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")


def _picture(
    rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], options: Options
) -> None:
    """Share of the gap against each currency, the median run of each method."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, currency in zip(
        figure.subplots(1, 3, sharey=True), ("queries", "calls", "seconds"), strict=True
    ):
        for k, row in enumerate(rows):
            picked = [
                one
                for one in runs
                if one["method"] == row["method"]
                and one["rate"] == row["rate"]
                and one["seed"] < options.seeds
                and one["queries"] == options.queries
                and one["curve"]
            ]
            if not picked:
                continue
            length = min(len(one["curve"]) for one in picked)
            x = [
                statistics.fmean(one["curve"][i][currency] for one in picked) for i in range(length)
            ]
            y = [
                statistics.median(one["curve"][i]["share"] for one in picked) for i in range(length)
            ]
            style = "-" if row["aims"] else ":"
            axes.plot(x, y, style, color=f"C{k % 10}", label=row["method"], linewidth=1.4)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xlabel=currency, xscale="log", ylim=(-0.2, 1.05))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share of the gap in J that is closed")
    figure.axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(options.output / f"leaderboard_{options.problem}.png", dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
