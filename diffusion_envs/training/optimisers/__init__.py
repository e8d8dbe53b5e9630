"""How a gradient becomes a step: frozen dataclasses of hyperparameters, each in a file."""

from diffusion_envs.training.optimisers.adamw import AdamW
from diffusion_envs.training.optimisers.adamw_8bit import AdamW8bit
from diffusion_envs.training.optimisers.bounded_adamw import BoundedAdamW
from diffusion_envs.training.optimisers.diagonal_metric import DiagonalMetric
from diffusion_envs.training.optimisers.natural_gradient import NaturalGradient
from diffusion_envs.training.optimisers.protocol import Optimiser, Stepper
from diffusion_envs.training.optimisers.scaled_lora import ScaledLoRA

__all__ = [
    "AdamW",
    "AdamW8bit",
    "BoundedAdamW",
    "DiagonalMetric",
    "NaturalGradient",
    "Optimiser",
    "ScaledLoRA",
    "Stepper",
]
