"""One-step maps, and which of them have a transition density.

Between two nodes the action is held. Orders are those of a general, smooth equation; strong means
the error of the path, weak that of expectations.

Sources  [KP92] Kloeden & Platen, Numerical Solution of Stochastic Differential Equations.
         [HJK12] Hutzenthaler, Jentzen & Kloeden 2012, strong convergence of an explicit numerical
         method for SDEs with nonglobally Lipschitz continuous coefficients, Ann. Appl. Probab. 22.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ctrl.devices import as_like
from ctrl.sde import ControlledSDE
from ctrl.user_functions import own_memory


@runtime_checkable
class Solver(Protocol):
    """A one-step map; a diffusion sampler is one too.

    Times come in the grid's own precision; from roll-outs on the CPU, where reading is free.
    """

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """States at t1 from states at t0, the action held in between, given W(t1) - W(t0)."""
        ...


@runtime_checkable
class InPlaceSolver(Solver, Protocol):
    """A solver that can write its step into memory that is already there."""

    def step_into(
        self,
        after: Tensor,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> None:
        """``step`` into ``after``, which may be the increment's own memory for diagonal noise."""
        ...


@runtime_checkable
class InteriorSolver(Solver, Protocol):
    """A solver that needs more of the Brownian path than its increment."""

    def step_inside(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
        normals: Iterator[Tensor],
    ) -> Tensor:
        """``step``, what it needs beside the increment made of normals of the increment's shape."""
        ...


@runtime_checkable
class TransitionSolver(Solver, Protocol):
    """A solver whose step is Gaussian: step = mean + std * increment / sqrt(t1 - t0)."""

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean [paths, *event] and standard deviation ([] or [paths, *event]) of the next."""
        ...


@dataclass(frozen=True)
class EulerMaruyama:
    """X + b h + sigma dW (Ito): strong order 1/2, 1 for additive noise; weak order 1."""

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One step."""
        sde.require_calculus("ito", "EulerMaruyama")
        t = as_like(t0, states)
        drifted = states + float(t1 - t0) * sde.drift_at(t, states, action)
        return drifted + sde.diffuse(t, states, increment, action)

    def step_into(
        self,
        after: Tensor,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> None:
        """One step, in three calls for diagonal noise."""
        sde.require_calculus("ito", "EulerMaruyama")
        t = as_like(t0, states)
        sigma = sde.diffusion_at(t, states, action) if sde.noise == "diagonal" else None
        if sigma is None:
            torch.add(states, sde.diffuse(t, states, increment, action), out=after)
        elif isinstance(sigma, Tensor):
            torch.addcmul(states, sigma, increment, out=after)
        else:
            torch.add(states, increment, alpha=sigma, out=after)
        after.add_(sde.drift_at(t, states, action), alpha=float(t1 - t0))

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state, for diagonal noise.

        Raises:
            ValueError: the noise is not diagonal, so the next state's coordinates are dependent.
        """
        sde.require_calculus("ito", "EulerMaruyama")
        sde.require_no_jumps("a step with them has no Gaussian density; use girsanov.log_ratio")
        if sde.noise != "diagonal":
            raise ValueError(
                f"sde must have diagonal noise, got {sde.noise}: the next state's coordinates are "
                "dependent; use girsanov.log_ratio, which takes any noise"
            )
        t, h = as_like(t0, states), float(t1 - t0)
        sigma = as_like(sde.diffusion_at(t, states, action), states)
        return states + h * sde.drift_at(t, states, action), sigma.abs() * math.sqrt(h)


@dataclass(frozen=True)
class Milstein:
    """X + b h + sigma dW + (d sigma / dx) sigma (dW^2 - h) / 2 (Ito): strong and weak order 1.

    For diagonal noise (sigma_i of x_i alone, which is checked) and for a single Brownian motion;
    others need Levy areas ([KP92] 10.3), which increments do not tell. The derivative is taken
    automatically.
    """

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One step.

        Raises:
            ValueError: a Stratonovich equation, several Brownian motions that mix, or diagonal
                noise whose sigma_i depends on another coordinate.
        """
        t, h = as_like(t0, states), float(t1 - t0)
        drifted = states + h * sde.drift_at(t, states, action)
        drifted = drifted + sde.diffuse(t, states, increment, action)
        return drifted + self._correction(sde, t, h, states, action, increment)

    def step_into(
        self,
        after: Tensor,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> None:
        """One step, into ``after``."""
        t, h = as_like(t0, states), float(t1 - t0)
        correction = self._correction(sde, t, h, states, action, increment)
        EulerMaruyama().step_into(after, sde, t0, t1, states, action, increment)
        after.add_(correction)

    @staticmethod
    def _correction(
        sde: ControlledSDE, t: Tensor, h: float, states: Tensor, action: Tensor, increment: Tensor
    ) -> Tensor:
        sde.require_calculus("ito", "Milstein")
        if sde.noise == "general" and sde.noise_dim != 1:
            raise ValueError(
                f"Milstein needs diagonal or scalar noise, got {sde.noise_dim} Brownian motions of "
                "general noise, which need Levy areas; use EulerMaruyama, or Heun on "
                "sde.to_stratonovich()"
            )
        excess = 0.5 * (increment.square() - h)
        if sde.noise != "diagonal":
            excess = excess.view(-1, *[1] * (states.ndim - 1))
        return sde.noise_drift(t, states, action) * excess


@dataclass(frozen=True)
class Heun:
    """X + (b + b') h / 2 + (sigma + sigma') dW / 2, primes at the Euler step (Stratonovich).

    Strong order 1 for diagonal noise, a single Brownian motion and any that commute, 1/2 otherwise;
    weak order 1, 2 for additive noise. Nothing is differentiated.
    """

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One step.

        Raises:
            ValueError: an Ito equation.
        """
        sde.require_calculus("stratonovich", "Heun")
        t, end, h = as_like(t0, states), as_like(t1, states), float(t1 - t0)
        here = h * sde.drift_at(t, states, action) + sde.diffuse(t, states, increment, action)
        there = states + here
        over_there = h * sde.drift_at(end, there, action)
        return states + 0.5 * (here + over_there + sde.diffuse(end, there, increment, action))


@dataclass(frozen=True)
class TamedEuler:
    """X + b h / (1 + |b| h) + sigma dW (Ito), |b| the norm of a path's drift ([HJK12] equation 4).

    For drifts that grow faster than linearly and push inward (one-sided Lipschitz), of which
    Euler-Maruyama's moments explode: strong order 1/2 all the same, 1 for additive noise (the
    drift is changed by O(h), which is the weak order too). No step moves by more than 1 without
    noise.
    """

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One step.

        Raises:
            ValueError: a Stratonovich equation.
        """
        t = as_like(t0, states)
        moved = self._drifted(sde, t0, t1, states, action)
        return moved + sde.diffuse(t, states, increment, action)

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state, for diagonal noise.

        Raises:
            ValueError: the noise is not diagonal, or the equation a Stratonovich one.
        """
        moved = self._drifted(sde, t0, t1, states, action)
        return moved, EulerMaruyama().transition(sde, t0, t1, states, action)[1]

    @staticmethod
    def _drifted(
        sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> Tensor:
        sde.require_calculus("ito", "TamedEuler")
        push = float(t1 - t0) * sde.drift_at(as_like(t0, states), states, action)
        size = push.reshape(len(states), -1).norm(dim=1)
        return states + push / (1 + size.view(-1, *[1] * (states.ndim - 1)))


@dataclass(frozen=True)
class DriftImplicitEuler:
    """Y with Y = X + b(t1, Y) h + sigma(t0, X) dW (Ito), by Newton's method ([KP92] 12.2).

    For stiff drifts, and superlinear ones that push inward: the equation has one solution where
    h L < 1 for (b(x) - b(y)) . (x - y) <= L |x - y|^2, and a linear pull of any strength is damped.
    Strong order 1/2, 1 for additive noise; weak order 1. The step is no Gaussian where b is not
    affine, so there is no ``transition``. Gradients go through the solution (implicit function),
    not through the iterations; once, not twice.

    Attributes:
        iterations: of Newton's method, before giving up.
    """

    iterations: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise TypeError(f"iterations must be an integer, got {self.iterations!r}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One step.

        Raises:
            ValueError: a Stratonovich equation.
            RuntimeError: Newton's method does not converge; the step is too large.
        """
        sde.require_calculus("ito", "DriftImplicitEuler")
        end, h = as_like(t1, states), float(t1 - t0)
        known = states + sde.diffuse(as_like(t0, states), states, increment, action)

        def gap(y: Tensor) -> Tensor:
            return y - h * sde.drift_at(end, y, action) - known

        with torch.no_grad():
            y, last = known, torch.full_like(known, math.inf)
            for _ in range(self.iterations):
                change = _newton_change(gap, y)
                y = y - change
                # quadratic: a change of sqrt(round-off) is followed by none
                if not bool((change.abs() > _settled(y)).any()):
                    break
                last = change
            else:
                raise RuntimeError(
                    f"Newton's method has not converged in {self.iterations} iterations at t = "
                    f"{float(t0):g}, where it last moved by {float(last.abs().max()):g}: take "
                    "smaller steps, or more iterations"
                )
        return y - _newton_change(gap, y.detach())


def _settled(y: Tensor) -> Tensor:
    return torch.finfo(y.dtype).eps ** 0.5 * (1 + y.abs())


def _newton_change(gap: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """(d gap / dy)^{-1} gap(y) of every path; of its gradients the first is that of the root."""
    y = own_memory(y)
    directions = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device)
    with torch.no_grad():
        columns = [
            torch.func.jvp(gap, (y,), (own_memory(e.view(1, *y.shape[1:]).expand_as(y)),))[1]
            for e in directions
        ]
    jacobian = torch.stack([column.reshape(len(y), -1) for column in columns], dim=-1)
    residual = gap(y).reshape(len(y), -1, 1)
    return torch.linalg.solve(jacobian, residual).view_as(y)


@dataclass(frozen=True)
class BlackBox:
    """Any simulator: its paths have states and actions, and no noise to show.

    Attributes:
        function: (t0, t1, states [paths, *event], action [paths, *action]) -> states at t1. It
            brings its own randomness. The problem's sde is not looked at.
    """

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"function must be (t0, t1, states, action) -> states, got {self.function!r}"
            )

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One call of the simulator; ``sde`` and ``increment`` are not used."""
        return self.function(t0, t1, states, action)


def require_transition(solver: Solver) -> TransitionSolver:
    """The solver, if it has a transition density.

    Raises:
        TypeError: it has none; the message names the remedy.
    """
    if isinstance(solver, TransitionSolver):
        return solver
    raise TypeError(
        f"{type(solver).__name__} has no transition density; use EulerMaruyama or a DDIM with "
        "eta > 0, or treat drawn actions as the decision (GaussianPolicy.log_prob)"
    )
