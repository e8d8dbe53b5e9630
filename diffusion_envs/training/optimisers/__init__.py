"""How a gradient becomes a step: frozen dataclasses of hyperparameters, each in a file."""

from diffusion_envs.training.optimisers.adamw import AdamW
from diffusion_envs.training.optimisers.natural_gradient import NaturalGradient
from diffusion_envs.training.optimisers.protocol import Optimiser, Stepper

__all__ = ["AdamW", "NaturalGradient", "Optimiser", "Stepper"]
