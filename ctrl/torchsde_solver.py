"""Every solver of torchsde as a one-step map, adaptive steps and adjoint gradients included.

torchsde is called from node to node: across an output time it would interpolate linearly, which has
the wrong law. The action is held, and in between the solver is free.

A step needs more randomness than W(t1) - W(t0) where it is divided or needs areas of the Brownian
path. That is drawn from a stream named by the increment itself (its bytes, t0 and t1), so a step
is a function of its arguments: the same noise gives the same states, in any order.

torchsde 0.2.6 is no longer developed; nothing else in this library touches it.

Sources  [R10] Roessler 2010, Runge-Kutta methods for the strong approximation of solutions of
         stochastic differential equations, SIAM J. Numer. Anal. 48 (srk).
         [LWCD20] Li, Wong, Chen & Duvenaud 2020, scalable gradients for stochastic differential
         equations, AISTATS (adjoint).
"""

import difflib
import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrl.noise import stream
from ctrl.sde import ControlledSDE

# calculus, and what of the Brownian path a step needs beside its increment
_METHODS = {
    "euler": ("ito", "none"),
    "milstein": ("ito", "none"),
    "srk": ("ito", "space-time"),
    "euler_heun": ("stratonovich", "none"),
    "heun": ("stratonovich", "none"),
    "midpoint": ("stratonovich", "none"),
    "reversible_heun": ("stratonovich", "none"),
    "log_ode": ("stratonovich", "foster"),
}
_LEAST = 2**-12  # shortest adaptive step, of the interval
_COMMUTATIVE = ("milstein", "srk")  # refuse several Brownian motions that mix coordinates


@dataclass(frozen=True)
class TorchSDE:
    """A method of torchsde.

    Attributes:
        method: "srk" (strong order 1.5, diagonal or scalar noise; the best fixed-step method here),
            "euler" (1/2) or "milstein" (1) for Ito equations; "heun", "midpoint",
            "reversible_heun" (1), "euler_heun" (1) or "log_ode" (1) for Stratonovich ones. Orders
            of "heun", "midpoint" and so on are 1/2 for general noise that does not commute.
        dt: length of a step, time; the whole interval between two nodes if not given. Where steps
            are adaptive, the first.
        adaptive: choose steps by step doubling. One step size serves all paths, and the tolerance
            is not the error: at equal error a fixed "srk" is faster on smooth equations.
        rtol: relative tolerance of adaptive steps.
        atol: absolute tolerance of adaptive steps, state.
        adjoint: gradients by the stochastic adjoint ([LWCD20]), which stores the states at the
            nodes alone. For Ito methods it is off by O(h); it saves memory, not time.
        parameters: that the adjoint differentiates in, beside states and action.
        adjoint_method: of the backward pass; torchsde's choice if not given.
    """

    method: str = "srk"
    dt: float | None = None
    adaptive: bool = False
    rtol: float = 1e-4
    atol: float = 1e-5
    adjoint: bool = False
    parameters: tuple[Tensor, ...] = ()
    adjoint_method: str | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            near = difflib.get_close_matches(str(self.method), _METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"method must be one of {tuple(_METHODS)}, got {self.method!r}{hint}")
        for name in ("dt", "rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.adaptive and self.method == "euler":
            raise ValueError(
                "adaptive must be False for 'euler': step doubling does not converge at order 1/2; "
                "use 'srk' or 'milstein'"
            )
        if self.adjoint and self.method in ("srk", "log_ode") and self.adjoint_method is None:
            object.__setattr__(self, "adjoint_method", "milstein" if self.method == "srk" else None)
        if any(not parameter.is_leaf for parameter in self.parameters):
            raise ValueError("parameters must be leaves: what an optimiser holds")
        if self.parameters and not self.adjoint:
            raise ValueError("parameters are for adjoint=True; without it every gradient is kept")

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """States at t1, along a Brownian path with this increment.

        Raises:
            ValueError: the equation's calculus or noise is not the method's; or adaptive steps
                became too short.
        """
        self._check(sde)
        begin, end = t0.double(), t1.double()
        flat, held = states.reshape(len(states), -1), action.reshape(len(action), -1)
        columns = _columns_of(sde, increment)
        by_adjoint = self.adjoint and torch.is_grad_enabled()
        if by_adjoint:  # the action as a part of the state that does not move
            equation = _WithAction(sde, states.shape, action.shape)
            flat = torch.cat([flat, held], dim=1)
            if sde.noise == "diagonal":
                columns = torch.cat([columns, torch.zeros_like(held)], dim=1)
        else:
            equation = _Equation(sde, states.shape, action)
        brownian = self._brownian(begin, end, columns)
        with warnings.catch_warnings():
            # torchsde accepts a failing step at its least size with a warning alone
            warnings.filterwarnings("error", message="Hitting minimum")
            try:
                integrate = self._by_adjoint if by_adjoint else self._integrate
                after = integrate(equation, begin, end, flat, brownian)
            except UserWarning:
                raise ValueError(
                    f"adaptive steps became too short between t = {float(t0):g} and {float(t1):g}; "
                    "loosen rtol and atol, refine the grid, or use fixed steps"
                ) from None
        if not torch.is_grad_enabled():
            after = after.detach()  # milstein leaves its own graph behind
        moved = after[:, : states[0].numel()].to(states.dtype)
        return moved.reshape_as(states)

    def _check(self, sde: ControlledSDE) -> None:
        calculus, _ = _METHODS[self.method]
        sde.require_calculus(calculus, f"TorchSDE({self.method!r})")
        if sde.noise == "general":
            if self.method in _COMMUTATIVE:
                raise ValueError(
                    f"{self.method!r} needs diagonal or scalar noise, got general noise; use "
                    "'euler', or 'heun' on sde.to_stratonovich()"
                )
            if self.adaptive:
                raise ValueError(
                    "adaptive must be False for general noise: step doubling is biased where it "
                    "does not commute"
                )

    def _brownian(self, begin: Tensor, end: Tensor, increment: Tensor) -> Any:
        area = _METHODS[self.method][1]
        whole = not self.adaptive and (self.dt is None or self.dt >= float(end - begin))
        if whole and area == "none":
            return _Increment(increment)
        interior = _interior(begin, end, increment)
        width = math.sqrt(float(end - begin) / 12)  # of the space-time area
        space_time = width * torch.randn(
            increment.shape, generator=interior, dtype=increment.dtype
        ).to(increment.device)
        if whole and area == "space-time":
            return _Increment(increment, float(end - begin) * (0.5 * increment + space_time))
        import torchsde  # pyright: ignore[reportMissingTypeStubs]  # it has none

        return torchsde.BrownianInterval(
            t0=begin, t1=end, size=tuple(increment.shape), dtype=increment.dtype,
            device=increment.device, dt=self.dt, levy_area_approximation=area,
            W=increment, H=None if area == "none" else space_time,
            entropy=int(torch.randint(2**62, (), generator=interior)),
        )  # fmt: skip

    def _integrate(
        self, equation: Any, begin: Tensor, end: Tensor, states: Tensor, brownian: Any
    ) -> Tensor:
        # the solver object itself: sdeint would evaluate drift and diffusion once more a node to
        # look at their shapes, which are checked here already
        from torchsde._core import base_sde, methods  # pyright: ignore[reportMissingTypeStubs]

        h = float(end - begin)
        dt = h if self.dt is None else min(self.dt, h)
        solver = methods.select(self.method, equation.sde_type)(
            sde=base_sde.ForwardSDE(equation), bm=brownian, dt=dt, adaptive=self.adaptive,
            rtol=self.rtol, atol=self.atol, dt_min=_LEAST * h, options={},
        )  # fmt: skip
        extra = solver.init_extra_solver_state(begin, states)
        if not self.adaptive and dt == h:
            return solver.step(begin, end, states, extra)[0]
        return solver.integrate(states, torch.stack([begin, end]), extra)[0][-1]

    def _by_adjoint(
        self, equation: Any, begin: Tensor, end: Tensor, states: Tensor, brownian: Any
    ) -> Tensor:
        import torchsde  # pyright: ignore[reportMissingTypeStubs]  # it has none

        h = float(end - begin)
        return torchsde.sdeint_adjoint(
            equation, states, torch.stack([begin, end]), bm=brownian, method=self.method,
            dt=h if self.dt is None else min(self.dt, h), adaptive=self.adaptive,
            rtol=self.rtol, atol=self.atol, dt_min=_LEAST * h,
            adjoint_method=self.adjoint_method, adjoint_params=self.parameters,
        )[-1]  # fmt: skip


class _Equation:
    """A controlled SDE as torchsde wants it: states [paths, dim], the action held."""

    def __init__(self, sde: ControlledSDE, shape: torch.Size, action: Tensor) -> None:
        self.sde, self.shape, self.action = sde, shape, action
        self.noise_type, self.sde_type = sde.noise, sde.calculus

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """b(t, X, a)."""
        x = y.reshape(self.shape)
        return self.sde.drift_at(t.to(y), x, self.action).reshape_as(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """sigma(t, X, a), [paths, dim] or [paths, dim, motions]."""
        x = y.reshape(self.shape)
        sigma = self.sde.diffusion_at(t.to(y), x, self.action)
        if self.sde.noise == "general":
            assert isinstance(sigma, Tensor)
            return sigma
        if not isinstance(sigma, Tensor):
            sigma = torch.full_like(x, sigma)
        elif sigma.ndim == 0:
            sigma = sigma.expand_as(x)
        return sigma.reshape_as(y) if self.sde.noise == "diagonal" else sigma.reshape(*y.shape, 1)


class _WithAction:
    """The same for states [X, a], in which a stands still, so that its gradient is a state's."""

    def __init__(self, sde: ControlledSDE, shape: torch.Size, action: torch.Size) -> None:
        self.sde, self.shape, self.action = sde, shape, action
        self.noise_type, self.sde_type = sde.noise, sde.calculus

    def _at(self, y: Tensor) -> tuple[_Equation, Tensor, Tensor]:
        width = self.shape[1:].numel()
        x, a = y[:, :width], y[:, width:]
        return _Equation(self.sde, self.shape, a.reshape(self.action)), x, a

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """b(t, X, a), and 0."""
        equation, x, a = self._at(y)
        return torch.cat([equation.f(t, x), torch.zeros_like(a)], dim=1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """sigma(t, X, a), and 0."""
        equation, x, a = self._at(y)
        sigma = equation.g(t, x)
        still = a if sigma.ndim == 2 else a.unsqueeze(2).expand(-1, -1, sigma.shape[2])
        return torch.cat([sigma, torch.zeros_like(still)], dim=1)


class _Increment:
    """A Brownian path of which only one increment is known, and its time integral if need be."""

    def __init__(self, increment: Tensor, integral: Tensor | None = None) -> None:
        self.increment, self.integral = increment, integral
        self.shape, self.dtype, self.device = increment.shape, increment.dtype, increment.device
        self.levy_area_approximation = "none" if integral is None else "space-time"

    def __call__(
        self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """W(tb) - W(ta), and the integral of W - W(ta) over the interval."""
        return (self.increment, self.integral) if return_U else self.increment


def _columns_of(sde: ControlledSDE, increment: Tensor) -> Tensor:
    """Increments as [paths, motions]."""
    return (
        increment.unsqueeze(1) if sde.noise == "scalar" else increment.reshape(len(increment), -1)
    )


_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def _interior(begin: Tensor, end: Tensor, increment: Tensor) -> torch.Generator:
    """The stream that this increment names: by its first numbers and two sums over all bits."""
    exact = increment.detach().cpu()
    exact = exact if exact.dtype in _BITS else exact.float()
    bits = exact.contiguous().flatten().view(_BITS[exact.dtype]).long()
    name = (bits[:256].tolist(), int(bits.sum()), int(bits.square().sum()))
    digest = hashlib.sha256(repr((name, float(begin), float(end))).encode()).digest()
    return stream(int.from_bytes(digest[:16], "little"), "interior of a step")
