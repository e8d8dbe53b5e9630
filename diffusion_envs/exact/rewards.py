"""Rewards of vectors whose KL-regularised optimum is known: quadratic (linear) and cosine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from diffusion_envs.exact.gaussian import Quadratic


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """r(x) = -x'Qx/2 + l'x; linear where Q = 0."""

    quadratic: Quadratic
    differentiable: ClassVar[bool] = True

    def __call__(
        self, states: Float[Tensor, "n dim"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """One number for each state."""
        q = self.quadratic
        curvature, slope = as_like(q.curvature, states), as_like(q.slope, states)
        bent = torch.einsum("ni,ij,nj->n", states, curvature, states)
        return states @ slope - 0.5 * bent + as_like(q.constant, states)


@dataclass(frozen=True)
class CosineReward:
    """r(x) = height cos(frequency (x - centre)), bounded; x scalar."""

    height: float = 1.0
    frequency: float = 2.0
    centre: float = 0.4
    differentiable: ClassVar[bool] = True

    def __call__(self, states: Float[Tensor, "n 1"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """One number for each state."""
        return self.height * torch.cos(self.frequency * (states[:, 0] - self.centre))
