"""DDPO: denoising as a decision process of many steps, rewarded at its end.

Objective    J(th) = E_th[ r(X_T, prompt) ]; nothing keeps the policy near the pretrained model.
Gradient     DDPO-SF  E sum_k grad log p_th(x_{k+1} | x_k) A
             DDPO-IS  E_old sum_k grad min(rho_k A, clip(rho_k) A)
             with rho_k = p_th(x_{k+1} | x_k) / p_old(x_{k+1} | x_k), and A the reward standardised
             within its prompt and clipped.
Exact        With A = r and one optimiser step a roll-out both are unbiased for grad J.
Biased       (1) Standardising n rewards of a prompt by their own mean multiplies the prompt's
             gradient by 1 - 1/n, and dividing by their own standard deviation s makes it one of J_p
             / s_p: in all sqrt(1 - 1/n) c4(n) / sigma for Gaussian rewards of standard deviation
             sigma, c4(n) = E chi_{n-1} / sqrt(n - 1); that is 0.56, 0.80, 0.95 / sigma at n = 2, 4,
             16. Prompts whose rewards vary little so weigh as much as the others. (2) Later
             optimiser steps of a roll-out see states of the old policy: IS corrects each step's
             density, not that of the states before it, nor of the steps after it. On the
             linear-Gaussian model of the tests its gradient is off by 31 % of its size at a policy
             0.05 nats of path KL away, at any number of steps. (3) The clip takes 2 % of a step's
             gradient where its mean has shifted by half a standard deviation along a linear reward,
             64 % where by one. (4) SF corrects nothing, so the loop refuses it more than one
             optimiser step a roll-out.
Published    As there, s is the population's (n in the denominator) plus 1e-6. Not as there: (1) A
             buffer of a prompt's last 16 to 32 rewards, over updates; prompts with fewer than 16
             are standardised by the whole roll-out. An objective has no state: here they are the
             roll-out's own, and the least number is ``min_count``. (2) Log-densities are means over
             pixels, so rho is the d-th root of the ratio of densities: it is 1 up to 1e-4, weighs
             nothing, and has 1/d of the gradient, which AdamW does not see but the clipping of
             gradients does. Here rho is the ratio. (3) The clip is on rho, here on log rho, which
             is the same up to 5e-5 of it. 1e-4 a pixel is 1.64 nats a step at 4 x 64 x 64.

Sources      [B] Black, Janner, Du, Kostrikov & Levine 2023, arXiv 2305.13301. Settings: their
             PyTorch code (aesthetic score, Stable Diffusion 1.4).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctrl.devices import sent
from ctrl.trust_region import clipped_surrogate
from diffusion_envs.objectives.path_steps import (
    PathObjective,
    Rows,
    transition_log_ratio,
    trusted_width,
)
from diffusion_envs.objectives.protocol import per_prompt
from diffusion_envs.ranges import require_numbers, require_positive
from diffusion_envs.rollout import Rollout

STD_OFFSET = 1e-6  # reward, added to a standard deviation before dividing; as published


def standardised(
    rewards: Float[Tensor, " paths"], condition: Int64[Tensor, " paths"], min_count: int
) -> Float[Tensor, " paths"]:
    """Standardised rewards of each prompt, or of all where it has fewer than ``min_count``."""
    host, condition = rewards.cpu(), condition.cpu()
    by_all = per_prompt(host, torch.zeros_like(condition), STD_OFFSET)
    count = condition.bincount()[condition]
    own = per_prompt(host, condition, STD_OFFSET)
    return sent(torch.where(count < min_count, by_all, own), rewards.device)


@dataclass(frozen=True)
class _DDPO(PathObjective):
    """What the two estimators share: the advantage."""

    learning_rate: float = 3e-4  # of the adapter, AdamW
    advantage_clip: float = 5.0  # in standard deviations of the reward
    min_count: int = 2  # prompts with fewer paths are standardised by the whole roll-out

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(learning_rate=self.learning_rate, advantage_clip=self.advantage_clip)
        if self.min_count < 2:
            raise ValueError(
                "min_count must be at least 2, as the standard deviation of one reward is 0, got "
                f"{self.min_count}"
            )

    @property
    def needs_reference(self) -> bool:
        """False: no KL is charged."""
        return False

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """The standardised, clipped reward, the same at every step."""
        rewards = standardised(rollout.rewards, rollout.condition, self.min_count)
        clipped = rewards.clamp(-self.advantage_clip, self.advantage_clip)
        return clipped[:, None].expand_as(rollout.costs)


@dataclass(frozen=True)
class DDPOScoreFunction(_DDPO):
    """DDPO-SF: one step along the score function of a fresh roll-out."""

    needs_fresh_rollouts: ClassVar[bool] = True

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-log density * advantage, one number per row; its gradient is what counts."""
        return -transition_log_ratio(rows) * rows.advantage


@dataclass(frozen=True)
class DDPO(_DDPO):
    """DDPO-IS: importance-weighted, clipped, for several optimiser steps a roll-out."""

    clip: float = 1.64  # trusted |log-ratio| of a step, nats: 1e-4 a pixel of 4 x 64 x 64
    clip_per_pixel: float | None = None  # the published convention: times the coordinates

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(clip=self.clip)
        if self.clip_per_pixel is not None:
            require_positive(clip_per_pixel=self.clip_per_pixel)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Half-width of the trusted log-ratios, the same at every step."""
        return trusted_width(rows, self.clip, self.clip_per_pixel)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-min(ratio A, clipped ratio A), one number per row."""
        return -clipped_surrogate(self.log_ratio(rows), rows.advantage, self.half_width(rows))
