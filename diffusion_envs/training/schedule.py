"""How much of everything an update uses, and what of it goes together."""

import math
from dataclasses import dataclass

from diffusion_envs.objectives import BackpropObjective, NoisedObjective, Objective
from diffusion_envs.samplers import BoundDDIM
from diffusion_envs.training import control
from diffusion_envs.training.environment import Environment


@dataclass(frozen=True)
class Schedule:
    """How much of everything an update uses.

    Attributes:
        samples: images an update, over all processes.
        epochs: passes over a roll-out before the next is sampled.
        minibatches: optimiser steps a pass; samples are split among them.
        train_steps: steps of each path that carry a gradient, drawn without replacement; the
            others' share is made up by weight, so the gradient stays unbiased. None for all.
        batch: rows (sample, step) that go through the network at once; memory, not mathematics.
        max_gradient_norm: larger gradients are scaled down to it.
        weight_decay: of AdamW on the adapter.
        value_epochs: passes of the value network over the states of a roll-out.
        value_batch: states a step of the value network's optimiser.
        value_learning_rate: of AdamW on the value network.
    """

    samples: int = 32
    epochs: int = 1
    minibatches: int = 1
    train_steps: int | None = None
    batch: int = 64
    max_gradient_norm: float = 1.0
    weight_decay: float = 1e-4
    value_epochs: int = 2
    value_batch: int = 128
    value_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "minibatches", "batch", "value_epochs", "value_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_gradient_norm", "value_learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.train_steps is not None and self.train_steps < 1:
            raise ValueError(f"train_steps must be at least 1 or None, got {self.train_steps}")
        if self.samples % self.minibatches:
            raise ValueError(
                f"samples ({self.samples}) must be a multiple of minibatches ({self.minibatches})"
            )


def require_fit(
    environment: Environment,
    objective: Objective,
    schedule: Schedule,
    processes: int,
    target_kl: control.TargetKL | None,
) -> None:
    """Refuse what cannot be trained, before anything is sampled.

    Raises:
        ValueError: the samples cannot be split, or the sampler lacks what the objective or the
            target needs.
    """
    share = processes * schedule.minibatches * objective.group
    if schedule.samples % share:
        raise ValueError(
            f"samples ({schedule.samples}) must be a multiple of processes x minibatches x "
            f"the objective's group ({share})"
        )
    if not isinstance(objective, NoisedObjective) and not isinstance(
        environment.sampler, BoundDDIM
    ):
        raise ValueError(
            f"{type(objective).__name__} learns from the steps of the sampler, and a black box "
            "shows none: use DDIM, or an objective that learns from data (DiffusionNFT, "
            "ReinforceAdjointMatching, DistributionalOptimisation)"
        )
    on_grid = environment.sampler if isinstance(environment.sampler, BoundDDIM) else None
    if target_kl is not None and (on_grid is None or on_grid.eta == 0):
        raise ValueError(
            "target_kl needs a path KL to steer by, and this sampler has none: an ODE's is "
            "infinite, a black box's not known; use DDIM(eta > 0), or set kl_weight"
        )
    charged = isinstance(objective, BackpropObjective) and objective.needs_reference
    if charged and on_grid is not None and on_grid.eta == 0:
        raise ValueError(
            f"{type(objective).__name__} charges a path KL, and an ODE's is infinite: use "
            "DDIM(eta > 0), or kl_weight=0"
        )
    if target_kl is not None:
        control.require_steerable(objective)
    steps = environment.sampler.steps
    if schedule.train_steps is not None and schedule.train_steps > steps:
        raise ValueError(
            f"train_steps ({schedule.train_steps}) must be at most the sampler's steps ({steps})"
        )
    if objective.needs_density and not environment.sampler.has_density:
        raise ValueError(
            f"{type(objective).__name__} needs a transition density, and a step of this sampler "
            "has none (standard deviation 0): use eta > 0 and a scheduler with "
            "set_alpha_to_one=False, or an objective that draws its actions (ScoreAsActionSampled)"
        )
    if objective.needs_fresh_rollouts and (taken := schedule.epochs * schedule.minibatches) > 1:
        raise ValueError(
            f"{type(objective).__name__} corrects for no change of policy within a roll-out: "
            f"use epochs=1 and minibatches=1, got {taken} optimiser steps"
        )
    if schedule.samples < 2:
        raise ValueError(f"samples must be at least 2 to compare them, got {schedule.samples}")
