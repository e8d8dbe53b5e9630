"""The embedded image model, trained with few steps of DDIM: what other samplers make of it.

Every row is one adapter; every column the gain in the held-out samples' reward, over the pretrained
model with the same sampler and the same seeds, and its standard error over these pairs (one
training run: the variation between runs is not in it). The second number is what a classifier says
that was not trained on. Learning rates are those of ``benchmarks.calls_to_reward``. A step of Heun
calls the network twice, but for the last.

    python -m benchmarks.transfer_images
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from benchmarks.compared_methods import Budget, TinyProblem, spend
from ctrl import Estimate
from diffusion_envs import objectives as o
from diffusion_envs import rewards
from diffusion_envs.objectives import Objective
from diffusion_envs.runs.evaluation import Evaluation, evaluate
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.samplers import DDIM, Sampler, Scheduler
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

DOCS = Path(__file__).parent.parent / "docs"

SAMPLERS: dict[str, tuple[Sampler, int]] = {
    "DDIM eta 1, 5": (DDIM(1.0), 5),
    "DDIM eta 1, 10": (DDIM(1.0), 10),
    "DDIM eta 1, 25": (DDIM(1.0), 25),
    "DDIM eta 1, 50": (DDIM(1.0), 50),
    "DDIM eta 0, 25": (DDIM(0.0), 25),
    "DPM-Solver++, 10": (Scheduler("DPMSolverMultistepScheduler"), 10),
    "UniPC, 10": (Scheduler("UniPCMultistepScheduler"), 10),
    "Heun, 10": (Scheduler("HeunDiscreteScheduler"), 10),
}


@dataclass(frozen=True)
class Training:
    """One adapter: objective with its learning rate, steps of DDIM with eta 1."""

    objective: Objective
    steps: int


TRAININGS = {
    "score-as-action, 10 steps": Training(o.ScoreAsAction(clip=1.0, learning_rate=1e-2), 10),
    "score-as-action, 5 steps": Training(o.ScoreAsAction(clip=1.0, learning_rate=1e-2), 5),
    "ddpo, 10 steps": Training(o.DDPO(learning_rate=3e-3), 10),
}


@dataclass(frozen=True)
class Options:
    """Train with few steps, evaluate with others.

    Attributes:
        calls: of the network, for every training.
        samples: an update.
        held_out: samples of an evaluation.
        seed: of training and evaluation.
        output: folder of the results.
    """

    calls: int = 36_000
    samples: int = 40
    held_out: int = 100
    seed: int = 0
    output: Path = DOCS


def evaluated(environment: Any, problem: TinyProblem, options: Options) -> dict[str, Evaluation]:
    """By every sampler."""
    evaluations = {}
    for name, (sampler, steps) in SAMPLERS.items():
        other = dataclasses.replace(environment, sampler=sampler.bind(problem.table, steps))
        judges = {"judge": rewards.PromptAlignment("judge")}
        evaluations[name] = evaluate(other, options.held_out, judges=judges, batch=50)
    return evaluations


def trained(training: Training, problem: TinyProblem, options: Options) -> Any:
    """An environment whose adapter has learned; its rate falls linearly to 0 with the calls."""
    sampler = DDIM(1.0).bind(problem.table, training.steps)
    environment = problem.environment(sampler, options.seed)
    size = UpdateSize(samples=options.samples, weight_decay=0.0)
    trainer = Trainer(environment, training.objective, size, accelerator=Accelerator(cpu=True))
    budget = Budget(queries=10**9, calls=options.calls)
    for _ in spend(trainer, budget):
        pass
    if budget.left(environment) > 0:
        raise FloatingPointError(f"training diverged after {environment.model.calls} network calls")
    return environment


def main(options: Options) -> None:
    """Train, evaluate, write."""
    torch.set_num_threads(1)
    console, problem = Console(width=200), TinyProblem()
    environment = problem.environment(DDIM(1.0).bind(problem.table, 10), options.seed)
    before = evaluated(environment, problem, options)
    rows: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for name, training in TRAININGS.items():
        after = evaluated(trained(training, problem, options), problem, options)
        rows[name] = {}
        for sampler, evaluation in after.items():
            start = before[sampler]
            pairs = {
                "reward": evaluation.rewards - start.rewards,
                "held_out": evaluation.judged["judge"] - start.judged["judge"],
            }
            gains = {key: Estimate.of(gap) for key, gap in pairs.items()}
            rows[name][sampler] = {key: (e.mean, e.standard_error) for key, e in gains.items()}
        console.print(name, {key: value["reward"] for key, value in rows[name].items()})
    table = Table(box=None, header_style="dim")
    for column in ("evaluated on", "pretrained", *rows):
        table.add_column(column, no_wrap=True)
    for sampler, evaluation in before.items():
        cells = [
            " / ".join(f"{mean:.2f}({error:.2f})" for mean, error in row[sampler].values())
            for row in rows.values()
        ]
        table.add_row(sampler, f"{float(evaluation.rewards.mean()):.2f}", *cells)
    console.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {
        "options": dataclasses.asdict(options) | {"output": ""},
        "versions": versions(),
        "pretrained": {
            name: float(evaluation.rewards.mean()) for name, evaluation in before.items()
        },
        "gains": rows,
    }
    path = options.output / "transfer_images.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
