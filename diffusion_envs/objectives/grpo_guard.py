"""GRPO-Guard: a log-ratio of mean 0, in units of the state, and steps weighed by their length.

Loss         of a step, to be minimised: kl_weight KL_k - v_k min(e_k A, clip(e_k) A), with A and
             KL_k as in ``grpo``. Where the new mean is s_k of the old standard deviations away,
                 log rho_k = <s_k, z> - |s_k|^2 / 2,   z the standard normal of the step,
                 log e_k   = (std_k / mean std) (log rho_k + |s_k|^2 / 2):
             under the old policy it has mean 0, where log rho has -|s|^2 / 2, and its standard
             deviation is the shift of the mean in the state's units, not in those of the noise
             (RatioNorm). v_k is 1 / (length of the step in time), times a constant that gives
             u_k = v_k std_k / mean std, the weight of log rho_k's gradient, the mean 1.
Exact        In one step of unit scale, the gradient at the sampling policy.
Biased       (1) The weights u_k: the gradient is that of no function of the chain's law. On the
             linear-Gaussian model of the tests, 50 steps, they are 0.10 to 1.58, least near the
             data, and it is off by 12 % of its size (cosine 0.994); at 3 steps by 40 % (0.934). As
             the KL is not weighed, it has the price kl_weight / u_k at step k. (2) e is no
             importance weight: its mean under the old policy is exp(|s|^2 / 2) at unit scale, 1.13
             for a shift of half a standard deviation, and the gradient along a linear reward is
             (1 + |s|^2) exp(|s|^2 / 2) of the true one: 1.42 there, 3.3 at one. What is left of A
             in the mean pushes on in the direction of the shift, by |s| exp(|s|^2 / 2) E[A], where
             the true gradient is 0: with rho, -|s|^2 / 2 had cancelled it. (3) As DDPO's (2) and
             GRPO's (1) and (2).
Fixed point  On ``diffusion_envs.exact.GaussianProblem``, as in ``grpo``: 83.2 percent of the gain.
Published    (1) e has the exponent std <s, z> / d, a mean over coordinates, and its range is
             2e-6 to 4e-6; v is 1 / (time of the step). Here the exponent is a sum, in units of the
             mean std: 2e-6 at 16 x 64 x 64 and ten steps of a = 0.7 and shift 3 (mean std 0.42) are
             0.31 nats, and constants go into the mean of u. (2) The clip is on e, here on log e.
             (3) Groups of 24 by their own standard deviation, learning rate 1e-4, no KL, two
             optimiser steps a roll-out. (4) There std^2 = sigma_t^2 h, h the time of the step, on a
             flow: u_k is sigma_t / sqrt(h), and the velocity's gradient at time t from the data has
             the weight 1 + sigma_t^2 (1 - t) / (2 t), whatever h. On DDIM the time is the noise
             table's and std is DDIM's.

Sources      [P] Wang, Liang, Liu et al. 2025, GRPO-Guard, arXiv 2510.22319: the abstract was read,
             the paper was not. Formulas and settings: train_sd3_GRPO_Guard.py and grpo_guard.py as
             a fork of github.com/yifan123/flow_grpo keeps them, and the same formulas in the
             documentation of verl-omni.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.trust_region import clipped_surrogate
from diffusion_envs.objectives.grpo import GroupRelative
from diffusion_envs.objectives.path_steps import Rows, Steps
from diffusion_envs.ranges import require_positive


@dataclass(frozen=True, eq=False)
class GuardRows(Rows):
    """Rows with the scale of their log-ratio and the weight of their loss.

    Attributes:
        scale: standard deviation of the transition, over its mean of all steps.
        weight: inverse length of the step in time, such that scale * weight has mean 1.
    """

    scale: Float[Tensor, " rows"]
    weight: Float[Tensor, " rows"]


@dataclass(frozen=True)
class GRPOGuard(GroupRelative):
    """Clipped policy gradient with normalised ratios and weights that undo the steps' lengths."""

    clip: float = 0.3  # trusted |normalised log-ratio|, nats at the mean std: 2e-6 a pixel, below

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(clip=self.clip)

    def rows(self, common: Rows, steps: Steps) -> GuardRows:
        """Rows with their scale and weight, from the sampler's tables."""
        std, time = steps.sampler.std, steps.sampler.grid.steps
        scale = std / std.mean()
        weight = 1 / (time * (scale / time).mean())
        return GuardRows(**vars(common), scale=steps.at_step(scale), weight=steps.at_step(weight))

    def normalised(self, rows: GuardRows) -> Float[Tensor, " rows"]:
        """scale (log-ratio + |shift|^2 / 2) = scale <shift, z>: mean 0 under the old policy."""
        shift = (rows.mean - rows.old_mean).flatten(1) * (rows.score_gain / rows.std)[:, None]
        return rows.scale * (shift * rows.noise.flatten(1)).sum(1)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Half-width of the trusted normalised log-ratios, the same at every step."""
        return torch.full_like(rows.step_size, self.clip)

    def clipped(self, rows: Rows) -> Float[Tensor, " rows"]:
        """1 where the normalised log-ratio is outside its range."""
        assert isinstance(rows, GuardRows)
        return (self.normalised(rows).abs() > self.half_width(rows)).to(rows.step_size)

    def loss(self, rows: GuardRows) -> Float[Tensor, " rows"]:
        """-weight min(ratio A, clipped ratio A) + kl_weight * KL, one number per row."""
        gain = clipped_surrogate(self.normalised(rows), rows.advantage, self.half_width(rows))
        return self.kl_cost(rows) - rows.weight * gain
