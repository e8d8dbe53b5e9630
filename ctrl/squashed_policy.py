"""Gaussian policies squashed into a bounded interval, and entropies estimated by samples.

    a = middle + half tanh(z),   z ~ N(mean(t, x), L(t, x) L(t, x)'),   half = (high - low) / 2
    log pi(a | t, x) = log N(z) - sum_i log(half_i (1 - tanh(z_i)^2))      (change of variables)

([H18] appendix C.) The density, the KL of two of them over one interval (that of the Gaussians,
since one map makes both) and, by quadrature, mean and standard deviation are exact. The entropy

    H = H(z) + sum_i (log half_i + E log(1 - tanh(z_i)^2))

has no closed form: ``entropy`` refuses, ``entropy_estimates`` estimates it by samples.

Sources  [H18] Haarnoja, Zhou, Abbeel & Levine 2018, soft actor-critic, arXiv 1801.01290.
"""

import math
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    TanhTransform,
    Transform,
    TransformedDistribution,
)

from ctrl.devices import as_like
from ctrl.policy import GaussianPolicy, MultivariateGaussianPolicy, RandomPolicy, mean_action

_RULE = tuple(
    torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(64)
)  # converges geometrically: tanh has poles at distance pi / (2 std); 1e-13 at std 1, 1e-6 at 3


@dataclass(frozen=True, eq=False)
class SquashedGaussianPolicy:
    """a = middle + half tanh(z), z the action of a Gaussian policy: never outside (low, high).

    Attributes:
        latent: the Gaussian policy of z.
        low: of every coordinate of the action, a number or [*action].
        high: the same; above ``low``.
        is_random: True.
    """

    latent: GaussianPolicy | MultivariateGaussianPolicy
    low: float | Tensor = -1.0
    high: float | Tensor = 1.0
    is_random: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.latent, GaussianPolicy | MultivariateGaussianPolicy):
            raise TypeError(
                f"latent must be a Gaussian policy, got {type(self.latent).__name__}; "
                "SquashedGaussianPolicy(GaussianPolicy(mean, std), low, high)"
            )
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real | Tensor):
                raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
        low, high = (torch.as_tensor(each).double() for each in (self.low, self.high))
        width = high - low
        if not bool(((width > 0) & torch.isfinite(width)).all()):
            raise ValueError(f"low must be below high, both finite, got {self.low} and {self.high}")

    def squash(self, z: Float[Tensor, " paths *action"]) -> Float[Tensor, " paths *action"]:
        """Actions of latent actions, strictly inside the interval (as far as digits can tell)."""
        middle, half = self._interval(z)
        inside = 1 - torch.finfo(z.dtype).eps
        return middle + half * torch.tanh(z).clamp(-inside, inside)

    def unsquash(self, actions: Float[Tensor, " paths *action"]) -> Float[Tensor, " paths *action"]:
        """Latent actions: finite for actions in [low, high], infinite outside.

        An action that rounding has put on the boundary is taken for its neighbour inside; near it
        the latent action has few digits, eps / (1 - tanh(z)^2).
        """
        middle, half = self._interval(actions)
        u = (actions - middle) / half
        eps = torch.finfo(actions.dtype).eps
        z = torch.atanh(u.clamp(-1 + eps, 1 - eps))
        return torch.where(u.abs() > 1 + 8 * eps, math.inf * u.sign(), z)

    def mean(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Tensor:
        """The mean action, by quadrature over each coordinate (64 Gauss-Hermite nodes)."""
        return self.moments(t, states)[0]

    def moments(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every coordinate of the action, [paths, *action]."""
        center = mean_action(self.latent, t, states)
        std = _marginal_std(self.latent, t, center, states)
        middle, half = self._interval(center)
        first, second = torch.zeros_like(center), torch.zeros_like(center)
        points, masses = _RULE
        for point, mass in zip(points.tolist(), (masses / masses.sum()).tolist(), strict=True):
            u = torch.tanh(center + point * std)
            first, second = first + mass * u, second + mass * u.square()
        return middle + half * first, half * (second - first.square()).clamp_min(0).sqrt()

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """The squashed latent action; ``mean`` only has its shape, the states determine the rest.

        Raises:
            ValueError: there is no noise, or it has not the mean's shape; or no states.
        """
        if states is None:
            raise ValueError("states must be given to a squashed policy: act(mean, t, noise, x)")
        center = mean_action(self.latent, t, states)
        return self.squash(self.latent.act(center, t, noise, states))

    def noise_of(
        self, actions: Tensor, mean: Tensor, t: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """The latent policy's noise; few digits are left of it where tanh saturates."""
        if states is None:
            raise ValueError("states must be given to a squashed policy: noise_of(a, mean, t, x)")
        center = mean_action(self.latent, t, states)
        return self.latent.noise_of(self.unsquash(actions), center, t, states)

    def distribution(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Distribution:
        """The law of the action of every path; its ``entropy`` is not implemented."""
        base = self.latent.distribution(t, states)
        middle, half = self._interval(base.mean)
        transforms: list[Transform] = [TanhTransform(), AffineTransform(middle, half)]
        return TransformedDistribution(base, transforms, validate_args=False)

    def log_prob(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        actions: Float[Tensor, " paths *action"],
    ) -> Float[Tensor, " paths"]:
        """Log-density of actions, nats; minus infinity outside [low, high].

        Raises:
            ValueError: ``actions`` have not the mean's shape.
        """
        z = self.unsquash(actions)
        outside = z.isinf().reshape(len(z), -1).any(1)
        z = torch.where(z.isinf(), 0.0, z)
        density = self.latent.log_prob(t, states, z) - self._log_slope(z)
        return torch.where(outside, -math.inf, density)

    def entropy(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Float[Tensor, " paths"]:
        """Refused: it has no closed form.

        Raises:
            ValueError: always; ``entropy_estimates`` is what there is.
        """
        raise ValueError(
            "the entropy of a squashed Gaussian has no closed form: estimate it by samples, "
            "ctrl.entropy_estimates(policy, t, states, noise), or use what needs "
            "log_prob alone (returns and martingales along paths, GibbsQ)"
        )

    def _interval(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = as_like(self.low, like), as_like(self.high, like)
        for name, bound in (("low", low), ("high", high)):
            if bound.ndim and bound.shape != like.shape[1:]:
                raise ValueError(
                    f"{name} must be one number or {list(like.shape[1:])}, as actions are, got "
                    f"{list(bound.shape)}"
                )
        return (low + high) / 2, (high - low) / 2

    def _log_slope(self, z: Float[Tensor, " paths *action"]) -> Float[Tensor, " paths"]:
        """log |da / dz|, summed over coordinates; without cancellation where tanh saturates."""
        _, half = self._interval(z)
        squash = 2 * (math.log(2) - z - torch.nn.functional.softplus(-2 * z))
        return (half.log() + squash).reshape(len(z), -1).sum(1)


def entropy_estimates(
    policy: RandomPolicy,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    noise: Float[Tensor, "samples paths *action"],
) -> Float[Tensor, "samples paths"]:
    """Estimates of the differential entropy, -log pi(a) of drawn actions: each unbiased, nats.

    The standard error is the caller's, from the samples.

    Args:
        policy: any that has a density.
        t: time, [].
        states: x.
        noise: standard normals (or nodes of a rule, whose weighted mean is then the entropy).

    Raises:
        ValueError: the noise has not the actions' shape.
    """
    if noise.ndim < 2 or noise.shape[1] != len(states):
        raise ValueError(
            f"noise must be [samples, {len(states)}, *action], got {list(noise.shape)}"
        )
    mean = mean_action(policy, t, states)
    drawn = [policy.act(mean, t, one, states) for one in noise]
    return torch.stack([-policy.log_prob(t, states, action) for action in drawn])


def _marginal_std(
    policy: GaussianPolicy | MultivariateGaussianPolicy, t: Tensor, mean: Tensor, states: Tensor
) -> Tensor:
    """Standard deviation of every coordinate."""
    if isinstance(policy, GaussianPolicy):
        return policy.std_at(t, mean, states)
    return policy.scale_at(t, mean, states).square().sum(-1).sqrt()
