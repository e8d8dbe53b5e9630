"""Samplers: Gaussian steps with their densities, and any diffusers scheduler as a black box."""

from typing import TypeAlias

from diffusion_envs.samplers.ddim import DDIM, BoundDDIM, BoundDDIMFromNoise
from diffusion_envs.samplers.diffusers_scheduler import BlackBox, BoundBlackBox, Scheduler
from diffusion_envs.samplers.few_steps import BoundFewSteps, EqualAngles, QuadraticVariances
from diffusion_envs.samplers.flow_sde import CPS, BoundCPS, BoundFlowDDIM, BoundFlowSDE, FlowSDE
from diffusion_envs.samplers.gaussian_steps import GaussianSteps

Sampler: TypeAlias = DDIM | QuadraticVariances | EqualAngles | FlowSDE | CPS | Scheduler
"""What a user names; ``bind`` puts it on a model's noise levels."""


def usual_steps(sampler: Sampler) -> int | None:
    """How many steps a sampler of few is made for; None of any other."""
    few = isinstance(sampler, QuadraticVariances | EqualAngles)
    return sampler.usual_steps if few else None


__all__ = [
    "CPS",
    "DDIM",
    "BlackBox",
    "BoundBlackBox",
    "BoundCPS",
    "BoundDDIM",
    "BoundDDIMFromNoise",
    "BoundFewSteps",
    "BoundFlowDDIM",
    "BoundFlowSDE",
    "EqualAngles",
    "FlowSDE",
    "GaussianSteps",
    "QuadraticVariances",
    "Sampler",
    "Scheduler",
    "usual_steps",
]
