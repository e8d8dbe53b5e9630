"""First exit from a domain: where a path is absorbed, and whether it left between two nodes.

    tau = inf {t : X_t not in D}    the terminal reward is paid at tau, or at the horizon if earlier

A path that is looked at at its nodes alone misses the exits in between, which makes expectations
wrong by O(sqrt(h)). Between two nodes an Euler step is a Brownian bridge. If both of its ends are
inside, at distances d0 and d1 from a flat wall, it has crossed the wall with probability

    exp(-2 d0 d1 / (v h)),      v = |sigma' n|^2, n the normal of the wall,

whatever the drift. Deciding by this probability leaves an error of O(h) ([G00], for smooth curved
walls with the tangent plane in place of the wall [G01]). The exit is recorded at the end of its
step, at the point of the wall next to where the step ended: O(h) too.

Sources  [G00] Gobet 2000, weak approximation of killed diffusion using Euler schemes, Stochastic
         Processes and their Applications 87.
         [G01] Gobet 2001, Euler schemes and half-space approximation for the simulation of
         diffusion in a domain, ESAIM: Probability and Statistics 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.sde import ControlledSDE
from ctrl.user_functions import call, one_a_path


@runtime_checkable
class Domain(Protocol):
    """An open set of states in which a path goes on."""

    def signed_distance(
        self, t: Tensor, states: Float[Tensor, " paths *event"]
    ) -> Float[Tensor, " paths"]:
        """Distance from the boundary, state: positive inside, not outside."""
        ...


@runtime_checkable
class WalledDomain(Domain, Protocol):
    """A domain that knows its walls, so that crossings between nodes have a probability.

    They are the same for all paths, and are asked for some paths alone.
    """

    def walls(
        self, t: Tensor, states: Float[Tensor, " paths *event"]
    ) -> tuple[Float[Tensor, "paths walls"], Float[Tensor, "#paths walls dim"]]:
        """Distance from each wall, positive inside, and its unit normal, which points inside."""
        ...


@dataclass(frozen=True)
class Interval:
    """low < x < high, states of one coordinate; an infinite end is no wall."""

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError("low or high must be finite, or there is no wall")

    def signed_distance(self, t: Tensor, states: Tensor) -> Tensor:
        """Distance from the nearer end."""
        return self.walls(t, states)[0].amin(1)

    def walls(self, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The two ends."""
        x = _vectors(states, 1, "Interval")
        inward = torch.ones_like(x[:1]).unsqueeze(1)
        return torch.cat([x - self.low, self.high - x], dim=1), torch.cat([inward, -inward], dim=1)


@dataclass(frozen=True, eq=False)
class HalfSpace:
    """normal . x > offset, in the units of x (the normal is made a unit vector).

    Attributes:
        normal: points inside, [dim].
        offset: of the wall along the normal, as it is given.
    """

    normal: Float[Tensor, " dim"]
    offset: float

    def __post_init__(self) -> None:
        _require_vector("normal", self.normal)
        if not bool(self.normal.norm() > 0) or not math.isfinite(self.offset):
            raise ValueError(
                f"normal must not be 0 and offset finite, got {self.normal.tolist()} and "
                f"{self.offset}"
            )

    def signed_distance(self, t: Tensor, states: Tensor) -> Tensor:
        """Distance from the wall."""
        return self.walls(t, states)[0].squeeze(1)

    def walls(self, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The one wall."""
        x = _vectors(states, len(self.normal), "HalfSpace")
        normal = as_like(self.normal / self.normal.norm(), x)
        distance = x @ normal - self.offset / float(self.normal.norm())
        return distance.unsqueeze(1), normal.view(1, 1, -1)


@dataclass(frozen=True, eq=False)
class Box:
    """low < x < high in every coordinate; infinite ends are no walls."""

    low: Float[Tensor, " dim"]
    high: Float[Tensor, " dim"]

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            _require_vector(name, getattr(self, name), finite=False)
        if self.low.shape != self.high.shape or not bool((self.low < self.high).all()):
            raise ValueError(
                f"low must be below high, [dim] both, got {self.low.tolist()} and "
                f"{self.high.tolist()}"
            )

    def signed_distance(self, t: Tensor, states: Tensor) -> Tensor:
        """Distance from the nearest wall (outside, from the farthest of those that were passed)."""
        return self.walls(t, states)[0].amin(1)

    def walls(self, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Two for each coordinate."""
        x = _vectors(states, len(self.low), "Box")
        one = torch.eye(len(self.low), dtype=x.dtype, device=x.device).unsqueeze(0)
        distances = torch.cat([x - as_like(self.low, x), as_like(self.high, x) - x], dim=1)
        return distances, torch.cat([one, -one], dim=1)


@dataclass(frozen=True, eq=False)
class Ball:
    """|x - centre| < radius."""

    centre: Float[Tensor, " dim"]
    radius: float

    def __post_init__(self) -> None:
        _require_vector("centre", self.centre)
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius must be positive and finite, got {self.radius}")

    def signed_distance(self, t: Tensor, states: Tensor) -> Tensor:
        """Distance from the sphere."""
        return self.walls(t, states)[0].squeeze(1)

    def walls(self, t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The sphere, with its tangent plane at the nearest point."""
        x = _vectors(states, len(self.centre), "Ball")
        arm = x - as_like(self.centre, x)
        length = arm.norm(dim=1, keepdim=True)
        first = torch.zeros_like(arm)
        first[:, 0] = 1  # at the centre all directions are the nearest
        outward = torch.where(length > 0, arm / torch.where(length > 0, length, 1), first)
        return self.radius - length, -outward.unsqueeze(1)


@dataclass(frozen=True)
class Inside:
    """Where a function is positive; exits are seen at the nodes alone, with an error O(sqrt(h)).

    Attributes:
        function: (time [], states [paths, *event]) -> [paths], positive inside.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must take (t, states), got {self.function!r}")

    def signed_distance(self, t: Tensor, states: Tensor) -> Tensor:
        """The function."""
        return one_a_path("domain", call("domain", self.function, t, states), len(states))


def _vectors(states: Tensor, dim: int, name: str) -> Float[Tensor, "paths dim"]:
    x = states.reshape(len(states), -1)
    if x.shape[1] != dim:
        raise ValueError(
            f"{name} is a domain of states with {dim} coordinates, got {list(states.shape)}"
        )
    return x


def _require_vector(name: str, value: Tensor, *, finite: bool = True) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 1:
        raise TypeError(f"{name} must be a floating point tensor [dim], got {value!r}")
    bad = ~torch.isfinite(value) if finite else torch.isnan(value)
    if not len(value) or bool(bad.any()):
        raise ValueError(f"{name} must be numbers, got {value.tolist()}")


@dataclass(frozen=True, eq=False)
class Step:
    """One step of all paths, as a stopping rule sees it.

    Attributes:
        sde: the dynamics.
        t0: time at its left end.
        t1: time at its right end.
        before: states at t0, inside.
        after: states at t1 that the solver proposes, in the domain or not.
        action: held over the step.
        uniform: one number in [0, 1) for each path, where the rule draws.
    """

    sde: ControlledSDE
    t0: Tensor
    t1: Tensor
    before: Float[Tensor, " paths *event"]
    after: Float[Tensor, " paths *event"]
    action: Float[Tensor, " paths *action"]
    uniform: Float[Tensor, " paths"] | None


@runtime_checkable
class Stopping(Protocol):
    """Rule that says which paths leave the domain within a step, and where."""

    @property
    def draws(self) -> bool:
        """Whether it needs a uniform number for each path and step."""
        ...

    def exits(
        self, domain: Domain, step: Step
    ) -> tuple[Bool[Tensor, " paths"], Float[Tensor, " paths *event"]]:
        """Which paths leave, and the point at which each of those is absorbed."""
        ...


@dataclass(frozen=True)
class AtNodes:
    """A path leaves where a node is outside, and is absorbed there: error O(sqrt(h)).

    Attributes:
        draws: whether an exit takes a random number: it does not.
    """

    draws: bool = False

    def exits(self, domain: Domain, step: Step) -> tuple[Tensor, Tensor]:
        """Nodes that are outside."""
        return domain.signed_distance(as_like(step.t1, step.after), step.after) <= 0, step.after


@dataclass(frozen=True)
class BridgeCorrected:
    """A path leaves with the probability that its bridge crosses a wall: error O(h).

    Several walls count as if each were alone: the chance to touch two within a step is smaller than
    any power of h, but at corners. For curved walls the tangent plane stands for the wall.

    Attributes:
        draws: whether an exit takes a random number: it does.
    """

    draws: bool = True

    def crossed(self, domain: Domain, step: Step) -> Float[Tensor, "paths walls"]:
        """Probability that each wall was crossed, given both ends of the step.

        Raises:
            TypeError: the domain does not know its walls.
        """
        walled = _walled(domain)
        x0, h = step.before, float(step.t1 - step.t0)
        t0, t1 = as_like(step.t0, x0), as_like(step.t1, x0)
        distance, normals = walled.walls(t0, x0)
        beyond, _ = walled.walls(t1, step.after)
        variance = h * _across(step.sde, t0, x0, step.action, normals)
        exponent = (-2 * distance * beyond / variance).clamp(min=_NEVER)
        return torch.where((distance > 0) & (beyond > 0), exponent.exp(), 1)

    def exits(self, domain: Domain, step: Step) -> tuple[Tensor, Tensor]:
        """Nodes that are outside, and bridges that touched a wall.

        Raises:
            TypeError: the domain does not know its walls.
        """
        assert step.uniform is not None
        crossed = self.crossed(domain, step)
        stays = torch.ones_like(step.uniform)
        for each in crossed.unbind(1):  # as if each wall were alone
            stays = stays * (1 - each)
        touched = 1 - stays
        leaves = (step.uniform < touched) | (touched == 1)
        # on a GPU all paths are put onto a wall: to ask which of them leave would wait for it
        if leaves.device.type == "cpu" and not bool(leaves.any()):
            return leaves, step.after
        some = leaves.nonzero().squeeze(1) if leaves.device.type == "cpu" else slice(None)
        crossed, touched, uniform = crossed[some], touched[some], step.uniform[some]
        # the same number, uniform again given that the path leaves, chooses the wall
        share = crossed.cumsum(1) / crossed.sum(1, keepdim=True)
        level = uniform / torch.where(touched > 0, touched, 1)
        wall = (share <= level.unsqueeze(1)).sum(1).clamp(max=crossed.shape[1] - 1)
        exits = step.after.clone()
        exits[some] = _onto(_walled(domain), as_like(step.t1, exits), exits[some], wall)
        return leaves, exits


_NEVER = -80.0  # its exponential is no number that a uniform one is below, and not yet denormal


def _walled(domain: Domain) -> WalledDomain:
    if isinstance(domain, WalledDomain):
        return domain
    raise TypeError(
        f"domain must know its walls to be bridge corrected, got {type(domain).__name__}; use "
        "AtNodes(), or Interval, HalfSpace, Box or Ball"
    )


def _across(
    sde: ControlledSDE, t: Tensor, x: Tensor, action: Tensor, normals: Tensor
) -> Float[Tensor, "paths walls"]:
    """|sigma' n|^2 of each wall, state^2/time."""
    sigma = as_like(sde.diffusion_at(t, x, action), x)
    if sde.noise == "general":
        return torch.einsum("pwd,pdm->pwm", normals.expand(len(x), -1, -1), sigma).square().sum(2)
    scaled = normals * sigma.expand_as(x).reshape(len(x), 1, -1)
    return scaled.square().sum(2) if sde.noise == "diagonal" else scaled.sum(2).square()


def _onto(domain: WalledDomain, t: Tensor, x: Tensor, wall: Tensor) -> Tensor:
    """The point of the wall next to x, not outside of the other walls."""
    flat = x.reshape(len(x), -1)
    path = torch.arange(len(x), device=x.device)

    def walls(at: Tensor) -> tuple[Tensor, Tensor]:
        distances, normals = domain.walls(t, at.view_as(x))
        return distances, normals.expand(len(x), -1, -1)

    distances, normals = walls(flat)
    finite = torch.where(torch.isfinite(distances), distances, 0)
    flat = flat - finite[path, wall].unsqueeze(1) * normals[path, wall]
    distances, normals = walls(flat)
    passed = torch.where(distances < 0, distances, 0)
    return (flat - (passed.unsqueeze(2) * normals).sum(1)).view_as(x)


def stopping_rule(
    domain: Domain | None, stopping: Stopping | None, *, black_box: bool
) -> Stopping | None:
    """The rule by which paths leave a domain; None where there is none.

    Args:
        domain: to leave.
        stopping: the rule; if not given ``BridgeCorrected()`` where the domain knows its walls and
            there are bridges, else ``AtNodes()``.
        black_box: whether the noise between nodes is not known, so that there are no bridges.

    Raises:
        TypeError: ``stopping`` is no rule.
        ValueError: there is no domain, or no bridge, for this rule.
    """
    if stopping is not None and (isinstance(stopping, type) or not isinstance(stopping, Stopping)):
        raise TypeError(f"stopping must be AtNodes() or BridgeCorrected(), got {stopping!r}")
    if domain is None:
        if stopping is not None:
            raise ValueError("stopping must be None for a problem without a domain to leave")
        return None
    if black_box and stopping is not None and stopping.draws:
        raise ValueError("stopping must be AtNodes() for a BlackBox, whose noise is not known")
    if stopping is not None:
        return stopping
    bridges = isinstance(domain, WalledDomain) and not black_box
    return BridgeCorrected() if bridges else AtNodes()


def require_inside(domain: Domain, t: Tensor, start: Float[Tensor, " paths *event"]) -> None:
    """Refuse starts that are not in the domain: they have left before the first step.

    Raises:
        ValueError: a start is outside, or on the boundary, or all are.
    """
    distance = domain.signed_distance(as_like(t, start), start)
    out = ~(distance > 0)
    if not bool(out.any()):
        return
    i = int(out.nonzero()[0])
    if bool(out.all()):
        raise ValueError(
            f"domain must contain a start, but it contains none of {len(start)}: start[{i}] = "
            f"{start[i].tolist()} has signed distance {float(distance[i]):g}"
        )
    raise ValueError(
        f"start must be inside the domain, or the path has left before its first step, but "
        f"{int(out.sum())} of {len(start)} are not: start[{i}] = {start[i].tolist()} has signed "
        f"distance {float(distance[i]):g}"
    )
