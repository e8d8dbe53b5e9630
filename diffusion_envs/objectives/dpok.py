"""DPOK: KL-regularised policy gradient with a value baseline and a truncated ratio.

Objective    J(th) = E_th[ r(X_T, prompt) ] - kl_weight "KL" from the pretrained model.
Loss         of a step, to be minimised ([F] algorithm 1 and the authors' code):
               -reward_weight (r - V(t_k, x_k)) clip(rho_k) + kl_weight |epsilon_th - epsilon_pre|^2
             rho_k = p_th(x_{k+1} | x_k) / p_old(x_{k+1} | x_k). The ratio is truncated, not PPO's
             minimum: outside the range it has no gradient in either direction, so that a step that
             has left the range gets no gradient back into it.
Exact        At equal policies, and for any V, the reward term's gradient is reward_weight grad E r.
Biased       (1) The published "KL" is the square of the noise prediction's change, alike for all
             steps. KL(p_th(. | x_k) || p_pre(. | x_k)) is (score_gain / (std sigma))^2 / 2
             times that square: 0.070 to 10.1 nats (a factor of 145) over 50 trailing steps of
             Stable Diffusion 1.5 at eta = 1. The last 5 steps have 73 % of the sum of the KL's
             weights, and 10 % of the published ones, which leave these steps almost free.
             ``exact_kl`` takes the KL itself; kl_weight then is per nat, and the published 0.01 is
             0.032 a nat by the mean of these weights.
             (2) Either is differentiated at the states that were visited, but the policy also
             decides which those are, and so what the later steps cost. On the linear-Gaussian model
             of the tests the penalty's gradient is off by 34 % (published) and 42 % (exact KL) of
             its size.
             (3) The truncation takes 2 % of a step's gradient where its mean has shifted by half a
             standard deviation along a linear reward, 64 % where by one; PPO's minimum takes as
             much on the way up the reward, and nothing on the way down. (4) As in ``ddpo``, later
             optimiser steps of a roll-out see states of the old policy.
Fixed point  Because of (2) each step weighs its own penalty against the reward to come, and what
             later steps pay is ignored. On ``diffusion_envs.exact.GaussianProblem`` that converges
             to 60.4 percent (published), 81.2 (``exact_kl``) of the gain that E[r] - kl_weight
             (path KL) allows at 20 steps, exactly; at 100 steps 21.3 and 95.6. More samples do not
             help.
Corrected    ``path_kl`` is the gradient of J with the SDE's path KL, whole: the penalty is that KL,
             and what the later steps pay is taken from the return, and V fits the difference. The
             optimum is then the one fixed point; the path KL without the return converges to 97.8.
Published    (1) Steps are drawn from a buffer of 1000, here from the roll-out: nearly the same, as
             20 paths fill it. (2) V is a perceptron on latent and prompt with a gain for each step,
             fitted by plain mean squares to the final reward; here it is the loop's value network.
             (3) Log-densities and the penalty are means over coordinates, here sums of both: that
             keeps their balance, and the gradient is d times theirs, which AdamW does not see.
             The published clip of 1e-4 a pixel is 1.64 nats a step at 4 x 64 x 64.

Sources      [F] Fan, Watkins, Du, Liu, Ryu, Boutilier, Abbeel, Ghavamzadeh, Lee & Lee 2023,
             arXiv 2305.16381. Settings: the authors' single-prompt run; for many prompts they take
             reward_weight 1000 and kl_weight 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diffusion_envs.objectives.path_steps import (
    PathObjective,
    Rows,
    Steps,
    path_kl_rate,
    transition_kl,
    trusted_width,
)
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True, eq=False)
class NoiseLevelRows(Rows):
    """Rows with the noise level at the left of each step: epsilon = -sigma score."""

    sigma: Float[Tensor, " rows"]


def noise_gap(rows: Rows) -> Float[Tensor, " rows"]:
    """|epsilon_th - epsilon_pre|^2 of every row, summed; epsilon = -sigma score."""
    assert isinstance(rows, NoiseLevelRows)
    assert rows.reference_score is not None
    gap = (rows.mean - rows.reference_score).flatten(1) * rows.sigma[:, None]
    return gap.square().sum(1)


def truncated_surrogate(
    log_ratio: Float[Tensor, " rows"],
    advantage: Float[Tensor, " rows"],
    half_width: Float[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """clip(ratio) A: no gradient outside the range, whatever the sign of A."""
    return log_ratio.clamp(-half_width, half_width).exp() * advantage


@dataclass(frozen=True)
class DPOK(PathObjective):
    """Policy gradient with a learned baseline, held near the pretrained noise prediction."""

    learning_rate: float = 1e-5  # of the adapter, AdamW
    reward_weight: float = 10.0  # factor of the reward in the loss
    kl_weight: float = 0.01  # per |change of noise|^2 of a step; per nat with one of the KLs
    clip: float = 1.64  # trusted |log-ratio| of a step, nats: 1e-4 a pixel of 4 x 64 x 64
    clip_per_pixel: float | None = None  # the published convention: times the coordinates
    exact_kl: bool = False  # the transition's KL for the square of the change of noise
    path_kl: bool = False  # the SDE's path KL for it, charged to the return too: no bias (2)

    needs_value: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True  # a change of the score, in units of predicted noise

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(
            learning_rate=self.learning_rate, reward_weight=self.reward_weight, clip=self.clip
        )
        require_not_negative(kl_weight=self.kl_weight)
        if self.clip_per_pixel is not None:
            require_positive(clip_per_pixel=self.clip_per_pixel)
        if self.exact_kl and self.path_kl:
            raise ValueError("exact_kl and path_kl are two penalties: set one of them")

    @property
    def needs_reference(self) -> bool:
        """Whether a KL is charged."""
        return self.kl_weight > 0

    @property
    def cost_weight(self) -> float:
        """Reward per nat, if the path KL is charged to the return."""
        return self.kl_weight / self.reward_weight if self.path_kl else 0.0

    @property
    def reward_per_nat(self) -> float | None:
        """That of the reward's own weight, if a KL in nats is charged."""
        if not (self.exact_kl or self.path_kl):
            return None
        return self.kl_weight / self.reward_weight or None

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """r - V at the left of every step; with ``path_kl`` less what the later steps cost."""
        assert rollout.values is not None  # needs_value
        gains = rollout.rewards[:, None] - rollout.values[:, :-1]
        if not self.path_kl:
            return gains
        later = rollout.costs.flip(1).cumsum(1).flip(1) - rollout.costs
        return gains - self.cost_weight * later

    def rows(self, common: Rows, steps: Steps) -> NoiseLevelRows:
        """Rows with their noise levels."""
        return NoiseLevelRows(**vars(common), sigma=steps.at_step(steps.sampler.sigma[:-1]))

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Half-width of the trusted log-ratios, the same at every step."""
        return trusted_width(rows, self.clip, self.clip_per_pixel)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-(truncated ratio * weighted advantage) + weighted penalty, one number per row."""
        gain = truncated_surrogate(self.log_ratio(rows), rows.advantage, self.half_width(rows))
        penalty_of = transition_kl if self.exact_kl else noise_gap
        penalty = (path_kl_rate if self.path_kl else penalty_of)(rows)
        return self.kl_weight * penalty - self.reward_weight * gain
