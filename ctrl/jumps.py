"""Jumps of a controlled SDE: compound Poisson, with an intensity that state and action may move.

    dX = b dt + sigma dW + sum over kinds of int sizes(t, X, a, z) N(dt, dz)

N(dt, dz) counts jumps of mark z; its compensator is intensity(t, X, a) law(dz) dt, and nothing is
compensated for: where a martingale is wanted the drift holds the compensator. A jump adds to the
generator, and a change of the intensity (the sizes unchanged) to the relative entropy of paths

    L V  +=  intensity E_z[ V(t, x + sizes(t, x, a, z)) - V(t, x) ]          ([OS07] Theorem 1.22)
    KL   +=  E int (l log(l / l_ref) - l + l_ref) dt,  l the intensity       ([B81] VI.2, VIII.1)

A step of a roll-out is exact in law where the coefficients are constant in time and state. In
general it holds the intensity of its left end, draws the number of jumps from Poisson's law by
inversion of one injected normal, and lets them follow the solver's step one after the other, each
from where the last one led: weak order 1, whatever the solver's.

Sources  [OS07] Oksendal & Sulem, Applied Stochastic Control of Jump Diffusions, 2nd ed.
         [B81] Bremaud 1981, Point Processes and Queues: Martingale Dynamics.
         [PB10] Platen & Bruti-Liberati, Numerical Solution of SDEs with Jumps in Finance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require
from ctrl.user_functions import call, like_states, one_a_path, require_order, takes

Intensity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths], jumps/time."""
Sizes = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(time, states, actions, marks [paths, dim]) -> [paths, *event], state."""


@runtime_checkable
class MarkLaw(Protocol):
    """Law of the marks of jumps, by what it makes of normals and by a rule for its expectations."""

    @property
    def dim(self) -> int:
        """Coordinates of a mark; as many normals make one."""
        ...

    def from_normals(self, normals: Float[Tensor, "paths dim"]) -> Float[Tensor, "paths dim"]:
        """Marks, of independent standard normals."""
        ...

    def rule(self, like: Tensor) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "nodes dim"]]:
        """Weights and marks of a quadrature rule, in the dtype and on the device of ``like``."""
        ...


@dataclass(frozen=True)
class NoMarks:
    """Jumps whose size time, state and action decide.

    Attributes:
        dim: of a mark: 0, there is none.
    """

    dim: int = 0

    def from_normals(self, normals: Float[Tensor, "paths dim"]) -> Float[Tensor, "paths dim"]:
        """Nothing."""
        return normals

    def rule(self, like: Tensor) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "nodes dim"]]:
        """One node."""
        return like.new_ones(1), like.new_zeros(1, 0)


@dataclass(frozen=True)
class NormalMarks:
    """One mark z ~ N(mean, std^2).

    Attributes:
        mean: of z.
        std: of z, at least 0.
        nodes: of the Gauss-Hermite rule; exact for polynomials of degree up to 2 nodes - 1.
    """

    mean: float = 0.0
    std: float = 1.0
    nodes: int = 24

    def __post_init__(self) -> None:
        _require_number("mean", self.mean)
        _require_number("std", self.std, at_least=0.0)

    @property
    def dim(self) -> int:
        """One."""
        return 1

    def from_normals(self, normals: Float[Tensor, "paths dim"]) -> Float[Tensor, "paths dim"]:
        """Mean + std normal."""
        return self.mean + self.std * normals

    def rule(self, like: Tensor) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "nodes dim"]]:
        """Gauss-Hermite's."""
        points, weights = np.polynomial.hermite_e.hermegauss(self.nodes)
        return _as_rule(like, weights / weights.sum(), self.mean + self.std * points)


@dataclass(frozen=True)
class ExponentialMarks:
    """One mark z > 0 of density exp(-z / mean) / mean.

    Attributes:
        mean: of z, positive.
        nodes: of the Gauss-Laguerre rule; exact for polynomials of degree up to 2 nodes - 1.
    """

    mean: float = 1.0
    nodes: int = 24

    def __post_init__(self) -> None:
        _require_number("mean", self.mean, above=0.0)

    @property
    def dim(self) -> int:
        """One."""
        return 1

    def from_normals(self, normals: Float[Tensor, "paths dim"]) -> Float[Tensor, "paths dim"]:
        """By inversion: -mean log(1 - Phi(normal))."""
        return -self.mean * torch.special.log_ndtr(-normals)

    def rule(self, like: Tensor) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "nodes dim"]]:
        """Gauss-Laguerre's."""
        points, weights = np.polynomial.laguerre.laggauss(self.nodes)
        return _as_rule(like, weights / weights.sum(), self.mean * points)


@dataclass(frozen=True)
class DiscreteMarks:
    """One mark out of finitely many.

    Attributes:
        values: of z.
        probabilities: of each; they sum to 1.
    """

    values: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.probabilities) or not self.values:
            raise ValueError(
                f"probabilities must be {len(self.values)} numbers, one for each value, got "
                f"{self.probabilities}"
            )
        for each in self.values:
            _require_number("values", each)
        for each in self.probabilities:
            _require_number("probabilities", each, at_least=0.0)
        if abs(math.fsum(self.probabilities) - 1) > 1e-9:
            raise ValueError(f"probabilities must sum to 1, got {math.fsum(self.probabilities)}")

    @property
    def dim(self) -> int:
        """One."""
        return 1

    def from_normals(self, normals: Float[Tensor, "paths dim"]) -> Float[Tensor, "paths dim"]:
        """By inversion of Phi(normal)."""
        until = as_like(torch.tensor(self.probabilities, dtype=torch.float64).cumsum(0), normals)
        which = torch.searchsorted(until[:-1].contiguous(), torch.special.ndtr(normals))
        return as_like(torch.tensor(self.values, dtype=torch.float64), normals)[which]

    def rule(self, like: Tensor) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "nodes dim"]]:
        """Every value with its probability: exact."""
        return _as_rule(like, np.array(self.probabilities), np.array(self.values))


@dataclass(frozen=True)
class Jumps:
    """One kind of jumps, x -> x + sizes(t, x, a, z) at the times of a Poisson process.

    Attributes:
        intensity: expected jumps per unit of time, at least 0, [paths].
        sizes: what a jump of mark z adds to the state, as the states are.
        marks: the law of z; no marks if not given.
    """

    intensity: Intensity
    sizes: Sizes
    marks: MarkLaw = NoMarks()  # frozen

    def __post_init__(self) -> None:
        if not callable(self.intensity) or not takes(self.intensity, 3):
            raise TypeError(
                f"intensity must be a function of (t, states, actions), got {self.intensity!r}"
            )
        if not callable(self.sizes) or not takes(self.sizes, 4):
            raise TypeError(
                f"sizes must be a function of (t, states, actions, marks), got {self.sizes!r}"
            )
        require_order("intensity", self.intensity, "(t, states, actions)")
        require_order("sizes", self.sizes, "(t, states, actions, marks)")
        if isinstance(self.marks, type) or not isinstance(self.marks, MarkLaw):
            raise TypeError(f"marks must be a MarkLaw, got {self.marks!r}")

    def intensity_at(
        self, t: Tensor, states: Float[Tensor, " paths *event"], actions: Tensor
    ) -> Float[Tensor, " paths"]:
        """Expected jumps per unit of time, 1/time.

        Raises:
            ValueError: it is negative, not finite, or not one number a path.
        """
        rate = call("intensity", self.intensity, t, states, actions)
        rate = one_a_path("intensity", rate, len(states))
        least = rate.detach()
        holds = ((least >= 0) & torch.isfinite(least)).all()
        require(holds, lambda: _bad_intensity(least, t, states))
        return rate

    def sizes_at(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        actions: Tensor,
        marks: Float[Tensor, "paths dim"],
    ) -> Float[Tensor, " paths *event"]:
        """What a jump adds to each path, state.

        Raises:
            ValueError: the sizes have not the states' shape and dtype.
            TypeError: they are not a tensor.
        """
        size = call("sizes", self.sizes, t, states, actions, marks)
        return like_states("sizes", size, states)

    def rate_of_change(
        self,
        function: Callable[[Tensor], Tensor],
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        actions: Tensor,
    ) -> Float[Tensor, " paths"]:
        """intensity E_z[f(x + sizes) - f(x)], of f: states -> [paths], by the marks' rule."""
        rate, here = self.intensity_at(t, states, actions), function(states)
        change = torch.zeros_like(here)
        for weight, mark in zip(*self.marks.rule(states), strict=True):
            size = self.sizes_at(t, states, actions, mark.expand(len(states), -1))
            change = change + weight * (function(states + size) - here)
        return rate * change


@runtime_checkable
class JumpNoise(Protocol):
    """Injected standard normals that decide the jumps of a roll-out."""

    def for_jumps(self, k: int, kinds: int, like: Tensor) -> Tensor:
        """Of the numbers of jumps of step k, [paths, kinds], in the dtype of ``like``."""
        ...

    def for_marks(self, k: int, kind: int, j: int, begin: int, dim: int, like: Tensor) -> Tensor:
        """Of the marks of the j-th jumps of a kind in step k, [paths, dim].

        ``begin`` is the place of the kind's marks among those of all kinds.
        """
        ...


def add_jumps(
    kinds: tuple[Jumps, ...],
    noise: JumpNoise,
    k: int,
    t: Tensor,
    h: float,
    before: Float[Tensor, " paths *event"],
    after: Float[Tensor, " paths *event"],
    actions: Tensor,
) -> tuple[Float[Tensor, " paths *event"], Float[Tensor, "paths kinds"]]:
    """States with the jumps of a step, and how many there were of each kind.

    Args:
        kinds: of jumps.
        noise: that decides them.
        k: index of the step.
        t: its left end, [].
        h: its size.
        before: states at its left end, at which the intensities are.
        after: states where the continuous part of the step led.
        actions: held over it.

    Raises:
        ValueError: an intensity is negative or not finite; or gradients are asked for through it.
    """
    counts = list[Tensor]()
    normals, begin = noise.for_jumps(k, len(kinds), after), 0
    for i, kind in enumerate(kinds):
        expected = h * kind.intensity_at(t, before, actions)
        if expected.requires_grad:
            raise ValueError(
                "intensity must not depend on what a differentiable roll-out differentiates in "
                "(policy, state): numbers of jumps have no derivative, and the gradient along the "
                "paths would miss theirs; use a likelihood ratio (girsanov.log_ratio)"
            )
        count, j = poisson_counts(normals[:, i], expected), 0
        while bool((more := count > j).any()):
            drawn = noise.for_marks(k, i, j, begin, kind.marks.dim, after)
            jumped = after + kind.sizes_at(t, after, actions, kind.marks.from_normals(drawn))
            after = torch.where(more.view(-1, *[1] * (after.ndim - 1)), jumped, after)
            j += 1
        begin += kind.marks.dim
        counts.append(count)
    return after, torch.stack(counts, dim=1)


def poisson_counts(
    normals: Float[Tensor, " paths"], expected: Float[Tensor, " paths"]
) -> Float[Tensor, " paths"]:
    """Poisson numbers of given means, by inversion of standard normals.

    The count exceeds n where 1 - Phi(normal) < P(N > n), a gamma function's tail: no digits are
    lost to 1 - probability.

    Args:
        normals: independent.
        expected: means, at least 0.
    """
    rest = 0.5 * torch.special.erfc(normals * 0.5**0.5)  # torch's ndtr(-z) is 0 from z = 8 on
    count = torch.zeros_like(expected)
    more = rest < -torch.expm1(-expected)
    while bool(more.any()):
        count = count + more
        more = more & (rest < torch.special.gammainc(count + 1, expected))
    return count


def intensity_kl(
    rate: Float[Tensor, "*any"], reference: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """l log(l / l_ref) - l + l_ref, nats/time: rate of relative entropy of Poisson processes.

    Raises:
        ValueError: there are jumps where the reference has none: their KL is infinite.
    """
    _require_continuous(rate, reference)
    none = rate == 0
    ratio = torch.where(none, 1.0, rate) / torch.where(none, 1.0, reference)
    return torch.where(none, reference, rate * ratio.log() - rate + reference)


def intensity_log_ratio(
    counts: Float[Tensor, "*paths steps"],
    rate: Float[Tensor, "*paths steps"],
    reference: Float[Tensor, "*paths steps"],
    h: Float[Tensor, " steps"],
) -> Float[Tensor, "*paths steps"]:
    """N log(l / l_ref) - (l - l_ref) h, nats: log-ratio of two Poisson laws at their counts N.

    Raises:
        ValueError: there are jumps where the reference has none.
    """
    _require_continuous(rate, reference)
    none = rate == 0
    ratio = torch.where(none, 1.0, rate) / torch.where(none, 1.0, reference)
    return counts * ratio.log() - (rate - reference) * h


def _require_continuous(rate: Tensor, reference: Tensor) -> None:
    require(
        ~((reference == 0) & (rate > 0)).any(),
        lambda: ValueError(
            "the reference's intensity must be positive wherever the policy's is, or the laws have "
            "no likelihood ratio and their KL is infinite"
        ),
    )


def _bad_intensity(rate: Tensor, t: Tensor, states: Tensor) -> ValueError:
    if not bool(torch.isfinite(states).all()):
        return ValueError(
            f"states are not finite at t = {float(t):g}, where the intensity of jumps is asked "
            "for: drift, diffusion or the sizes of jumps before were not, or are too large for the "
            "step"
        )
    bad = ~((rate >= 0) & torch.isfinite(rate))
    return ValueError(
        f"intensity must be at least 0 and finite, but at t = {float(t):g} it is "
        f"{float(rate[bad][0]):g} on {int(bad.sum())} of {len(rate)} paths"
    )


def _as_rule(
    like: Tensor, weights: np.ndarray, points: np.ndarray
) -> tuple[Float[Tensor, " nodes"], Float[Tensor, "nodes dim"]]:
    return as_like(torch.as_tensor(weights), like), as_like(torch.as_tensor(points), like)[:, None]


def _require_number(
    name: str, value: float, *, at_least: float = -math.inf, above: float = -math.inf
) -> None:
    if not (math.isfinite(value) and value >= at_least and value > above):
        rule = "" if at_least == -math.inf else f" and at least {at_least:g}"
        rule = rule if above == -math.inf else f" and above {above:g}"
        raise ValueError(f"{name} must be finite{rule}, got {value}")
