"""Refusals at the start: which objective, reward, sampler and sizes go together."""

from typing import Any

from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import Objective
from diffusion_envs.preferences import Preference
from diffusion_envs.samplers import BoundBlackBox, GaussianSteps
from diffusion_envs.training import kl_controller
from diffusion_envs.training.energy import TrainingData
from diffusion_envs.training.optimisers import AdamW, Optimiser
from diffusion_envs.training.sharded import Shards
from diffusion_envs.training.update_size import UpdateSize


def require_inputs(
    objective: Objective,
    reward: rewards.Reward,
    preference: Preference | None,
    target_kl: kl_controller.TargetKL | None,
    data: Any = None,
) -> None:
    """Refuse what the objective cannot use, before a model is loaded.

    Raises:
        ValueError: the reward lacks a gradient that the objective needs; nobody asks for the
            preference or the data, or the data is missing; the target can steer nothing.
        TypeError: the data cannot be drawn from.
    """
    name = type(objective).__name__
    if objective.compares_parts and not isinstance(reward, rewards.InParts):
        raise ValueError(
            f"{name} with advantage='parts' compares each part of a reward, and "
            f"{rewards.reward_name(reward)} has none: use rewards.Weighted, or "
            "advantage='standardised'"
        )
    if objective.needs_reward_gradient and not getattr(reward, "differentiable", False):
        raise ValueError(
            f"{name} needs a reward with a gradient; {_without_gradient(reward)} does not "
            "declare differentiable = True: set it if torch can differentiate it, or use an "
            "objective that only needs its values (ScoreAsAction)"
        )
    if preference is not None and not objective.needs_preferences:
        raise ValueError(
            f"preference is given, but {name} learns from rewards: use an objective that learns "
            "from preferences (D3PO, DenseReward, DiffusionDPO), or leave it out"
        )
    if objective.needs_data and data is None:
        raise ValueError(
            f"{name} learns its reward from data, and data is None: set what samples should look "
            "like, such as data=cifar10.Pictures(folder), or use DxMI or ContinuousDxMI, which "
            "take the reward as it is"
        )
    if data is not None and not objective.needs_data:
        raise ValueError(
            f"data is given, but {name} learns from rewards: use an objective that learns from "
            "data (DxMIFromData, ContinuousDxMIFromData), or leave it out"
        )
    if data is not None and not isinstance(data, TrainingData):
        raise TypeError(f"data must have a method draw(n, generator), got {type(data).__name__}")
    if target_kl is not None:
        kl_controller.require_steerable(objective)


def _without_gradient(reward: rewards.Reward) -> str:
    """The reward, or the parts of it, that declare no gradient."""
    if isinstance(reward, rewards.Weighted):
        return ", ".join(reward.without_gradient)
    return rewards.reward_name(reward)


def require_fit(
    environment: Environment,
    objective: Objective,
    size: UpdateSize,
    processes: int,
    target_kl: kl_controller.TargetKL | None,
    preference: Preference | None = None,
    data: TrainingData | None = None,
) -> None:
    """Refuse what cannot be trained, before anything is sampled.

    Raises:
        ValueError: the samples cannot be split; or reward, sampler or sizes lack what the
            objective or the target needs, or there is something that the objective does not use.
    """
    require_inputs(objective, environment.reward, preference, target_kl, data)
    _require_sampler(environment.sampler, objective, target_kl)
    name, steps = type(objective).__name__, environment.sampler.steps
    if size.samples < 2:
        raise ValueError(
            f"samples must be at least 2 for {name} to compare them, got {size.samples}: use more"
        )
    share = size.minibatches * objective.group
    if size.samples % share:
        raise ValueError(
            f"samples ({size.samples}) must be a multiple of minibatches x the group of {name}, "
            f"{size.minibatches} x {objective.group} = {share}: "
            f"use {share * max(1, round(size.samples / share))}"
        )
    if (groups := size.samples // objective.group) < processes:
        raise ValueError(
            f"every process must have a group of samples, and there are {groups} groups of {name} "
            f"({objective.group} samples each) for {processes} processes: use "
            f"{processes * objective.group} samples or more, or {groups} processes"
        )
    if size.train_steps is not None and not objective.chooses_steps:
        raise ValueError(
            f"train_steps ({size.train_steps}) chooses among the steps of a path, and {name} "
            "does not learn from them: leave it out"
        )
    if size.train_steps is not None and size.train_steps > steps:
        raise ValueError(
            f"train_steps ({size.train_steps}) must be at most the sampler's steps ({steps}) "
            f"that {name} learns from: use fewer, or leave it out"
        )
    if size.stored_paths == "host" and (objective.needs_data or not objective.reads_by_row):
        raise ValueError(
            f"stored_paths='host' is for objectives that read single steps, and {name} reads the "
            "roll-out as a whole: use stored_paths='device'"
        )
    if objective.needs_fresh_rollouts and (taken := size.epochs * size.minibatches) > 1:
        raise ValueError(
            f"{name} corrects for no change of policy within a roll-out: "
            f"use epochs=1 and minibatches=1, got {taken} optimiser steps"
        )


def require_shardable(shards: Shards, optimiser: Optimiser) -> None:
    """Refuse optimisers that need to see whole tensors, where weights are sharded.

    Raises:
        ValueError: it is none that treats every number alike.
    """
    if shards.networks and not isinstance(optimiser, AdamW):
        raise ValueError(
            f"{type(optimiser).__name__} is not for sharded weights: it looks at whole tensors, or "
            "at gradients of its own; use AdamW, or leave out sharded"
        )


def _require_sampler(
    sampler: GaussianSteps | BoundBlackBox,
    objective: Objective,
    target_kl: kl_controller.TargetKL | None,
) -> None:
    """Refuse a sampler that does not show or have what is learned from."""
    name = type(objective).__name__
    ode = sampler.shows_steps and sampler.deterministic
    if objective.needs_steps and not sampler.shows_steps:
        raise ValueError(
            f"{name} learns from the steps of the sampler, and a black box shows none: use DDIM, "
            "or an objective that learns from data (DiffusionNFT, ReinforceAdjointMatching, "
            "DistributionalOptimisation)"
        )
    if sampler.parameters and not objective.learns_std:
        raise ValueError(
            f"the sampler's standard deviations learn, and the loss of {name} has no gradient in "
            "them: use DxMI or DxMIFromData, or a sampler without learned_std"
        )
    if sampler.parameters and objective.cost_weight > 0:
        raise ValueError(
            f"the path KL that {name} charges is that of the score alone, and the sampler's "
            "standard deviations learn: use kl_weight=0, or a sampler without learned_std"
        )
    action = sampler.action if isinstance(sampler, GaussianSteps) else "score"
    if objective.needs_scores and action != "score":
        raise ValueError(
            f"{name} takes the sampler's action for a score, and the action of "
            f"{type(sampler).__name__} is the expected data ({action!r}), because it starts where "
            "no signal is left: use an objective of transitions (ScoreAsAction, DDPO, GRPO, "
            "AdjointMatching), or a model on a table with some signal everywhere"
        )
    if target_kl is not None and (ode or not sampler.shows_steps):
        raise ValueError(
            f"target_kl needs a path KL to steer {name} by, and this sampler has none: an ODE's is "
            "infinite, a black box's not known; use DDIM(eta > 0), or set kl_weight"
        )
    if (
        ode
        and objective.needs_steps
        and not objective.needs_noisy_steps
        and (objective.needs_reference)
    ):
        raise ValueError(
            f"{name} charges a path KL, and an ODE's is infinite: use DDIM(eta > 0), or kl_weight=0"
        )
    if ode and objective.needs_noisy_steps:
        raise ValueError(
            f"{name} learns from noisy steps, and an ODE has none (no transition density, an "
            "infinite path KL): use DDIM(eta > 0), or an objective that learns from data "
            "(DiffusionNFT, ReinforceAdjointMatching, DistributionalOptimisation)"
        )
    if objective.needs_density and not sampler.has_density:
        raise ValueError(
            f"{name} needs a transition density, and a step of this sampler has none (standard "
            "deviation 0): use a scheduler with set_alpha_to_one=False, or an objective that draws "
            "its actions (ScoreAsActionSampled)"
        )
