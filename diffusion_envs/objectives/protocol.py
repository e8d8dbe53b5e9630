"""What an objective is, and what it is shown: a roll-out to judge, then rows of it to learn from.

An objective is a frozen dataclass of hyperparameters with two pure functions. ``advantages`` sees
a whole
roll-out once, before the weights move; ``loss`` sees rows, each one step of one path, and carries
the gradient. What it needs is declared, so that a sampler or a reward that cannot serve is refused
at the start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from ctrl import Policy


@dataclass(frozen=True, eq=False)
class Rollout:
    """Paths sampled from one policy, with their scores, costs, values and rewards.

    Time is RL time: step k leads from node k to node k + 1; node 0 is noise, the last node is data.
    """

    states: Float[Tensor, "paths nodes *event"]
    means: Float[Tensor, "paths steps *event"]  # the policy's mean score at the left of each step
    actions: Float[Tensor, "paths steps *event"]  # the score that was used; means, if not drawn
    noises: Float[Tensor, "paths steps *event"]  # standard normals that drove the transitions
    reference_scores: Float[Tensor, "paths steps *event"]
    costs: Float[Tensor, "paths steps"]  # path KL of each step from the pretrained model, nats
    values: Float[Tensor, "paths nodes"] | None  # reward; the last column is the terminal reward
    rewards: Float[Tensor, " paths"]
    step_sizes: Float[Tensor, " steps"]  # int g^2 dt over each step: the clock in which g = 1
    condition: Int64[Tensor, " paths"]  # index of the prompt


@dataclass(frozen=True, eq=False)
class Rows:
    """Single steps of paths with the current policy's score; only ``mean`` carries a gradient."""

    mean: Float[Tensor, " rows *event"]  # current policy
    old_mean: Float[Tensor, " rows *event"]  # the policy that sampled
    reference_score: Float[Tensor, " rows *event"]  # pretrained, frozen
    action: Float[Tensor, " rows *event"]
    noise: Float[Tensor, " rows *event"]
    advantage: Float[Tensor, " rows"]
    step_size: Float[Tensor, " rows"]  # int g^2 dt
    horizon: Float[Tensor, ""]  # sum of all step sizes of a path
    score_gain: Float[Tensor, " rows"]  # d(mean of the next state) / d(score)
    std: Float[Tensor, " rows"]  # of the transition
    action_std: Float[Tensor, " rows"]  # of the drawn score; 0 if it is not drawn
    kl_factor: float  # ((1 + eta^2) / (2 eta))^2


@runtime_checkable
class Objective(Protocol):
    """A way to improve a policy, as a frozen dataclass of its hyperparameters."""

    learning_rate: float
    needs_density: bool
    needs_reward_gradient: bool
    needs_preferences: bool
    needs_value: bool

    def policy(
        self, mean: Callable[[Tensor, Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
    ) -> Policy:
        """How roll-outs act, given the network's score and the noise level at a time."""
        ...

    def action_std(self, sigma: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Spread of the drawn score at a noise level; 0 if it is not drawn."""
        ...

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """What each decision of the roll-out was worth, in reward."""
        ...

    def log_ratio(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Log density of each row's decision, current over sampling policy, nats."""
        ...

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Trusted size of the log-ratio of each row, nats."""
        ...

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Negative surrogate objective of each row; mean times steps estimates a path's."""
        ...
