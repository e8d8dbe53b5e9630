"""GRPO-Guard: a log-ratio of mean 0, in units of the state, and steps weighed by their length."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.trust_region import clipped_surrogate
from diffusion_envs.objectives.grpo import GroupRelative
from diffusion_envs.objectives.path_steps import Rows, Steps
from diffusion_envs.objectives.protocol import require_positive


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
