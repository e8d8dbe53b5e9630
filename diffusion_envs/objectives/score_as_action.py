"""Score as Action: continuous-time policy gradient in two views, and the recipe that was published.

Objective    J(th) = E_th[ r(X_T) ] - kl_weight * KL(P_th || P_pre), the KL of paths ([SaA] Theorem
             3.1).
Gradient     E int grad log pi(a_t | t, X_t) (dV(t, X_t) + running reward dt) ([SaA] Theorem 4.1).
The action is the score. Its randomness can be put in two places, which give two estimators of one
gradient:

  transitions  the score is a function of the state, the decision is the next state, its randomness
               the SDE's own noise: grad log p(x_{k+1} | x_k). Needs a sampler with a density.
  drawn        the score is drawn from N(mean, action_std^2) and held over the step: grad log
               pi(a_k | x_k). Any solver will do; variance grows as the exploration shrinks.

Sources      [SaA] Zhao, Chen, Zhang, Yao & Tang 2025, "Score as Action", arXiv 2502.01819.
             The published recipe: the settings of the authors' released Stable Diffusion 1.5 run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import GaussianPolicy, Policy
from ctrl.policy_gradient import clipped_surrogate, continuous_gae
from diffusion_envs.objectives.path_steps import (
    PathObjective,
    Rows,
    Steps,
    coordinates,
    path_kl_rate,
    transition_log_ratio,
)
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive
from diffusion_envs.rewards.rounding import rounding
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True, eq=False)
class DrawnRows(Rows):
    """Rows whose decision is the score that was drawn."""

    action: Float[Tensor, " rows *event"]  # the drawn score
    action_std: Float[Tensor, " rows"]


def drawn_log_ratio(rows: DrawnRows) -> Float[Tensor, " rows"]:
    """log pi_th(a_k | x_k) - log pi_old(a_k | x_k) of a Gaussian policy, summed, nats."""
    shift = (rows.mean - rows.old_mean).flatten(1) / rows.action_std[:, None]
    drawn = (rows.action - rows.old_mean).flatten(1) / rows.action_std[:, None]
    return (shift * drawn - 0.5 * shift.square()).sum(1)


@dataclass(frozen=True)
class _ContinuousTime(PathObjective):
    """What the two views share: KL-regularised advantages and a step-independent trust region."""

    learning_rate: float = 3e-3  # of the adapter, AdamW
    kl_weight: float = 0.1  # reward per nat of path KL from the pretrained model
    gae_rate: float = 0.5  # forgetting of temporal differences, per unit of int g^2 dt
    clip: float = 1.0  # trusted std of the whole path's log-ratio, nats; a step's is sqrt(share)
    clip_per_pixel: float | None = None  # the older convention: on the mean over coordinates
    denoised: bool = True  # values start from r(x0_hat): one more reward query a step of each path

    needs_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self)
        require_not_negative(kl_weight=self.kl_weight)
        if not self.gae_rate >= 0:  # infinity is one-step differences
            raise ValueError(f"gae_rate must be at least 0, got {self.gae_rate}")
        require_positive(clip=self.clip, learning_rate=self.learning_rate)
        if self.clip_per_pixel is not None:
            require_positive(clip_per_pixel=self.clip_per_pixel)

    @property
    def needs_reference(self) -> bool:
        """Whether a KL is charged."""
        return self.kl_weight > 0

    @property
    def cost_weight(self) -> float:
        """The KL is a running cost."""
        return self.kl_weight

    @property
    def denoised_rewards(self) -> bool:
        """Whether values start from r(x0_hat), as in the paper."""
        return self.denoised

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """Continuous GAE of reward minus KL cost, centred over the paths at every step.

        Centring subtracts (up to the factor 1 - 1/paths) the mean of the *other* paths, a baseline.
        """
        assert rollout.values is not None  # needs_value
        rewards = torch.zeros_like(rollout.costs)
        if self.kl_weight > 0:  # costs are not known where nothing charges them
            rewards = -self.kl_weight * rollout.costs
        gains = continuous_gae(rollout.values, rewards, rollout.step_sizes, self.gae_rate)
        return gains - gains.mean(0)

    def _gain(self, rows: Rows) -> Float[Tensor, " rows"]:
        return clipped_surrogate(self.log_ratio(rows), rows.advantage, self.half_width(rows))

    def _kl_cost(self, rows: Rows) -> float | Float[Tensor, " rows"]:
        """kl_weight * path KL rate; 0 without a weight, as no pretrained scores are there then."""
        return self.kl_weight * path_kl_rate(rows) if self.kl_weight > 0 else 0.0

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """clip * sqrt(share of the step in the horizon), or clip_per_pixel * coordinates."""
        if self.clip_per_pixel is not None:
            return torch.full_like(rows.step_size, self.clip_per_pixel * coordinates(rows))
        return self.clip * (rows.step_size / rows.horizon).sqrt()


@dataclass(frozen=True)
class ScoreAsAction(_ContinuousTime):
    """Continuous-time policy gradient where the decision is the next state (theory: view B)."""

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-(clipped ratio * advantage) + kl_weight * path KL, one number per row, reward."""
        return self._kl_cost(rows) - self._gain(rows)


@dataclass(frozen=True)
class ScoreAsActionSampled(_ContinuousTime):
    """Continuous-time policy gradient where the decision is a drawn score, held (theory: view A).

    The score is drawn with standard deviation ``exploration / sigma``, which is ``exploration`` in
    units of predicted noise. The KL cost is charged on the mean, not on the drawn score (the two
    differ by a constant of the policy's variance, theory of exploratory control).
    """

    exploration: float = 0.3  # std of the drawn score, in units of predicted noise
    needs_density: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(exploration=self.exploration)

    def policy(
        self, mean: Callable[[Tensor, Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
    ) -> Policy:
        """Gaussian around the network's score."""
        return GaussianPolicy(mean, lambda t: self.action_std(sigma(t)))

    def action_std(self, sigma: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """exploration / sigma."""
        return self.exploration / sigma

    def rows(self, common: Rows, steps: Steps) -> DrawnRows:
        """Rows with the scores that were drawn."""
        return DrawnRows(
            **vars(common),
            action=steps.rollout.at("actions", steps.path, steps.step),
            action_std=self.action_std(steps.at_step(steps.sampler.sigma[:-1])),
        )

    def log_ratio(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Log density of the drawn score, current over sampling policy, nats."""
        assert isinstance(rows, DrawnRows)
        return drawn_log_ratio(rows)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-(clipped ratio * advantage) + kl_weight * path KL, one number per row, reward."""
        return self._kl_cost(rows) - self._gain(rows)


@dataclass(frozen=True)
class ScoreAsActionReleased(PathObjective):
    """The recipe of the authors' released run: PPO with a one-step value difference, no KL.

    Advantages V(x_{k+1}) - V(x_k), standardised over the paths at every step and clipped; ratio and
    clip on the mean log-density over coordinates. It weights the times of the theorem's integral
    unequally, and its trust region depends on resolution and step: here for comparison.

    What the loop does otherwise: (1) The released run fits V to a roll-out before its advantages
    are computed, here after. In the smallest loop of the tests the two differ little, as values
    start from the reward of the denoised image: they are correlated by 0.98 or more (192 samples,
    4 passes of the fit). (2) The fit weighs all steps alike there, by int g^2 here: the first half
    of 50 trailing steps of Stable Diffusion 1.5 has 76 % of the weight, not 50 %. (3) A process
    standardises its own m paths there, here the paths of all: that multiplies the gradient for
    Gaussian advantages by (1 - 1/m) c4(m) = 0.69, 0.92 at m = 4, 16 (see ``ddpo``).
    """

    clip_per_pixel: float = 1.5e-5  # trusted |log-ratio| of a step, nats, over the coordinates
    advantage_clip: float = 5.0  # in standard deviations
    learning_rate: float = 5e-5  # of the adapter, AdamW

    needs_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(
            clip_per_pixel=self.clip_per_pixel,
            advantage_clip=self.advantage_clip,
            learning_rate=self.learning_rate,
        )

    @property
    def needs_reference(self) -> bool:
        """False: no KL is charged."""
        return False

    @property
    def denoised_rewards(self) -> bool:
        """Whether values start from r(x0_hat), as in the paper."""
        return True

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """Value differences, standardised per step over the paths, clipped."""
        assert rollout.values is not None  # needs_value
        gains = rollout.values.diff(dim=1)
        rounded = rounding(rollout.values.T)[:, 0]
        floor = torch.maximum(rounded[:-1], rounded[1:])
        # the offset is the released code's guard against a constant reward
        std = torch.maximum(gains.std(0), floor) + 1e-8
        return ((gains - gains.mean(0)) / std).clamp(-self.advantage_clip, self.advantage_clip)

    def log_ratio(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Log-ratio of the transition, the mean over coordinates instead of the sum, nats."""
        return transition_log_ratio(rows) / coordinates(rows)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """The clip on the mean log-ratio."""
        return torch.full_like(rows.step_size, self.clip_per_pixel)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-(clipped ratio * advantage), one number per row."""
        return -clipped_surrogate(self.log_ratio(rows), rows.advantage, self.half_width(rows))
