"""Every solver of torchsde as a one-step map, adaptive steps and adjoint gradients included.

torchsde is called from node to node: across an output time it would interpolate linearly, which has
the wrong law. The action is held, and in between the solver is free.

A step needs more randomness than W(t1) - W(t0) where it is divided or needs areas of the Brownian
path. With ``noise.PathStreams`` that comes from the paths' own streams, so that it is the same in
any batch; what takes one step size or one tree for all paths ("log_ode", adaptive steps) refuses
them. Else it is drawn from a stream named by the increments themselves (those of the whole batch,
t0 and t1), so a step is a function of its arguments: the same noise gives the same states, in any
order. But then a path's interior changes with its batch and with the grid: quadrature is exact, and
coarse and fine runs on one refined path are coupled to the method's own order, only for the methods
that need increments alone ("srk" and "log_ode" do not; with "srk" such runs differ by O(h)).

torchsde 0.2.6 is no longer developed; nothing else in this library touches it.

Sources  [R10] Roessler 2010, Runge-Kutta methods for the strong approximation of solutions of
         stochastic differential equations, SIAM J. Numer. Anal. 48 (srk).
         [LWCD20] Li, Wong, Chen & Duvenaud 2020, Scalable gradients for stochastic differential
         equations, AISTATS (adjoint).
         [KFLL21] Kidger, Foster, Li & Lyons 2021, Efficient and accurate gradients for neural
         SDEs, NeurIPS (reversible Heun).
         [FLO20] Foster, Lyons & Oberhauser 2020, An optimal polynomial approximation of Brownian
         motion, SIAM J. Numer. Anal. 58 (space-time areas).
"""

import difflib
import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from ctrl.devices import as_like, sent
from ctrl.noise import refine, stream
from ctrl.sde import ControlledSDE

# calculus, and what a step asks of the Brownian path beside its increment
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
_COMMUTATIVE = ("milstein", "srk")  # refuse several Brownian motions that mix coordinates
_BACKWARD = {"ito": ("euler", "milstein"), "stratonovich": ("euler_heun", "heun", "midpoint")}
_LEAST = 2**-12  # shortest adaptive step, of the interval


@dataclass(frozen=True)
class TorchSDE:
    """A method of torchsde, between two nodes at a time.

    Attributes:
        method: for Ito equations "euler" (strong order 1/2), "milstein" (1) or "srk" ([R10], 1.5,
            the best fixed-step method here), the last two for diagonal or scalar noise; for
            Stratonovich equations "euler_heun", "heun", "midpoint", "reversible_heun" ([KFLL21];
            restarted at every step, where it is "heun") or "log_ode": order 1 for diagonal and
            scalar noise, 1/2 for general noise that does not commute. All have weak order 1 at
            least.
        dt: longest step, time: the interval between two nodes is divided evenly. One step if not
            given. Where steps are adaptive, the first.
        adaptive: choose steps by step doubling. One step size serves all paths, and the tolerance
            is not the error: at equal error a fixed "srk" is faster on smooth equations.
        rtol: relative tolerance of adaptive steps.
        atol: absolute tolerance of adaptive steps, state.
        adjoint: gradients by a second equation backwards in time ([LWCD20]), off by O(h) except for
            "reversible_heun", whose are exact. It stores the states at the steps' ends alone: with
            a small network as drift and 200 steps 0.1 GiB in place of 0.9 ("euler"), 1.8
            ("midpoint") or 8.4 ("srk"), but 1.1 for "reversible_heun". It took 1.3 to 2 times as
            long for "euler", no longer for "midpoint", a fifth for "srk".
        parameters: leaves that drift and diffusion depend on, for the adjoint to differentiate in
            (beside states and action).
        adjoint_method: of the backward equation; torchsde's choice if not given.
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
        self._check_adjoint()

    def _check_adjoint(self) -> None:
        if not self.adjoint and (self.parameters or self.adjoint_method):
            raise ValueError(
                "parameters and adjoint_method are for adjoint=True; without it every gradient is "
                "kept"
            )
        if self.adjoint and self.adaptive:
            raise ValueError(
                "adaptive must be False with adjoint=True: the way back does not know the steps; "
                "divide them evenly by dt"
            )
        if any(not parameter.is_leaf for parameter in self.parameters):
            raise ValueError("parameters must be leaves: what an optimiser holds")
        allowed = _BACKWARD[_METHODS[self.method][0]]
        if self.method == "reversible_heun":
            allowed = ("adjoint_reversible_heun",)
        if self.adjoint_method is not None and self.adjoint_method not in allowed:
            raise ValueError(
                f"adjoint_method must be one of {allowed} for {self.method!r}, got "
                f"{self.adjoint_method!r}"
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
        """States at t1, along a Brownian path with this increment.

        Raises:
            ValueError: the equation's calculus or noise is not the method's; adaptive steps became
                too short, or met numbers that are not finite; or the adjoint would miss a gradient,
                because drift or diffusion depend on leaves that are not in ``parameters``.
        """
        return self._step(sde, t0, t1, states, action, increment, None)

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
        """``step``, the Brownian path between t0 and t1 made of these normals.

        Args:
            sde: as for ``step``.
            t0: as for ``step``.
            t1: as for ``step``.
            states: as for ``step``.
            action: as for ``step``.
            increment: as for ``step``.
            normals: standard normals of the increment's shape, as many as the step takes.

        Raises:
            ValueError: steps are adaptive, or the method is "log_ode"; or as ``step``.
        """
        if self.adaptive or _METHODS[self.method][1] == "foster":
            what = "adaptive steps" if self.adaptive else f"method {self.method!r}"
            raise ValueError(
                f"{what} treat all paths of a batch together, so a path would depend on its batch, "
                "which noise.PathStreams rules out; use another fixed-step method, or a "
                "torch.Generator as generator"
            )
        return self._step(sde, t0, t1, states, action, increment, normals)

    def _step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
        normals: Iterator[Tensor] | None,
    ) -> Tensor:
        self._check_noise(sde)
        begin, end = t0.double(), t1.double()
        flat, columns = states.reshape(len(states), -1), _columns_of(sde, increment)
        own = None if normals is None else (_columns_of(sde, each) for each in normals)

        def advance(x: Tensor, a: Tensor) -> Tensor:
            equation = _Equation(sde, states.shape, a)
            if self.adaptive:
                return self._adaptively(equation, begin, end, x, columns)
            for left, right, path in self._pieces(begin, end, columns, own):
                x = self._once(equation, left, right, x, path)
            return x

        if self.adjoint and torch.is_grad_enabled():
            _require_listed_parameters(
                _Equation(sde, states.shape, action), begin, flat, self.parameters
            )
            flat = cast(Tensor, _IsolatedGraph.apply(advance, flat, action, *self.parameters))
        else:
            flat = advance(flat, action)
        return flat.reshape_as(states)

    def _check_noise(self, sde: ControlledSDE) -> None:
        sde.require_calculus(_METHODS[self.method][0], f"TorchSDE({self.method!r})")
        if sde.noise == "general" and self.method in _COMMUTATIVE:
            raise ValueError(
                f"{self.method!r} needs diagonal or scalar noise, got general noise; use 'euler', "
                "or 'heun' on sde.to_stratonovich()"
            )
        if sde.noise == "general" and self.adaptive:
            raise ValueError(
                "adaptive must be False for general noise: step doubling is biased where it does "
                "not commute; divide steps evenly by dt"
            )
        if sde.noise != "diagonal" and self.adjoint_method == "milstein":
            raise ValueError(
                f"adjoint_method 'milstein' needs diagonal noise, got {sde.noise} noise; use "
                "'euler'"
            )

    def _pieces(
        self, begin: Tensor, end: Tensor, increment: Tensor, normals: Iterator[Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Steps of equal length, each with its piece of the Brownian path.

        The path's interior is made of ``normals``; without them of a stream that the increments
        name.
        """
        area, length = _METHODS[self.method][1], float(end - begin)
        count = 1 if self.dt is None else max(1, math.ceil(length / self.dt - 1e-9))
        if count == 1 and area == "none":
            yield begin, end, _Piece(increment)
            return
        interior: Generator | None = None  # its name takes a look at the increments
        if normals is None:
            interior = stream(_name_of(begin, end, increment), "interior of a step")
            normals = _drawn(interior, increment)
        nodes, parts = [begin, end], [increment]
        if count > 1:
            even = torch.linspace(float(begin), float(end), count + 1, dtype=torch.float64)
            fine = refine(increment[:, None], even[[0, -1]], even, normals=normals)
            nodes, parts = list(even), list(fine.unbind(1))
        for left, right, part in zip(nodes, nodes[1:], parts, strict=False):
            h = float(right - left)
            if area == "none":
                yield left, right, _Piece(part)
            elif area == "space-time":  # int (W - W(left)) dt given the increment ([FLO20])
                integral = 0.5 * h * part + h * math.sqrt(h / 12) * next(normals)
                yield left, right, _Piece(part, integral)
            else:
                assert interior is not None  # step_inside refuses these methods
                entropy = int(torch.randint(2**62, (), generator=interior))
                yield left, right, _tree(left, right, part, area, entropy)

    def _once(
        self, equation: "_Equation", left: Tensor, right: Tensor, states: Tensor, path: Any
    ) -> Tensor:
        if self.adjoint and torch.is_grad_enabled():
            return self._by_adjoint(equation, left, right, states, path)
        solver = self._solver(equation, left, right, path)
        return solver.step(left, right, states, solver.init_extra_solver_state(left, states))[0]

    def _solver(self, equation: "_Equation", left: Tensor, right: Tensor, path: Any) -> Any:
        # the solver object itself: sdeint would evaluate drift and diffusion once more a node to
        # look at their shapes, which are checked here already
        from torchsde._core import base_sde, methods  # pyright: ignore[reportMissingTypeStubs]

        h = float(right - left)
        # made by type itself: torchsde's metaclass inspects every attribute of every instance,
        # which costs more than a step of "euler"
        return type.__call__(
            methods.select(self.method, equation.sde_type),
            sde=base_sde.ForwardSDE(equation), bm=path, dt=min(self.dt or h, h),
            adaptive=self.adaptive, rtol=self.rtol, atol=self.atol, dt_min=_LEAST * h, options={},
        )  # fmt: skip

    def _adaptively(
        self, equation: "_Equation", begin: Tensor, end: Tensor, states: Tensor, increment: Tensor
    ) -> Tensor:
        area, entropy = _METHODS[self.method][1], _name_of(begin, end, increment)
        solver = self._solver(equation, begin, end, _tree(begin, end, increment, area, entropy))
        extra = solver.init_extra_solver_state(begin, states)
        with warnings.catch_warnings():
            # torchsde accepts a failing step at its least size with a warning alone
            warnings.filterwarnings("error", message="Hitting minimum")
            try:
                return solver.integrate(states, torch.stack([begin, end]), extra)[0][-1]
            except (UserWarning, AssertionError) as fault:
                faults = {"Hitting minimum": "too short", "Found nans": "not finite"}
                what = [word for text, word in faults.items() if text in str(fault)]
                if not what:
                    raise  # of drift or diffusion
                raise ValueError(
                    f"adaptive steps became {what[0]} between t = {float(begin):g} and "
                    f"{float(end):g}; loosen rtol and atol, refine the grid, or use fixed steps"
                ) from None

    def _by_adjoint(
        self, equation: "_Equation", left: Tensor, right: Tensor, states: Tensor, path: Any
    ) -> Tensor:
        import torchsde  # pyright: ignore[reportMissingTypeStubs]  # it has none

        # dt beyond the interval: where left + h < right by round-off, torchsde would take one more
        # step, of length 1e-17, and use the increment twice
        return torchsde.sdeint_adjoint(
            cast(Any, equation), states, torch.stack([left, right]), bm=path, method=self.method,
            dt=(1 + 1e-6) * float(right - left), adjoint_method=self.adjoint_method,
            adjoint_params=(*self.parameters, equation.action),
        )[-1]  # fmt: skip


class _IsolatedGraph(torch.autograd.Function):
    """A function of states and action whose graph is kept apart from what these came from.

    torchsde's adjoint differentiates in its parameters at every step backwards. Were the action
    given to it with its graph, that would lead on to earlier steps, and through them to all others.
    """

    @staticmethod
    def forward(
        ctx: Any, function: Any, states: Tensor, action: Tensor, *parameters: Tensor
    ) -> Any:
        """The function's value."""
        inputs = [
            value.detach().requires_grad_(value.is_floating_point()) for value in (states, action)
        ]
        with torch.enable_grad():
            ctx.value = function(*inputs)
        ctx.inputs = (*inputs, *parameters)
        return ctx.value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        """Its vector-Jacobian products."""
        wanted = [value for value in ctx.inputs if value.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                ctx.value, wanted, grad_outputs, retain_graph=True, allow_unused=True
            )
        )
        return None, *(next(gradients) if value.requires_grad else None for value in ctx.inputs)


class _Equation:
    """A controlled SDE as torchsde wants it: states [paths, dim], the action held."""

    def __init__(self, sde: ControlledSDE, shape: torch.Size, action: Tensor) -> None:
        self.sde, self.shape, self.action = sde, shape, action
        self.noise_type, self.sde_type = sde.noise, sde.calculus

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """b(t, X, a)."""
        x = y.reshape(self.shape)
        return self.sde.drift_at(as_like(t, y), x, self.action).reshape_as(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """sigma(t, X, a), [paths, dim] or [paths, dim, motions]."""
        x = y.reshape(self.shape)
        sigma = self.sde.diffusion_at(as_like(t, y), x, self.action)
        if self.sde.noise == "general":
            assert isinstance(sigma, Tensor)
            return sigma
        if not isinstance(sigma, Tensor):
            sigma = torch.full_like(x, sigma)
        sigma = sigma.expand_as(x)
        return sigma.reshape_as(y) if self.sde.noise == "diagonal" else sigma.reshape(*y.shape, 1)


class _Piece:
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


def _tree(begin: Tensor, end: Tensor, increment: Tensor, area: str, entropy: int) -> Any:
    """A Brownian path that can be asked anywhere, by torchsde."""
    import torchsde  # pyright: ignore[reportMissingTypeStubs]  # it has none

    return torchsde.BrownianInterval(
        t0=begin, t1=end, size=tuple(increment.shape), dtype=increment.dtype,
        device=increment.device, levy_area_approximation=area, W=increment, entropy=entropy,
    )  # fmt: skip


def _drawn(generator: torch.Generator, like: Tensor) -> Iterator[Tensor]:
    """Standard normals, one tensor after the other, drawn where the generator is."""
    while True:
        drawn = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
        yield sent(drawn.normal_(generator=generator), like.device)


def _columns_of(sde: ControlledSDE, increment: Tensor) -> Tensor:
    """Increments as [paths, motions]."""
    return (
        increment.unsqueeze(1) if sde.noise == "scalar" else increment.reshape(len(increment), -1)
    )


_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def _name_of(begin: Tensor, end: Tensor, increment: Tensor) -> int:
    """A random stream's name for these arguments: the first numbers, two sums over all bits."""
    exact = increment.detach()
    exact = exact if exact.dtype in _BITS else exact.float()
    bits = exact.flatten().view(_BITS[exact.dtype]).long()
    # one copy to the host, of what names them alone
    *first, whole, squares = torch.cat(
        [bits[:256], bits.sum().view(1), (bits * bits).sum().view(1)]
    ).tolist()
    name = (first, whole, squares)
    digest = hashlib.sha256(repr((name, float(begin), float(end))).encode()).digest()
    return int.from_bytes(digest[:16], "little")


def _require_listed_parameters(
    equation: _Equation, t: Tensor, states: Tensor, parameters: tuple[Tensor, ...]
) -> None:
    """Refuse coefficients whose gradient the adjoint would leave out without a word.

    Raises:
        ValueError: drift or diffusion depend on leaves that are not in ``parameters``.
    """
    alone = _Equation(equation.sde, equation.shape, equation.action.detach())
    y = states.detach().reshape(len(states), -1)
    known = {id(parameter) for parameter in parameters}
    waiting, seen = [alone.f(t, y).grad_fn, alone.g(t, y).grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"parameters must hold every leaf of drift and diffusion, but a tensor "
                f"{list(leaf.shape)} that needs a gradient is not there; add it, or use "
                "adjoint=False"
            )
        waiting.extend(before for before, _ in node.next_functions)
