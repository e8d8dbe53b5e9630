"""Trained at one number of steps, evaluated exactly at others and with other solvers.

Every method trains on DDIM with eta = 1 and ``train_steps`` steps, with equal reward queries, as in
``benchmarks.leaderboard``. The same adapter is then evaluated, without a random number, on the law
that it generates (``benchmarks.exact_laws``):

    DDIM, eta = 1 and eta = 0     10, 25, 50 and 100 steps
    DPM-Solver++(2M), UniPC, Heun 10 and 25 steps

What a law is worth is its KL from the target, the law proportional to data exp(reward / kl_weight);
    share   (KL of the pretrained model's law - KL) / (the same - KL of the optimum's law),
all on the solver in question, so that its own error is not held against the policy. The optimum is
that of continuous time, the exact score of the noised target. On chains with noise there is also
    share of J    (J - J_pretrained) / (J_optimum - J_pretrained),  J = E[reward] - kl_weight path
                  KL, the optimum that of the chain itself.
What is lost by transfer is a share's difference from that of the solver of training.

    python -m benchmarks.transfer
    python -m benchmarks.transfer --problems gaussian mixture

Runs are appended to a JSON-lines file, with their weights and outcomes, and not repeated; table,
CSV and picture are made anew from all of it.
"""

import csv
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import compared_methods, exact_laws
from benchmarks.compared_methods import Entry
from benchmarks.exact_laws import ExactOutcome
from diffusion_envs import objectives as o
from diffusion_envs.exact import CorrectedScore, GaussianProblem, MixtureProblem, table
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.samplers import DDIM, BoundBlackBox, BoundDDIM, Scheduler
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROBLEMS = {"gaussian": GaussianProblem, "mixture": MixtureProblem}
TRAINED_ON = "DDIM eta 1"
METHODS = (
    "score-as-action",
    "score-as-action (drawn)",
    "ddpo",
    "dpok (exact KL)",
    "grpo",
    "adjoint-matching (path KL)",
    "draft (all steps, KL)",
    "ram (path cost)",
    "distributional",
    "nft",
)
MIXTURE_METHODS = (
    "score-as-action",
    "ddpo",
    "grpo",
    "adjoint-matching (path KL)",
    "ram (path cost)",
    "distributional",
)
FEW_STEP_METHODS = ("score-as-action", "grpo", "adjoint-matching (path KL)")
# of the leaderboard's sweep and of short ones, kept here: the reported runs do not follow it
RATES = {
    "gaussian": {"ddpo": 0.001, "nft": 0.003, "distributional": 0.01},
    "mixture": {"ddpo": 0.001, "nft": 0.003, "ram (path cost)": 0.003},
}
OTHER_RATE = 0.03


@dataclass(frozen=True)
class Options:
    """Measure what transfers to other step counts and solvers.

    Attributes:
        problems: some of gaussian, mixture.
        methods: of the leaderboard, on the Gaussian problem.
        mixture_methods: on the mixture.
        few_step_methods: that are also trained at ``few_steps``.
        queries: of the reward, for every run.
        samples: an update.
        train_steps: of the sampler in training.
        few_steps: of the sampler in training, for the reverse question.
        seeds: that are reported, on the Gaussian problem.
        mixture_seeds: on the mixture.
        runs: folder of the trained weights; goes on from what is there.
        output: folder of the results.
    """

    problems: tuple[str, ...] = ("gaussian",)
    methods: tuple[str, ...] = METHODS
    mixture_methods: tuple[str, ...] = MIXTURE_METHODS
    few_step_methods: tuple[str, ...] = FEW_STEP_METHODS
    queries: int = 6_400
    samples: int = 64
    train_steps: int = 50
    few_steps: int = 10
    seeds: int = 5
    mixture_seeds: int = 3
    runs: Path = ROOT / "runs" / "transfer"
    output: Path = DOCS


@functools.cache
def solvers() -> dict[tuple[str, int], BoundDDIM | BoundBlackBox]:
    """Everything that a trained policy is evaluated on, by name and number of steps."""
    bound: dict[tuple[str, int], BoundDDIM | BoundBlackBox] = {}
    for eta, steps in itertools.product((1.0, 0.0), (10, 25, 50, 100)):
        bound[f"DDIM eta {eta:g}", steps] = DDIM(eta).bind(table(), steps)
    black_boxes = {
        "DPM-Solver++": "DPMSolverMultistepScheduler",
        "UniPC": "UniPCMultistepScheduler",
        "Heun": "HeunDiscreteScheduler",
    }
    for (name, kind), steps in itertools.product(black_boxes.items(), (10, 25)):
        bound[name, steps] = Scheduler(kind).bind(table(), steps)
    return bound


# -- training -------------------------------------------------------------------------------------


def methods() -> dict[str, Entry]:
    """Those of the leaderboard; RAM takes one optimiser step a roll-out, as all others."""
    ram = Entry(lambda b: o.ReinforceAdjointMatching(kl_weight=b, path_cost=True))
    return compared_methods.methods() | {"ram (path cost)": ram}


def learning_rates(problem: str, names: Sequence[str]) -> dict[str, float]:
    """Initial learning rate of each method."""
    return {name: RATES[problem].get(name, OTHER_RATE) for name in names}


def train(
    problem: GaussianProblem | MixtureProblem,
    entry: Entry,
    budget: compared_methods.Budget,
    steps: int,
    rate: float,
    seed: int,
    correction: nn.Module | None = None,
) -> tuple[CorrectedScore, dict[str, Any]]:
    """One run, and what it cost; one that diverges ends there, and keeps what it had.

    The value network, where a method has one, sees as many paths at once at any number of steps.

    Args:
        problem: what is generated and rewarded.
        entry: the method.
        budget: samples an update, and when it ends.
        steps: of the sampler.
        rate: initial learning rate.
        seed: of the run.
        correction: of the score, to be trained; the problem's own, if not given.
    """
    sampler = DDIM(eta=1.0).bind(table(), steps)
    environment = problem.environment(sampler, seed)
    if correction is not None:
        assert isinstance(environment.model, CorrectedScore)
        model = dataclasses.replace(environment.model, correction=correction)
        environment = dataclasses.replace(environment, model=model)
    settings: dict[str, Any] = {"samples": budget.samples, "batch": 1_000_000, "weight_decay": 0.0}
    settings["value_batch"] = 6 * (steps + 1)
    size = UpdateSize(**settings | dict(entry.size))
    objective = dataclasses.replace(entry.objective(problem.kl_weight), learning_rate=rate)
    trainer = Trainer(environment, objective, size, accelerator=Accelerator(cpu=True))
    began = time.perf_counter()
    for _ in compared_methods.spend(trainer, budget):
        pass
    score = environment.model
    assert isinstance(score, CorrectedScore)
    return score, {
        "queries": environment.reward_queries,
        "calls": score.calls,
        "seconds": time.perf_counter() - began,
        "diverged": int(budget.left(environment) > 0),
    }


def trained(
    problem: GaussianProblem | MixtureProblem, weights: Sequence[Sequence[float]]
) -> CorrectedScore:
    """The score with these weights."""
    environment = problem.environment(DDIM(1.0).bind(table(), 2), 0)
    parameters = environment.model.parameters
    with torch.no_grad():
        for parameter, numbers in zip(parameters, weights, strict=True):
            parameter.copy_(torch.tensor(numbers).view_as(parameter))
    score = environment.model
    assert isinstance(score, CorrectedScore)
    return score


# -- evaluation ------------------------------------------------------------------------------------

Outcomes = dict[tuple[str, int], ExactOutcome]


def evaluated(problem: GaussianProblem | MixtureProblem, score: CorrectedScore) -> Outcomes:
    """A score on every solver."""
    return {
        where: exact_laws.evaluate(problem, score, sampler) for where, sampler in solvers().items()
    }


def stored_outcomes(run: Mapping[str, Any]) -> Outcomes:
    """Those that were stored with a run."""
    return {(solver, steps): ExactOutcome(**values) for solver, steps, values in run["judged"]}


def known(problem: GaussianProblem | MixtureProblem, train_steps: int) -> dict[str, Outcomes]:
    """Policies that need no training."""
    scores = {
        "pretrained": exact_laws.pretrained_score(problem, table()),
        "optimum": exact_laws.optimal_score(problem, table()),
    }
    if isinstance(problem, GaussianProblem):
        chain = DDIM(1.0).bind(table(), train_steps)
        choices: tuple[Literal["nearest", "zero"], ...] = ("nearest", "zero")
        for elsewhere in choices:
            scores[f"optimum of the chain, a table, {elsewhere} elsewhere"] = (
                exact_laws.table_of_optimum(problem, chain, elsewhere=elsewhere)
            )
    return {name: evaluated(problem, score) for name, score in scores.items()}


@functools.cache
def chain_optimum(problem: GaussianProblem | MixtureProblem, steps: int) -> float:
    """The best J of the chain with noise."""
    return problem.optimum(DDIM(1.0).bind(table(), steps)).objective


def numbers(
    problem: GaussianProblem | MixtureProblem, one: Outcomes, references: Mapping[str, Outcomes]
) -> dict[tuple[str, int], dict[str, float | None]]:
    """A policy's numbers on every solver, shares among them."""
    collected = {}
    for (name, steps), it in one.items():
        start, best = (references[which][name, steps] for which in ("pretrained", "optimum"))
        row: dict[str, float | None] = {
            "reward": it.reward,
            "gain": it.reward - start.reward,
            "kl_to_target": it.kl_to_target,
            "share": (start.kl_to_target - it.kl_to_target)
            / (start.kl_to_target - best.kl_to_target),
            "path_kl": it.path_kl,
            "kl_to_chain": it.kl_to_chain,
            "objective": None,
            "share_of_j": None,
        }
        if it.path_kl is not None:
            value = it.reward - problem.kl_weight * it.path_kl
            row["objective"] = value
            row["share_of_j"] = (value - start.reward) / (
                chain_optimum(problem, steps) - start.reward
            )
        collected[name, steps] = row
    return collected


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), std / math.sqrt(len(values))


QUANTITIES = (
    "reward",
    "gain",
    "kl_to_target",
    "share",
    "lost",
    "gain_kept",
    "path_kl",
    "kl_to_chain",
    "objective",
    "share_of_j",
)


def rows_of(
    key: Mapping[str, Any],
    seeds: Sequence[dict[tuple[str, int], dict[str, float | None]]],
    train_steps: int,
) -> list[dict[str, Any]]:
    """One row a solver, means over seeds; ``lost`` and ``gain_kept`` compare with training."""
    rows = []
    for where in seeds[0]:
        values = []
        for seed in seeds:
            here, home = seed[where], seed[TRAINED_ON, train_steps]
            assert home["share"] is not None
            assert here["share"] is not None
            lost = home["share"] - here["share"]
            kept = here["gain"] / home["gain"] if home["gain"] and here["gain"] else None
            values.append(here | {"lost": lost, "gain_kept": kept})
        row = dict(key) | {"solver": where[0], "steps": where[1], "seeds": len(seeds)}
        for name in QUANTITIES:
            seen = [v[name] for v in values if v[name] is not None and math.isfinite(v[name])]
            row[name] = mean(seen) if len(seen) == len(seeds) else None
        rows.append(row)
    return rows


def main(options: Options) -> None:
    """Train what is missing; then evaluate everything anew, and write it."""
    torch.set_num_threads(1)
    console, entries = Console(width=210), methods()
    asked = {*options.methods, *options.mixture_methods, *options.few_step_methods}
    if unknown := asked - set(entries):
        raise SystemExit(f"unknown methods {sorted(unknown)}; there are {', '.join(entries)}")
    if unknown := set(options.problems) - set(PROBLEMS):
        raise SystemExit(f"unknown problems {sorted(unknown)}; there are {', '.join(PROBLEMS)}")
    options.runs.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.problems:
        rows += _rows_of_problem(name, entries, options, console)
    _write(rows, options, console)


def _rows_of_problem(
    name: str, entries: Mapping[str, Entry], options: Options, console: Console
) -> list[dict[str, Any]]:
    problem = PROBLEMS[name]()
    stored = options.runs / f"{name}.jsonl"
    runs = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []

    rates = learning_rates(name, tuple(entries))

    def need(method: str, steps: int, seed: int) -> dict[str, Any]:
        key: dict[str, Any] = {
            "method": method,
            "train_steps": steps,
            "seed": seed,
            "rate": rates[method],
            "queries": options.queries,
            "samples": options.samples,
        }
        for one in runs:
            if all(one[k] == v for k, v in key.items()):
                return one
        budget = compared_methods.Budget(queries=options.queries, samples=options.samples)
        score, cost = train(problem, entries[method], budget, steps, key["rate"], seed)
        weights = [p.detach().flatten().tolist() for p in score.correction.parameters()]
        outcomes = [
            [*where, dataclasses.asdict(it)] for where, it in evaluated(problem, score).items()
        ]
        cost |= {"spent": cost["queries"], "weights": weights, "judged": outcomes}
        runs.append(cost | key)  # what is asked for, not what was spent, tells runs apart
        with stored.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        console.print(f"{name}  {method}  {steps} steps  seed {seed}  {cost['seconds']:.1f} s")
        return runs[-1]

    mixture = name == "mixture"
    chosen = options.mixture_methods if mixture else options.methods
    count = options.mixture_seeds if mixture else options.seeds
    plan = [(m, options.train_steps) for m in chosen]
    plan += [(m, options.few_steps) for m in options.few_step_methods]
    costs = {
        (method, steps): [need(method, steps, seed) for seed in range(count)]
        for method, steps in plan
    }
    rows, references = [], known(problem, options.train_steps)
    for method, one in references.items():
        key: dict[str, Any] = {"problem": name, "method": method, "trained": False}
        key |= {"train_steps": options.train_steps, "aims": True, "rate": None}
        rows += rows_of(key, [numbers(problem, one, references)], options.train_steps)
    for (method, steps), cost in costs.items():
        seeds = [numbers(problem, stored_outcomes(run), references) for run in cost]
        key: dict[str, Any] = {"problem": name, "method": method, "trained": True}
        key |= {"train_steps": steps}
        key |= {"aims": entries[method].aims, "rate": cost[0]["rate"]}
        key["queries"] = statistics.fmean(run.get("spent", run["queries"]) for run in cost)
        key["calls"] = statistics.fmean(run["calls"] for run in cost)
        key["diverged"] = sum(run["diverged"] for run in cost)
        rows += rows_of(key, seeds, steps)
    return rows


# -- what is written ------------------------------------------------------------------------------


def _write(rows: Sequence[dict[str, Any]], options: Options, console: Console) -> None:
    with (options.output / "transfer.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        keys = ("problem", "method", "train_steps", "solver", "steps", "seeds", "rate")
        writer.writerow(
            list(keys) + [f"{k} {what}" for k in QUANTITIES for what in ("mean", "standard error")]
        )
        for row in rows:
            cells = [row[k] for k in keys]
            for quantity in QUANTITIES:
                pair = row[quantity]
                cells += ["", ""] if pair is None else [f"{value:.6g}" for value in pair]
            writer.writerow(cells)
    record = {
        "options": dataclasses.asdict(options) | {"output": "", "runs": ""},
        "versions": versions(),
        "rows": rows,
    }
    path = options.output / "transfer.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    for problem in options.problems:
        for quantity in ("share", "share_of_j", "gain"):
            console.print(_table([r for r in rows if r["problem"] == problem], problem, quantity))
    _picture(rows, options)


SHORT = {"DDIM eta 1": "SDE", "DDIM eta 0": "ODE", "DPM-Solver++": "DPM++"}


def _table(rows: Sequence[dict[str, Any]], problem: str, quantity: str) -> Table:
    """One line a policy, one column a solver."""
    places = list(dict.fromkeys((r["solver"], r["steps"]) for r in rows if r[quantity]))
    shown = Table(
        box=None, header_style="dim", title=f"{problem}: {quantity}", title_justify="left"
    )
    shown.add_column("method (steps of training)", no_wrap=True)
    for solver, steps in places:
        shown.add_column(f"{SHORT.get(solver, solver)} {steps}", justify="right", no_wrap=True)
    for method, train_steps in dict.fromkeys((r["method"], r["train_steps"]) for r in rows):
        cells = []
        for solver, steps in places:
            (row,) = (
                r
                for r in rows
                if (r["method"], r["train_steps"]) == (method, train_steps)
                and (r["solver"], r["steps"]) == (solver, steps)
            )
            if row[quantity] is None:
                cells.append("-")
                continue
            middle, error = row[quantity]
            cells.append(f"{middle:.3f}" + (f"({1000 * error:.0f})" if row["seeds"] > 1 else ""))
        shown.add_row(f"{method} ({train_steps})", *cells)
    return shown


def _picture(rows: Sequence[dict[str, Any]], options: Options) -> None:
    """Shares against steps, with noise and without, and on the other solvers."""
    count = len(options.problems)
    figure = Figure(figsize=(14, 4.4 * count), layout="constrained")
    grid = figure.subplots(count, 3, sharey="row", squeeze=False)
    for problem, line in zip(options.problems, grid, strict=True):
        own = [r for r in rows if r["problem"] == problem and r["trained"]]
        drawn = dict.fromkeys((r["method"], r["train_steps"]) for r in own)
        others = list(
            dict.fromkeys((r["solver"], r["steps"]) for r in own if "DDIM" not in r["solver"])
        )
        colours = {method: k for k, method in enumerate(dict.fromkeys(m for m, _ in drawn))}
        for method, steps in drawn:
            k = colours[method]
            mine = [r for r in own if (r["method"], r["train_steps"]) == (method, steps)]
            style = {"color": f"C{k % 10}", "linewidth": 1.3, "markersize": 4}
            style |= {"linestyle": "-" if steps == options.train_steps else "--", "marker": "o"}
            for axes, solver in zip(line, ("DDIM eta 1", "DDIM eta 0"), strict=False):
                seen = [r for r in mine if r["solver"] == solver and r["share"]]
                axes.errorbar(
                    [r["steps"] for r in seen],
                    [r["share"][0] for r in seen],
                    [r["share"][1] for r in seen],
                    **style,
                )
            seen = [r for r in mine if (r["solver"], r["steps"]) in others and r["share"]]
            line[2].plot(
                [others.index((r["solver"], r["steps"])) for r in seen],
                [r["share"][0] for r in seen],
                label=f"{method} ({steps})",
                **style | {"linestyle": "", "marker": "o" if steps == options.train_steps else "x"},
            )
        for axes, solver in zip(line, ("DDIM eta 1", "DDIM eta 0"), strict=False):
            axes.set(xscale="log", xlabel=f"steps of {solver}", title=problem)
            axes.set_xticks([10, 25, 50, 100], ["10", "25", "50", "100"])
            axes.minorticks_off()
        line[2].set_xticks(range(len(others)), [f"{SHORT.get(s, s)} {k}" for s, k in others])
        line[2].tick_params(axis="x", labelrotation=40)
        line[0].set_ylabel("share of the gap in KL to the target")
        line[0].set_ylim(0, 1.2)
        for axes in line:
            axes.axhline(1, color="black", linewidth=0.8)
            axes.grid(alpha=0.25)
        line[2].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(options.output / "transfer.png", dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
