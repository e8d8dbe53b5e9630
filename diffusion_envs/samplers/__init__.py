"""Samplers: DDIM with its transition density, and any diffusers scheduler as a black box."""

from typing import TypeAlias

from diffusion_envs.samplers.ddim import DDIM, BoundDDIM
from diffusion_envs.samplers.diffusers_scheduler import BlackBox, BoundBlackBox, Scheduler

Sampler: TypeAlias = DDIM | Scheduler
"""What a user names; ``bind`` puts it on a model's noise levels."""

__all__ = ["DDIM", "BlackBox", "BoundBlackBox", "BoundDDIM", "Sampler", "Scheduler"]
