"""Rows of random numbers, on which losses are compared with formulas written out in the tests."""

from typing import Any

import torch
from torch import Tensor

from diffusion_envs.objectives import Rows
from diffusion_envs.objectives.dpok import NoiseLevelRows

EVENT = (3, 2, 2)


def column(x: Tensor) -> Tensor:
    """One number a row, to multiply events with."""
    return x.view(-1, 1, 1, 1)


def rows(
    generator: torch.Generator,
    moved: float,
    *,
    count: int = 7,
    reference: float = 0.3,
    kind: type[Rows] = NoiseLevelRows,
    **more: Any,
) -> Any:
    """Rows whose policy is ``moved`` away from the sampling one, and that from the pretrained."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(count, *EVENT)
    common = Rows(
        mean=(old + moved * normal(count, *EVENT)).requires_grad_(),
        old_mean=old,
        reference_score=old + reference * normal(count, *EVENT),
        noise=normal(count, *EVENT),
        advantage=normal(count),
        step_size=0.1 + normal(count).square(),
        horizon=torch.tensor(4.3, dtype=torch.float64),
        score_gain=0.2 + normal(count).square(),
        std=0.3 + normal(count).square(),
        kl_factor=1.37,
    )
    if kind is NoiseLevelRows:
        more["sigma"] = 0.1 + normal(count).square()
    return kind(**vars(common), **more)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to round-off."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
