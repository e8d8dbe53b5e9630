"""Every objective with every sampler, reward, preference, sizes and target: trained or refused.

A combination either trains one update to finite numbers, or is refused before anything is sampled,
by an error that names the objective and a remedy; which of them are refused is said here again.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs.environment import Environment
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import (
    BackpropObjective,
    DDPOScoreFunction,
    DistributionalOptimisation,
    NoisedObjective,
    Objective,
    PathObjective,
    TiltedRegression,
)
from diffusion_envs.preferences import FromReward, MissingChoicesError, Preference, Recorded
from diffusion_envs.runs.method_names import OBJECTIVES
from diffusion_envs.samplers import DDIM, BoundBlackBox, BoundDDIM, Scheduler
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.training_loop import Process

pytestmark = pytest.mark.filterwarnings("default")  # diffusers deprecates freely

PROBLEM, STEPS, SAMPLES = GaussianProblem(), 2, 4
SETTINGS = {name: {"group": 2} for name in ("grpo", "grpo-guard", "flow-dppo", "pcpo")} | {
    "draft": {"last": 2},
    "dense-reward": {"members": 2},
}
CHARGED = {name: {"kl_weight": 0.1} for name in ("draft", "align-prop", "dxmi", "dxmi-continuous")}
VARIANTS = [
    *[(name, SETTINGS.get(name, {})) for name in OBJECTIVES],
    *[(name, SETTINGS.get(name, {}) | more) for name, more in CHARGED.items()],
    ("dpok", {"exact_kl": True}),
    ("dpok", {"path_kl": True}),
    ("diffusion-dpo", {"beta": 0.5, "online": True}),
    ("ram", {"path_cost": True}),
    ("flow-dppo", {"group": 2, "per_path": True}),
    ("adjoint-matching", {"path_kl": True}),
]
FROM_PRETRAINED = (DistributionalOptimisation, TiltedRegression)  # roll-outs of no own policy
KINDS = {
    "eta 1": DDIM(1.0),
    "eta 0.5": DDIM(0.5),
    "eta 0": DDIM(0.0),
    "dpm++": Scheduler("DPMSolverMultistepScheduler"),
}
SAMPLERS = {name: kind.bind(table(), STEPS) for name, kind in KINDS.items()}
SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "epochs": {"epochs": 2},
    "minibatches": {"minibatches": 2},
    "odd samples": {"samples": SAMPLES + 1},
    "train_steps": {"train_steps": 1},
    "too many train_steps": {"train_steps": STEPS + 1},
}


def brighter(
    images: Tensor, prompts: Sequence[str], rewards: Tensor, samples: range, group: int
) -> Tensor:
    return images.sum(1)


@dataclass(frozen=True)
class Opaque:
    """A reward that says nothing of a gradient."""

    reward: Any

    def __call__(self, states: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(states, prompts).detach()


@dataclass(frozen=True)
class Data:
    """What samples should look like, where that is asked for."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)


@dataclass(frozen=True)
class Combination:
    objective: Objective
    sampler: BoundDDIM | BoundBlackBox
    gradient: bool
    preference: Preference | None
    size: dict[str, Any]
    target: TargetKL | None

    def trainer(self, made: Environment) -> Trainer:
        reward = made.reward if self.gradient else Opaque(made.reward)
        environment = replace(made, sampler=self.sampler, reward=reward)
        settings = {"samples": SAMPLES, "batch": 4096, "value_epochs": 1} | self.size
        return Trainer(
            environment,
            self.objective,
            UpdateSize(**settings),
            accelerator=Process(),
            preference=self.preference,
            data=Data() if self.objective.needs_data else None,
            target_kl=self.target,
        )

    def is_to_be_refused(self) -> bool:
        """What each objective says of itself in its docstring, once more."""
        objective, eta = self.objective, getattr(self.sampler, "eta", None)  # None: a black box
        on_paths, from_data = (
            isinstance(objective, kind) for kind in (PathObjective, NoisedObjective)
        )
        weight = getattr(objective, "kl_weight", 0.0)
        samples = self.size.get("samples", SAMPLES)
        passes = self.size.get("epochs", 1) * self.size.get("minibatches", 1)
        differentiates = isinstance(objective, BackpropObjective) or (
            type(objective).__name__ == "AdjointMatching"
        )
        compares = type(objective).__name__ in (
            "D3PO",
            "DenseReward",
            "DiffusionDPO",
        )
        return any(
            (
                eta is None and not from_data,
                eta == 0 and on_paths,
                eta == 0 and isinstance(objective, BackpropObjective) and weight > 0,
                differentiates and not self.gradient,
                self.preference is not None and not compares,
                self.target is not None and (not eta or weight == 0),
                self.target is not None and isinstance(objective, FROM_PRETRAINED),
                samples % (objective.group * self.size.get("minibatches", 1)) > 0,
                "train_steps" in self.size and not on_paths,
                self.size.get("train_steps", 0) > STEPS,
                passes > 1 and isinstance(objective, DDPOScoreFunction),
            )
        )


def combinations(objective: Objective, folder: Path) -> Iterator[Combination]:
    recorded = Recorded(folder / "nobody_chose.jsonl")
    preferences: tuple[Preference | None, ...] = (None, brighter)
    if objective.needs_preferences:
        preferences += (FromReward(), recorded)
    targets = (None, TargetKL(0.5))
    choices = product(SAMPLERS.values(), (True, False), preferences, SIZES.values(), targets)
    for one in choices:
        yield Combination(objective, *one)


def fresh() -> Environment:
    return PROBLEM.environment(SAMPLERS["eta 1"], 5)


UNTOUCHED = fresh()  # by what does not sample


def assert_refused(one: Combination) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # its text is what is tested
        one.trainer(UNTOUCHED)
    assert UNTOUCHED.model.calls == 0
    said = str(refusal.value)
    assert type(one.objective).__name__ in said
    assert re.search(r"\b(use|set|leave)\b", said), said


def assert_trains(one: Combination) -> None:
    made = one.trainer(fresh())
    before = [p.detach().clone() for p in made.parameters]
    if isinstance(one.preference, Recorded):
        with pytest.raises(MissingChoicesError, match="nobody_chose"):
            made.step()
        assert all(torch.equal(p, q) for p, q in zip(made.parameters, before, strict=True))
        return
    line = made.step()
    numbers = [getattr(value, "mean", value) for value in line.values()]
    assert all(math.isfinite(value) for value in numbers), line
    assert all(p.isfinite().all() for p in made.parameters)
    if type(one.objective).__name__.startswith("ContinuousDxMI"):
        made.step()  # the first update is the value network's: fresh, it has no slope to follow
    assert any(not torch.equal(p, q) for p, q in zip(made.parameters, before, strict=True))


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=lambda x: str(x))
def test_a_combination_trains_or_is_refused_before_anything_is_sampled(name, settings, tmp_path):
    objective = OBJECTIVES[name](**settings)
    for one in combinations(objective, tmp_path):
        try:
            if one.is_to_be_refused():
                assert_refused(one)
            elif one.gradient and not (one.size and (one.target or one.preference)):
                assert_trains(one)
            else:  # trains as neighbours do: the gradient is not used, one thing more is
                one.trainer(UNTOUCHED)
        except Exception as error:
            error.add_note(str(one))
            raise
