"""Policies: what to do at (t, x), drawn from explicit noise.

In this view of an action (view A) the policy draws it and the dynamics hold it over a step; its
density is the policy's. Where the decision is the next state (view B), see ``ctrl.transitions``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from ctrl.devices import as_like, readable, require
from ctrl.user_functions import call, no_tensor, require_order, takes

Mean = Callable[[Tensor, Tensor], Tensor]
"""(time [], states [paths, *event]) -> [paths, *action]."""


@runtime_checkable
class Policy(Protocol):
    """Anything that acts."""

    def mean(self, t: Tensor, states: Tensor, /) -> Tensor:
        """The mean action."""
        ...

    @property
    def is_random(self) -> bool:
        """Whether ``act`` needs noise."""
        ...

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The action, from its mean and a standard normal of its shape, at these states."""
        ...


@runtime_checkable
class RandomPolicy(Policy, Protocol):
    """A policy that draws its actions and has their density; the entropy may be refused."""

    def distribution(self, t: Tensor, states: Tensor) -> Distribution:
        """The law of the action of every path: batch shape [paths], event shape [*action]."""
        ...

    def log_prob(self, t: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """Log-density of actions, [paths], nats."""
        ...

    def entropy(self, t: Tensor, states: Tensor) -> Tensor:
        """Differential entropy, [paths], nats."""
        ...


@runtime_checkable
class ReparametrisedPolicy(Policy, Protocol):
    """A policy whose action determines the noise that made it."""

    def noise_of(
        self, actions: Tensor, mean: Tensor, t: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """The standard normals that ``act`` turns into these actions."""
        ...


@dataclass(frozen=True)
class DeterministicPolicy:
    """a = mean(t, x).

    Attributes:
        mean: (t, states [paths, *event]) -> [paths, *action].
        is_random: False.
    """

    mean: Mean
    is_random: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _check_mean(self.mean)

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The mean."""
        return mean


@dataclass(frozen=True, eq=False)
class GaussianPolicy:
    """a ~ N(mean(t, x), diag(std(t, x)^2)).

    Attributes:
        mean: of the action.
        std: a positive number, or one for each coordinate, [*action]; or a function of time that
            returns either; or a function of (t, states) that returns [paths, *action].
        is_random: True.
    """

    mean: Mean
    std: float | Tensor | Callable[..., Tensor | float]
    is_random: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        _check_mean(self.mean)
        if callable(self.std):
            require_order("std", self.std, "(t, states)")
            return
        if isinstance(self.std, bool) or not isinstance(self.std, Real | Tensor):
            raise TypeError(f"std must be a number, a tensor or a function, got {self.std!r}")
        std = torch.as_tensor(self.std)
        if not bool(((std > 0) & torch.isfinite(std)).all()):
            raise ValueError(f"std must be positive and finite (or a function), got {self.std}")

    @cached_property
    def sees_states(self) -> bool:
        """Whether std is a function of (t, states): one that cannot be called with t alone."""
        return callable(self.std) and needs_states(self.std)

    def std_at(
        self, t: Tensor, like: Tensor | None = None, states: Tensor | None = None
    ) -> Float[Tensor, " *action"]:
        """The standard deviation at a time, in the dtype and on the device of ``like`` (or of t).

        Args:
            t: time, [].
            like: the mean action, [paths, *action].
            states: x, where the standard deviation depends on it.

        Raises:
            ValueError: it is neither one number nor one for each coordinate, or not positive and
                finite; or it depends on the state and is not one for each path and coordinate, or
                the states are missing.
            TypeError: a function returned something else than a number or a tensor.
        """
        kind = t if like is None else like
        if callable(self.std) and self.sees_states:
            value = as_like(call("std", self.std, t, _needed(states, "std")), kind)
            if like is not None and value.shape != like.shape:
                raise ValueError(
                    f"std must return {list(like.shape)}, as actions are, where it is a function "
                    f"of (t, states), got {list(value.shape)}"
                )
            return _positive_std(t, value)
        value = self.std(t) if callable(self.std) else self.std
        if not isinstance(value, (Tensor, Real)):
            raise TypeError(f"std must return a number or a tensor, got {type(value).__name__}")
        std = as_like(value, kind)
        if std.ndim and like is not None and std.shape != like.shape[1:]:
            raise ValueError(
                f"std must be one number or {list(like.shape[1:])}, as actions are, got "
                f"{list(std.shape)}"
            )
        # a number was looked at when the policy was made; a tensor may have changed since
        return std if isinstance(self.std, Real) else _positive_std(t, std)

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The mean plus std * noise.

        Raises:
            ValueError: there is no noise, or it has not the mean's shape; or std is not positive
                and finite, or depends on the state, which is missing.
        """
        noise = checked_noise(mean, noise)
        if isinstance(self.std, Real):
            return torch.add(mean, noise, alpha=float(self.std))
        return mean + self.std_at(t, mean, states) * noise

    def noise_of(
        self, actions: Tensor, mean: Tensor, t: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """(a - mean) / std."""
        return (actions - mean) / self.std_at(t, mean, states)

    def distribution(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Distribution:
        """The law of the action of every path.

        Raises:
            ValueError: std is not positive and finite at ``t``.
        """
        mean = self.mean(t, states)
        std = self.std_at(t, mean, states)
        return Independent(Normal(mean, std, validate_args=False), mean.ndim - 1)

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
        return _log_prob(self.distribution(t, states), actions)

    def entropy(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Float[Tensor, " paths"]:
        """Differential entropy, nats; may be negative.

        Raises:
            ValueError: std is not positive at ``t``.
        """
        return self.distribution(t, states).entropy()


@dataclass(frozen=True, eq=False)
class MultivariateGaussianPolicy:
    """a ~ N(mean(t, x), L(t, x) L(t, x)'), its coordinates dependent.

    Attributes:
        mean: of the action, [paths, dim].
        scale_tril: L, lower triangular with a positive diagonal, [dim, dim]; or a function of time
            that returns it; or a function of (t, states) that returns [paths, dim, dim].
        is_random: True.
    """

    mean: Mean
    scale_tril: Tensor | Callable[..., Tensor]
    is_random: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        _check_mean(self.mean)
        if isinstance(self.scale_tril, Tensor):
            _check_scale(self.scale_tril, 2)
        elif not callable(self.scale_tril):
            raise TypeError(f"scale_tril must be a tensor or a function, got {self.scale_tril!r}")

    @cached_property
    def sees_states(self) -> bool:
        """Whether L is a function of (t, states): one that cannot be called with t alone."""
        return callable(self.scale_tril) and needs_states(self.scale_tril)

    def scale_at(
        self, t: Tensor, like: Tensor, states: Tensor | None = None
    ) -> Float[Tensor, "*paths dim dim"]:
        """L at a time, in the dtype and on the device of ``like``; of every path if it sees states.

        Raises:
            ValueError: it is not lower triangular with a positive diagonal, of the actions' size;
                or it depends on the state, which is missing.
        """
        scale = self.scale_tril
        if callable(scale):
            sees = self.sees_states
            inputs = (t, _needed(states, "scale_tril")) if sees else (t,)
            scale = _check_scale(call("scale_tril", scale, *inputs), 3 if sees else 2)
            if sees and len(scale) != len(like):
                raise ValueError(
                    f"scale_tril must return [{len(like)}, dim, dim], one for each path, got "
                    f"{list(scale.shape)}"
                )
        if like.ndim != 2 or scale.shape[-1] != like.shape[1]:
            raise ValueError(
                f"scale_tril is {list(scale.shape)} and does not fit actions {list(like.shape)}"
            )
        return as_like(scale, like)

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The mean plus L noise.

        Raises:
            ValueError: there is no noise, or it has not the mean's shape; or L depends on the
                state, which is missing.
        """
        noise = checked_noise(mean, noise)
        if self.sees_states:
            return mean + (self.scale_at(t, mean, states) @ noise.unsqueeze(2)).squeeze(2)
        return mean + noise @ self.scale_at(t, mean).T

    def noise_of(
        self, actions: Tensor, mean: Tensor, t: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """L^{-1} (a - mean)."""
        scale, gap = self.scale_at(t, mean, states), (actions - mean).unsqueeze(2)
        return torch.linalg.solve_triangular(scale, gap, upper=False).squeeze(2)

    def distribution(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Distribution:
        """The law of the action of every path."""
        mean = self.mean(t, states)
        return MultivariateNormal(
            mean, scale_tril=self.scale_at(t, mean, states), validate_args=False
        )

    def log_prob(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        actions: Float[Tensor, "paths dim"],
    ) -> Float[Tensor, " paths"]:
        """Log-density of actions, nats.

        Raises:
            ValueError: ``actions`` have not the mean's shape.
        """
        return _log_prob(self.distribution(t, states), actions)

    def entropy(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Float[Tensor, " paths"]:
        """Differential entropy, nats; may be negative."""
        return self.distribution(t, states).entropy()


def policy_kl(
    policy: RandomPolicy,
    reference: RandomPolicy,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
) -> Float[Tensor, " paths"]:
    """KL(pi(. | t, x) || pi_ref(. | t, x)) of every path's action, nats.

    Of the actions that the policies draw (view A), not of the paths: ``girsanov.path_kl`` is that,
    and does not see the covariance of the actions.

    Raises:
        ValueError: the two are of kinds whose KL has no closed form (a squashed Gaussian against
            one that is not squashed, or over another interval), or their actions differ in shape.
        TypeError: one does not draw its actions.
    """
    for name, each in (("policy", policy), ("reference", reference)):
        if not isinstance(each, RandomPolicy):
            raise TypeError(
                f"{name} must draw its actions and know their density, got {type(each).__name__}; "
                "girsanov.path_kl compares deterministic policies, by the paths that they lead to"
            )
    law, law_ref = policy.distribution(t, states), reference.distribution(t, states)
    require_equal_actions(
        law.batch_shape + law.event_shape, law_ref.batch_shape + law_ref.event_shape
    )
    try:
        return kl_divergence(law, law_ref)
    except NotImplementedError as unknown:  # torch has no formula for the two
        raise ValueError(
            f"policies must be of kinds whose KL has a closed form, got {type(policy).__name__} "
            f"and {type(reference).__name__} (squashed ones over one interval); average "
            "policy.log_prob - reference.log_prob over drawn actions instead"
        ) from unknown


def require_equal_actions(shape: Sequence[int], reference: Sequence[int]) -> None:
    """Refuse two policies whose actions have different shapes, which would broadcast.

    Raises:
        ValueError: they differ.
    """
    if tuple(shape) != tuple(reference):
        raise ValueError(
            f"reference must have actions of the policy's shape {list(shape)}, got "
            f"{list(reference)}"
        )


def mean_action(
    policy: Policy, t: Tensor, states: Float[Tensor, " paths *event"]
) -> Float[Tensor, " paths *action"]:
    """The policy's mean action at every state, refused where it does not fit them.

    Raises:
        TypeError: it is not a tensor.
        ValueError: there is not one action for each path, or the policy writes into the states.
    """
    try:
        function = policy.mean
    except AttributeError as missing:
        raise TypeError(
            f"policy must have a mean action at (t, x), got {type(policy).__name__}; a policy with "
            "memory is for simulate and for what goes along its paths (ctrl.memory)"
        ) from missing
    mean = call("policy.mean", function, t, states)
    if not isinstance(mean, Tensor):
        wanted = f"[{len(states)}, *action], one action a path"
        raise no_tensor("policy.mean", mean, wanted, f"({len(states)}, 1)")
    if mean.ndim < 1 or len(mean) != len(states):
        raise ValueError(
            f"policy.mean must return [{len(states)}, *action], one action a path, got "
            f"{list(mean.shape)}; .expand(len(x), ...) of states x repeats one for all"
        )
    return mean


def _positive_std(t: Tensor, std: Tensor) -> Tensor:
    """``std``, refused where it is not positive; inside vmap, where nothing can be read, NaN."""
    alone = not std.ndim and std.device.type == "cpu" and readable(std)
    if alone and 0 < float(std.detach()) < math.inf:
        return std  # which is cheaper than three kernels
    good = (std > 0) & (std < math.inf)
    if not readable(whole := good.all()):
        return torch.where(good, std, math.nan)
    require(
        whole,
        lambda: ValueError(
            f"std must be positive and finite, at t = {float(t):g} it is "
            f"{std[~good].flatten()[:3].tolist()}"
        ),
    )
    return std


def needs_states(function: Callable[..., object]) -> bool:
    """Whether a function is one of (t, states): it cannot be called with t alone."""
    if isinstance(function, torch.nn.Module):
        function = function.forward
    return takes(function, 2) and not takes(function, 1)


def _needed(states: Tensor | None, name: str) -> Tensor:
    if states is None:
        raise ValueError(
            f"states must be given: {name} depends on them; act(mean, t, noise, states)"
        )
    return states


def checked_noise(mean: Tensor, noise: Tensor | None) -> Tensor:
    """``noise``, refused where it has not the mean's shape."""
    if noise is None or noise.shape != mean.shape:
        shape = "none" if noise is None else str(list(noise.shape))
        raise ValueError(f"noise must be {list(mean.shape)}, as the mean is, got {shape}")
    return noise


def _log_prob(law: Distribution, actions: Tensor) -> Tensor:
    shape = law.batch_shape + law.event_shape
    if actions.shape != shape:
        raise ValueError(
            f"actions must be {list(shape)}, as the mean is, got {list(actions.shape)}"
        )
    return law.log_prob(actions)


def _check_scale(scale: Tensor, ndim: int) -> Tensor:
    """``scale``, refused where it is no factor; inside vmap, where nothing can be read, NaN."""
    if scale.ndim != ndim or scale.shape[-1] != scale.shape[-2]:
        wanted = "[dim, dim]" if ndim == 2 else "[paths, dim, dim], being of (t, states)"
        raise ValueError(f"scale_tril must be {wanted}, got {list(scale.shape)}")
    diagonal = scale.diagonal(dim1=-2, dim2=-1)
    positive, lower = torch.isfinite(scale).all() & (diagonal > 0).all(), ~scale.triu(1).any()
    if not readable(positive & lower):
        return torch.where(positive & lower, scale, math.nan)
    require(positive, lambda: ValueError("scale_tril must be finite, with a positive diagonal"))
    require(lower, lambda: ValueError("scale_tril must be lower triangular"))
    return scale


def _check_mean(mean: Mean) -> None:
    if not callable(mean):
        raise TypeError(f"mean must be a function of (t, states), got {mean!r}")
    require_order("mean", mean, "(t, states)")
