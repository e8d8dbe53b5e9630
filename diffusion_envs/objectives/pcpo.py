"""PCPO: a surrogate that is linear in the log-ratio, with the same credit for every step."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.objectives.grpo import GroupRelative
from diffusion_envs.objectives.path_steps import Rows, Steps, trusted_width
from diffusion_envs.objectives.protocol import require_positive
from diffusion_envs.samplers import GaussianSteps


@dataclass(frozen=True, eq=False)
class CreditRows(Rows):
    """Rows with the factor of each one's surrogate; its mean over steps of credit * w is w's."""

    credit: Float[Tensor, " rows"]


def native_weights(sampler: GaussianSteps) -> Float[Tensor, " steps"]:
    """w of every step: the shift of its mean, in standard deviations, per change of the noise."""
    return sampler.gain / (sampler.std * sampler.sigma[:-1])


@dataclass(frozen=True)
class PCPO(GroupRelative):
    """Hinge in the log-ratio, with uniform step weights, on the group's advantages."""

    clip: float = 1.64  # log-ratio from which a step is good enough, nats: 1e-4 a pixel
    clip_per_pixel: float | None = None  # the published convention: times the coordinates
    uniform_weights: bool = True  # the same weight of every step's change of noise; else its own

    needs_scores: ClassVar[bool] = True  # a change of the score, in units of predicted noise

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(clip=self.clip)
        if self.clip_per_pixel is not None:
            require_positive(clip_per_pixel=self.clip_per_pixel)

    def rows(self, common: Rows, steps: Steps) -> CreditRows:
        """Rows with the credit of their steps."""
        weights = native_weights(steps.sampler)
        credit = weights.mean() / weights if self.uniform_weights else torch.ones_like(weights)
        return CreditRows(**vars(common), credit=steps.at_step(credit))

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Log-ratio at which the hinge is, the same at every step."""
        return trusted_width(rows, self.clip, self.clip_per_pixel)

    def loss(self, rows: CreditRows) -> Float[Tensor, " rows"]:
        """-credit (A + min(A log-ratio, clip |A|)) + kl_weight * KL, one number per row."""
        most = self.half_width(rows) * rows.advantage.abs()
        gain = torch.minimum(rows.advantage * self.log_ratio(rows), most)
        return self.kl_cost(rows) - rows.credit * (rows.advantage + gain)
