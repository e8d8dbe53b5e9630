"""Rows of one coordinate and unit scale, on which sizes of biases are integrals over one normal."""

import math
from typing import Any

import torch
from torch import Tensor

from diffusion_envs.objectives import Rows

Z = torch.linspace(-14, 14, 100001, dtype=torch.float64)
DENSITY = (-0.5 * Z.square()).exp() / math.sqrt(2 * math.pi)


def rows(
    kind: type[Rows], noise: Tensor, shift: float | Tensor, advantage: Tensor, **more: Any
) -> Any:
    """Steps whose mean is ``shift`` standard deviations from the old one."""
    one = torch.ones_like(noise)
    mean = (shift * one)[:, None].requires_grad_()
    return kind(
        mean=mean,
        old_mean=torch.zeros_like(mean),
        reference_score=torch.zeros_like(mean),
        noise=noise[:, None],
        advantage=advantage.to(noise),
        step_size=one,
        horizon=one.sum(),
        score_gain=one,
        std=one,
        kl_factor=1.0,
        **more,
    )


def slope(objective: Any, made: Any) -> Tensor:
    """Minus the loss's derivative in every row's mean."""
    return -torch.autograd.grad(objective.loss(made).sum(), made.mean)[0][:, 0]


def expected(values: Tensor) -> float:
    """Expectation over ``Z``."""
    return torch.trapezoid(values * DENSITY, Z).item()
