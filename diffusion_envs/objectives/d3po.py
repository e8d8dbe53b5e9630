"""D3PO: direct preference optimisation of every step, from pairs of images of one prompt.

Loss         of a pair that shares its prompt and its starting noise, w preferred to l, at each step
                 -log sigmoid(beta (clip L_w - clip L_l)),
             L = log p_th(x_{k+1} | x_k) - log p_pre(x_{k+1} | x_k) of each path's own transition.
             The loss of a tie is 0. No reward enters but by the order of the pair.
At the start (th = pre, where L = 0) the expected gradient is -2 beta times that of the probability
             of being preferred to a fellow sample: exact, whatever the clip. With a reward that is
             linear and Gaussian given the start that is beta / sqrt(pi) grad E[r] / std(r).
Bias         The loss of a step ignores the others. If preferences follow the
             Bradley-Terry law sigmoid(r_w - r_l) (``preferences.BradleyTerry``), the loss of whole
             paths is least at the tilt pre * exp(r / beta); the sum over steps is least at a
             smaller shift, as noise of the other steps makes choices look random: on 4 equal steps
             3 % smaller where r has a standard deviation of 0.3 given the start, 22 % at 1, 60 % at
             3. If the larger reward always wins there is no such minimum.
Clip         As published ratio and clip are those of the mean over coordinates, and the clip is
             on both sides of both ratios: outside it the gradient is exactly 0, also where it would
             lead back. With beta = 0.1 and 1 +- 0.1 a loss lies within [0.6832, 0.7032] whatever is
             learned, so that a flat curve at log 2 = 0.693 says nothing. On 16384 coordinates it is
             a clip of +-1600 nats, and beta is 6e-6 a nat: the trusted range all but never ends.
Differences  The log-ratio is that of the whole step; ``beta_per_pixel`` and ``clip_per_pixel`` are
             converted by the number of coordinates. ``beta`` and ``clip`` replace them, in nats.

Sources      Yang et al. 2023, "Using human feedback to fine-tune diffusion models without any
             reward model", arXiv 2311.13231; defaults of the authors' code.
             Rafailov et al. 2023, direct preference optimization, arXiv 2305.18290.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusion_envs.objectives.path_steps import (
    PathObjective,
    Rows,
    Steps,
    coordinates,
    reference_log_ratio,
)
from diffusion_envs.ranges import require_numbers, require_positive
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True, eq=False)
class PreferenceRows(Rows):
    """Rows of which some are preferred to others of their group."""

    preference: Float[Tensor, " rows"]  # larger is preferred within a group


def preference_of(steps: Steps) -> Float[Tensor, " rows"]:
    """The preference of each row's path."""
    assert steps.rollout.preferences is not None  # needs_preferences
    return steps.rollout.preferences[steps.path].to(steps.rollout.costs)


@dataclass(frozen=True)
class D3PO(PathObjective):
    """Direct preference optimisation, step by step."""

    beta_per_pixel: float = 0.1  # logits per nat of the log-ratio's mean over coordinates
    clip_per_pixel: float = 0.1  # trusted ratios to the pretrained model, of that mean: 1 +- clip
    beta: float | None = None  # logits per nat of the whole step, instead
    clip: float | None = None  # trusted log-ratio of the whole step, nats, instead; may be infinite
    learning_rate: float = 3e-5  # of the adapter, AdamW

    needs_preferences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(
            beta_per_pixel=self.beta_per_pixel,
            clip_per_pixel=self.clip_per_pixel,
            learning_rate=self.learning_rate,
        )
        if not self.clip_per_pixel < 1:
            raise ValueError(
                f"clip_per_pixel must be less than 1 (ratios are positive), got "
                f"{self.clip_per_pixel}"
            )
        if self.beta is not None:
            require_positive(beta=self.beta)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")

    @property
    def group(self) -> int:
        """Two: a group is a pair."""
        return 2

    @property
    def shared_start(self) -> bool:
        """The paths of a pair differ in the noise of their steps alone."""
        return True

    def trusted(self, rows: Rows) -> tuple[float, float]:
        """Lower and upper end of the log-ratios that are learned from, nats on the whole step."""
        if self.clip is not None:
            return -self.clip, self.clip
        low, high = math.log1p(-self.clip_per_pixel), math.log1p(self.clip_per_pixel)
        return coordinates(rows) * low, coordinates(rows) * high

    def clipped(self, rows: Rows) -> Float[Tensor, " rows"]:
        """1 where a row's ratio to the pretrained model is clipped: it has no gradient."""
        low, high = self.trusted(rows)
        ratio = reference_log_ratio(rows)
        return ((ratio < low) | (ratio > high)).to(ratio)

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """Zeros: the loss reads preferences only."""
        return torch.zeros_like(rollout.costs)

    def rows(self, common: Rows, steps: Steps) -> PreferenceRows:
        """Rows with the preferences of their paths."""
        return PreferenceRows(**vars(common), preference=preference_of(steps))

    def loss(self, rows: PreferenceRows) -> Float[Tensor, " rows"]:
        """-log sigmoid of beta times the preferred step's clipped log-ratio over the other's."""
        beta = self.beta_per_pixel / coordinates(rows) if self.beta is None else self.beta
        one, other = reference_log_ratio(rows).clamp(*self.trusted(rows)).view(-1, 2).unbind(1)
        first, second = rows.preference.view(-1, 2).unbind(1)
        loss = -functional.logsigmoid(beta * (first - second).sign() * (one - other))
        return torch.where(first == second, 0 * loss, loss).repeat_interleave(2)
