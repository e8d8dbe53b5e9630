"""Policies: what to do at (t, x), drawn from explicit noise.

In this view of an action (view A) the policy draws it and the dynamics hold it over a step; its
density is the policy's. Where the decision is the next state (view B), see ``ctrl.transitions``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
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
    is_random: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_mean(self.mean)

    def act(self, mean: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """The mean."""
        return mean


@dataclass(frozen=True)
class GaussianPolicy:
    """a ~ N(mean(t, x), std(t)^2 I).

    Attributes:
        mean: of the action.
        std: a positive number, or a function of time that returns one (a number or a tensor []).
    """

    mean: Mean
    std: float | Callable[[Tensor], Tensor | float]
    is_random: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        _check_mean(self.mean)
        if callable(self.std):
            return
        if isinstance(self.std, bool) or not isinstance(self.std, Real):
            raise TypeError(f"std must be a number or a function of time, got {self.std!r}")
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ValueError(f"std must be positive and finite (or a function), got {self.std}")

    def std_at(self, t: Tensor, like: Tensor | None = None) -> Float[Tensor, ""]:
        """The standard deviation at a time, in the dtype and on the device of ``like`` (or of t).

        Raises:
            ValueError: it is not one number.
        """
        value = self.std(t) if callable(self.std) else self.std
        like = t if like is None else like
        std = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        if std.ndim:
            raise ValueError(f"std must be one number at a time, got {list(std.shape)}")
        return std

    def act(self, mean: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        """The mean plus std * noise.

        Raises:
            ValueError: there is no noise, or it has not the mean's shape.
        """
        if noise is None or noise.shape != mean.shape:
            given = "none" if noise is None else str(list(noise.shape))
            raise ValueError(f"noise must be {list(mean.shape)}, as the mean is, got {given}")
        return mean + self.std_at(t, mean) * noise

    def log_prob(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        actions: Float[Tensor, " paths *action"],
    ) -> Float[Tensor, " paths"]:
        """Log-density of actions, summed over coordinates, nats.

        Raises:
            ValueError: ``actions`` have not the mean's shape, or std is not positive at ``t``.
        """
        mean = self.mean(t, states)
        if actions.shape != mean.shape:
            raise ValueError(
                f"actions must be {list(mean.shape)}, as the mean is, got {list(actions.shape)}"
            )
        std = self._positive_std(t, actions)
        z = ((actions - mean) / std).reshape(len(mean), -1)
        return -(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)

    def entropy(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Float[Tensor, " paths"]:
        """Differential entropy, nats; may be negative.

        Raises:
            ValueError: std is not positive at ``t``.
        """
        coordinates = self.mean(t, states).reshape(len(states), -1)
        each = 0.5 * math.log(2 * math.pi * math.e) + self._positive_std(t, coordinates).log()
        return (each * coordinates.shape[1]).expand(len(coordinates))

    def _positive_std(self, t: Tensor, like: Tensor) -> Float[Tensor, ""]:
        std = self.std_at(t, like)
        if not bool((std > 0) & torch.isfinite(std)):
            raise ValueError(
                f"std must be positive and finite, at t = {float(t):g} it is {float(std):g}"
            )
        return std


def _check_mean(mean: Mean) -> None:
    if not callable(mean):
        raise TypeError(f"mean must be a function of (t, states), got {mean!r}")
