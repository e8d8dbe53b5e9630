"""Policies: what to do at (t, x), drawn from explicit noise.

In this view of an action (view A) the policy draws it and the dynamics hold it over a step; its
density is the
policy's. Where the decision is the next state (view B), see ``ctrl.transitions``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Mean = Callable[[Tensor, Tensor], Tensor]
"""(time [], states [paths, *event]) -> [paths, *action]."""


@runtime_checkable
class Policy(Protocol):
    """Anything that acts."""

    def mean(self, t: Tensor, states: Tensor) -> Tensor:
        """The mean action."""
        ...

    @property
    def is_random(self) -> bool:
        """Whether ``act`` needs noise."""
        ...

    def act(self, mean: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """The action, from its mean and a standard normal of its shape."""
        ...


@dataclass(frozen=True)
class DeterministicPolicy:
    """a = mean(t, x)."""

    mean: Mean
    is_random: bool = False

    def act(self, mean: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """The mean."""
        return mean


@dataclass(frozen=True)
class GaussianPolicy:
    """a ~ N(mean(t, x), std(t)^2 I).

    Attributes:
        mean: of the action.
        std: a positive number, or a function of time.
    """

    mean: Mean
    std: float | Callable[[Tensor], Tensor | float]
    is_random: bool = True

    def __post_init__(self) -> None:
        if not callable(self.std) and not (self.std > 0 and math.isfinite(self.std)):
            raise ValueError(f"std must be positive and finite (or a function), got {self.std}")

    def std_at(self, t: Tensor) -> Tensor:
        """The standard deviation at a time, []."""
        return torch.as_tensor(self.std(t) if callable(self.std) else self.std)

    def act(self, mean: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """The mean plus std * noise."""
        assert noise is not None  # simulate gives it to policies that are random
        return mean + self.std_at(t).to(mean) * noise

    def log_prob(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        actions: Float[Tensor, " paths *action"],
    ) -> Float[Tensor, " paths"]:
        """Log-density of actions, summed over coordinates, nats."""
        std = self.std_at(t).to(actions)
        z = ((actions - self.mean(t, states)) / std).flatten(1)
        return -(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)

    def entropy(self, t: Tensor, states: Tensor) -> Float[Tensor, " paths"]:
        """Differential entropy, nats; may be negative."""
        coordinates = self.mean(t, states).flatten(1)
        std = self.std_at(t).to(coordinates)
        each = 0.5 * math.log(2 * math.pi * math.e) + std.log()
        return (each * coordinates.shape[1]).expand(len(coordinates))
