"""PCPO: a surrogate that is linear in the log-ratio, with the same credit for every step.

Loss         of a step, to be minimised: kl_weight KL_k - c_k (A + min(A log rho_k, clip |A|)), with
             rho_k, A and KL_k as in ``grpo``. As rho is about 1 + log rho this is -A (1 + log rho)
             with uniform weights; the min is PPO's clip, one-sided: a step whose log-ratio is
             beyond ``clip`` on the side that A wants has no gradient.
Weights      With epsilon = -sigma score the mean of step k shifts by w_k (epsilon_th - epsilon_old)
             standard deviations, w_k = |score_gain_k| / (std_k sigma_k), so that grad log rho_k is
             w_k times a factor of the network's alone. c_k = mean(w) / w_k makes this factor the
             same at every step; without ``uniform_weights`` c_k = 1. For 50 trailing steps of
             Stable Diffusion 1.5, eta = 1, w is 0.37 to 4.50 (the last step's), its mean 0.53.
Exact        Without ``uniform_weights`` the reward term's gradient at the sampling policy is that
             of GRPO, whatever the clip.
Biased       (1) Uniform weights: the gradient of no function of the chain's law. On the
             linear-Gaussian model of the tests, at 50 steps, it is 1.24 times as long as that of
             E r and off by 24 % of its size, nearly all of it length (cosine 0.9997); at 3 steps
             2.8 times as long (cosine 0.984). As the KL is not weighed, uniform weights are another
             kl_weight at every step, kl_weight / c_k. (2) No importance weight: away from the
             sampling policy the gradient is E_old[A grad log p_th], that at the sampling policy
             plus a pull back to it of E_old[A] times the shift. A step whose mean has shifted by
             delta standard deviations has the exact gradient for a linear reward, and none of it
             (true: 2 delta) for the reward z^2 - 1. (3) The hinge takes 2 % of a step's gradient
             where its mean has shifted by half a standard deviation along a linear reward, 64 %
             where by one, with ``clip`` 1.64. (4) As GRPO's, (1) and (2) there.
Fixed point  On ``diffusion_envs.exact.GaussianProblem``, as in ``grpo``: -30.9 percent of the gain
             with uniform weights (c is 0.13 to 1.92 there, above 1 at 18 of 20 steps), as GRPO
             without (79.4).
Published    (1) For diffusions the paper does not weigh: it gives DDIM another variance at every
             step, one that makes w constant, so that its gradient stays that of E r on another
             chain; for flows it weighs, by the length of the step. Here DDIM is as it was, and the
             loss is weighed; with an action that is no score it is refused. (2) The paper has the
             form max(0, xi |A| - A log rho), which differs by a constant of the roll-out, and a
             small xi; ours is as wide as GRPO's. (3) No KL on diffusions. (4) A note on the paper
             says 4.5 for the mean of w; what enters it is not known, and ours is above.

Sources      [P] Lee & Ye 2026, PCPO, ICLR, arXiv 2509.25774. Neither the paper nor its code
             (github.com/jaylee2000/pcpo) was read: the abstract and two published notes with its
             equations were. The form -A (1 + log rho) is that of a fork for Stable Diffusion 1.5,
             not read either.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.objectives.grpo import GroupRelative
from diffusion_envs.objectives.path_steps import Rows, Steps, trusted_width
from diffusion_envs.ranges import require_positive
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
