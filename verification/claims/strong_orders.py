"""Strong orders, without a single random number.

Of geometric Brownian motion the mean square error of a scheme is a product over the steps, of
moments that quadrature gives through the production step; it is compared with the same error by
polynomials written out by hand, then its order is read off. Of linear systems, whose solution is
not known, the mean square difference of two runs along one Brownian path, on a grid and on the
refined one, is a linear recursion for the second moments of the pair.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.torchsde_solver import _Piece
from verification.backward_induction import local_order
from verification.claim import Check, Setting, claim, expectation, limit, wrong
from verification.closed_form.geometric_brownian_motion import (
    GeometricBrownianMotion,
    growth,
    mean_square_error,
)

P = GeometricBrownianMotion()
UNEVEN = (0.0, 0.1, 0.35, 0.5, 0.8)
STEPS = (4, 8, 16, 32)
STILL = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
ITO = ctrl.ControlledSDE(lambda t, x, a: (P.rate + P.ramp * t) * x, lambda t, x: P.volatility * x)
DOUBLE = "orders are read off differences that float32's round-off covers"
MILSTEIN = "ctrl.solvers.Milstein._correction"


def error_by_products(
    setting: Setting, solver: ctrl.Solver, sde: ctrl.ControlledSDE, nodes: list[float]
) -> float:
    """E (X^h_T - X_T)^2 through ``ctrl.simulate``, one step at a time."""
    products = np.ones(3)
    for before, after in pairwise(nodes):
        h = after - before
        noise = ctrl.noise.gauss_hermite(setting.tensor([h]), nodes=12)
        w = noise.increments[:, 0, 0]
        grid = ctrl.TimeGrid(setting.tensor([before, after]))
        start = torch.full_like(noise.increments[:, 0], P.start)
        problem = ctrl.ControlProblem(sde, P.horizon)
        end = ctrl.simulate_end(problem, STILL, start, grid, solver, noise=noise)
        r = end[:, 0] / P.start
        # the true increment's law, not the one that was simulated, is what G is made of
        drift = growth(P, before, after) - P.volatility**2 * h / 2
        g = (drift + P.volatility * w).exp()
        assert noise.weights is not None
        products *= [float(noise.weights @ one) for one in (r * r, r * g, g * g)]
    return float(P.start**2 * (products[0] - 2 * products[1] + products[2]))


@claim(
    statement="""
        On geometric Brownian motion, E |X^h_T - X_T|^2 = O(h^(2p)) along one Brownian path, with
        p = 1/2 for EulerMaruyama, 1 for Milstein and for Heun; and the mean square error is what a
        recursion by hand says it is.
        """,
    source="Kloeden & Platen, Theorems 10.2.2, 10.3.5",
    why_double=DOUBLE,
    wrongs=[
        wrong("Milstein's term with the wrong sign", MILSTEIN, "0.5 * (", "-0.5 * ("),
        wrong("Milstein's term without 1/2", MILSTEIN, "0.5 * (", "(1.0) * ("),
        wrong("Milstein's term + 1 %", MILSTEIN, "0.5 * (", "0.505 * ("),
        wrong(
            "Milstein's term not centred",
            MILSTEIN,
            "(increment.square() - h)",
            "increment.square()",
        ),
        wrong(
            "Milstein's term without sigma",
            "ctrl.sde.ControlledSDE.noise_drift",
            "return sigma * self._own_derivative",
            "return self._own_derivative",
        ),
        wrong(
            "drift and diffusion at the end of the step",
            "ctrl.solvers.EulerMaruyama.step_into",
            "t = as_like(t0, states)",
            "t = as_like(t1, states)",
        ),
        wrong(
            "drift + 1 % in place",
            "ctrl.solvers.EulerMaruyama.step_into",
            "alpha=float(t1 - t0)",
            "alpha=1.01 * float(t1 - t0)",
        ),
        wrong(
            "diffusion not averaged",
            "ctrl.solvers.Heun.step",
            "sde.diffuse(end, there, increment, action)",
            "sde.diffuse(t, states, increment, action)",
        ),
        wrong(
            "predictor without noise",
            "ctrl.solvers.Heun.step",
            "there = states + here",
            "there = states + h * sde.drift_at(t, states, action)",
        ),
        wrong(
            "dt for sqrt(dt)",
            "ctrl.noise.gauss_hermite",
            "* step_sizes.sqrt()[:, None]",
            "* step_sizes[:, None]",
        ),
        wrong(
            "diffusion for torchsde + 1 %",
            "ctrl.torchsde_solver._Equation.g",
            "return sigma.reshape_as(y) if",
            "return 1.01 * sigma.reshape_as(y) if",
            full=True,
        ),
        wrong(
            "Girsanov shift missing in the recursion by hand",
            "verification.closed_form.geometric_brownian_motion.mean_square_error",
            "_mean(r, p.volatility * h, h)",
            "_mean(r, 0.0, h)",
        ),
    ],
)
def strong_orders(setting: Setting) -> Iterator[Check]:
    """Errors on an uneven grid by two routes, then orders on even ones."""
    stratonovich = ITO.to_stratonovich()
    solvers = {
        "Euler-Maruyama": (ctrl.EulerMaruyama(), ITO, 0.5),
        "Milstein": (ctrl.Milstein(), ITO, 1.0),
        "Heun": (ctrl.Heun(), stratonovich, 1.0),
    }
    if setting.full:
        solvers["torchsde's milstein"] = (ctrl.TorchSDE("milstein"), ITO, 1.0)
        solvers["torchsde's midpoint"] = (ctrl.TorchSDE("midpoint"), stratonovich, 1.0)
    for name, (solver, sde, order) in solvers.items():
        if name in ("Euler-Maruyama", "Milstein", "Heun"):
            mean_square = error_by_products(setting, solver, sde, list(UNEVEN))
            want = mean_square_error(P, name, np.array(UNEVEN))
            yield expectation(
                f"{name}: mean square error, against a recursion by hand", mean_square, want
            )
        errors = [
            math.sqrt(error_by_products(setting, solver, sde, grid.nodes.tolist()))
            for grid in (ctrl.uniform_grid(P.horizon, steps) for steps in STEPS)
        ]
        line = [(P.horizon / steps, e) for steps, e in zip(STEPS, errors, strict=True)]
        yield limit(f"{name}: local strong order", local_order(errors, 0.0), order, curve=line)


# --- linear systems: pairs of runs on one refined path

DRIFT = ((-0.4, 0.7), (0.25, -0.9))
FIRST = ((0.5, 0.3), (-0.2, 0.35))
SECOND = ((-0.3, 0.45), (0.6, 0.2))  # does not commute with FIRST
TOGETHER = ((0.25, 0.12), (-0.08, 0.19))  # 0.4 FIRST + 0.05: does
SHIFT = ((0.0, 0.7), (0.0, 0.0))  # additive noise of the first coordinate where the second is 1
RESTORING = ((-0.9, 0.4), (0.0, 0.0))
STRETCH = ((0.6, 0.0), (0.0, 0.0))  # multiplicative, where a constant drift does not commute
START = (1.3, 0.8)


def linear(setting: Setting, drift: Any, *columns: Any) -> ctrl.ControlledSDE:
    """dX = A X dt + sum_j B_j X dW_j (Ito), of general noise."""
    a, b = setting.tensor(drift), torch.stack([setting.tensor(one) for one in columns])
    return ctrl.ControlledSDE(
        lambda t, x, _: x @ a.T,
        lambda t, x: torch.einsum("jik,pk->pij", b, x),
        noise="general",
        noise_dim=len(columns),
    )


@dataclass(frozen=True)
class OwnAreas(ctrl.TorchSDE):
    """srk on given pairs of an increment and its integral, in place of a drawn integral."""

    integral: Any = None

    def _pieces(
        self, begin: Tensor, end: Tensor, increment: Tensor, normals: Iterator[Tensor] | None
    ) -> Iterator[Any]:
        yield begin, end, _Piece(increment, self.integral)


def difference(setting: Setting, solver: ctrl.Solver, sde: ctrl.ControlledSDE, steps: int) -> float:
    """Root of E |X^h_1 - X^{h/2}_1|^2 along one path, by second moments of the pair."""
    h = 1.0 / steps
    motions = () if sde.noise == "scalar" else (sde.noise_dim or 2,)
    fine = ctrl.TimeGrid(setting.tensor([0.0, h / 2, h]))
    coarse = ctrl.TimeGrid(setting.tensor([0.0, h]))
    rule = ctrl.noise.gauss_hermite(fine.steps, nodes=4, noise=motions)
    sums = ctrl.noise.coarsen(rule.increments, fine.nodes, coarse.nodes)
    problem = ctrl.ControlProblem(sde, 1.0)

    def run(grid: ctrl.TimeGrid, increments: Tensor, start: Tensor) -> Tensor:
        noise = ctrl.Noise(increments)
        return ctrl.simulate_end(problem, STILL, start, grid, solver, noise=noise)

    transfers = []
    for grid, increments in ((coarse, sums), (fine, rule.increments)):
        # a step is linear: probed with unit vectors
        units = [x.expand(len(increments), -1).contiguous() for x in torch.eye(2).to(increments)]
        transfers.append(torch.stack([run(grid, increments, x) for x in units], dim=-1))
    assert rule.weights is not None
    return root_of_recursion(setting, torch.stack(transfers), rule.weights, steps)


def root_of_recursion(setting: Setting, pair: Tensor, weights: Tensor, steps: int) -> float:
    """Root of E |X - Y|^2 after so many steps of two linear maps [2, nodes, 2, 2]."""
    moments = torch.einsum("apij,bpkl,p->abikjl", pair, pair, weights)
    start = torch.outer(*[setting.tensor(START)] * 2).flatten()

    def second(a: int, b: int) -> float:
        whole = torch.linalg.matrix_power(moments[a, b].reshape(4, 4), steps) @ start
        return float(whole.view(2, 2).trace())

    return math.sqrt(second(0, 0) - 2 * second(0, 1) + second(1, 1))


def with_areas(setting: Setting, sde: ctrl.ControlledSDE, steps: int, own: bool) -> float:
    """``difference`` for srk, whose integral over the coarse step is the path's own or another."""
    h = 1.0 / steps
    count = 4 if own else 5
    rule = ctrl.noise.gauss_hermite(setting.tensor([1.0]), nodes=4, noise=(count,))
    z = rule.increments[:, 0]
    assert rule.weights is not None
    halves = [half_area(h / 2, z[:, 0], z[:, 1]), half_area(h / 2, z[:, 2], z[:, 3])]
    (w, first), (after, second) = halves
    whole = first + second + w * h / 2
    if not own:
        whole = h * (0.5 * (w + after) + math.sqrt(h / 12) * z[:, 4])

    def step(x: Tensor, begin: float, end: float, w: Tensor, integral: Tensor) -> Tensor:
        solver = OwnAreas("srk", integral=integral[:, None])
        nodes = setting.tensor([begin, end])
        return solver.step(sde, nodes[0], nodes[1], x, torch.zeros_like(x), w).detach()

    units = [x.expand(len(z), -1).contiguous() for x in torch.eye(2).to(z)]
    coarse = [step(x, 0.0, h, w + after, whole) for x in units]
    fine = [step(step(x, 0.0, h / 2, w, first), h / 2, h, after, second) for x in units]
    pair = torch.stack([torch.stack(coarse, dim=-1), torch.stack(fine, dim=-1)])
    return root_of_recursion(setting, pair, rule.weights, steps)


def half_area(h: float, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(W, int W dt) over h from two normals: the integral is h (W / 2 + N(0, h / 12))."""
    w = math.sqrt(h) * first
    return w, h * (0.5 * w + math.sqrt(h / 12) * second)


@claim(
    statement="""
        Several Brownian motions: Heun has strong order 1 where they commute and 1/2 where they do
        not, EulerMaruyama 1/2, and 1 for additive noise; Milstein 1 for one Brownian motion that
        drives all coordinates, srk 3/2 with the integrals of that path. Measured along one path, on
        a grid and on the refined one. False: srk with integrals that are drawn anew on every grid
        has order 3/2 along a path; it has 1.
        """,
    source="Kloeden & Platen, sections 10.3, 11.1; Clark & Cameron 1980; Roessler 2010",
    why_double=DOUBLE,
    wrongs=[
        wrong(
            "coarse increments not summed",
            "ctrl.noise.coarsen",
            "increments[:, a:b].sum(1)",
            "increments[:, a:b].mean(1)",
        ),
        wrong(
            "coarse increments without the last fine one",
            "ctrl.noise.coarsen",
            "increments[:, a:b].sum(1)",
            "1.4142135623730951 * increments[:, a]",
        ),
        wrong(
            "diffusion not averaged",
            "ctrl.solvers.Heun.step",
            "sde.diffuse(end, there, increment, action)",
            "sde.diffuse(t, states, increment, action)",
        ),
        wrong(
            "columns exchanged at the end of the step",
            "ctrl.solvers.Heun.step",
            "sde.diffuse(end, there, increment, action)",
            "sde.diffuse(end, there, increment.flip(-1), action)",
        ),
        wrong(
            "derivative of sigma in the wrong direction",
            "ctrl.sde.ControlledSDE.noise_drift",
            "return along(sigma)",
            "return along(sigma.flip(-1))",
        ),
        wrong("Milstein's term with the wrong sign", MILSTEIN, "0.5 * (", "-0.5 * ("),
        wrong("Milstein's term + 10 %", MILSTEIN, "0.5 * (", "0.55 * ("),
        wrong(
            "the path's own integral where another is meant",
            "verification.claims.strong_orders.with_areas",
            "if not own:",
            "if own is None:",
        ),
        wrong(
            "the integral over a coarse step without the area between its halves",
            "verification.claims.strong_orders.with_areas",
            "first + second + w * h / 2",
            "first + second + after * h / 2",
        ),
        wrong(
            "W in place of its integral, times h",
            "ctrl.torchsde_solver._Piece.__call__",
            "(self.increment, self.integral)",
            "(self.increment, (tb - ta) * self.increment)",
        ),
        wrong(
            "additive noise that depends on the step",
            "ctrl.solvers.EulerMaruyama.step_into",
            "sde.diffuse(t, states, increment, action)",
            "(1 + float(t1 - t0) ** 0.5) * sde.diffuse(t, states, increment, action)",
        ),
    ],
)
def strong_orders_of_several_brownian_motions(setting: Setting) -> Iterator[Check]:
    """Orders of pairs of runs."""
    mixing = linear(setting, DRIFT, FIRST, SECOND)
    commuting = linear(setting, DRIFT, FIRST, TOGETHER)
    additive = linear(setting, RESTORING, SHIFT)
    b = setting.tensor(SECOND)
    single = ctrl.ControlledSDE(mixing.drift, lambda t, x: x @ b.T, noise="scalar")
    cases = [
        ("Heun, noises that commute", ctrl.Heun(), commuting.to_stratonovich(), 1.0),
        ("Heun, noises that do not", ctrl.Heun(), mixing.to_stratonovich(), 0.5),
        ("EulerMaruyama, noises that commute", ctrl.EulerMaruyama(), commuting, 0.5),
        ("EulerMaruyama, additive noise", ctrl.EulerMaruyama(), additive, 1.0),
        ("Milstein, one noise for all coordinates", ctrl.Milstein(), single, 1.0),
    ]
    for name, solver, sde, order in cases:
        errors = [difference(setting, solver, sde, steps) for steps in (8, 16, 32, 64)]
        line = [(1 / steps, e) for steps, e in zip((8, 16, 32, 64), errors, strict=True)]
        yield limit(f"{name}: local strong order", local_order(errors, 0.0), order, curve=line)
    a, c = setting.tensor(RESTORING), setting.tensor(STRETCH)
    sde = ctrl.ControlledSDE(lambda t, x, _: x @ a.T, lambda t, x: x @ c.T, noise="scalar")
    for own, order in ((True, 1.5), (False, 1.0)):
        errors = [with_areas(setting, sde, steps, own) for steps in (8, 16, 32, 64)]
        name = "the path's integrals" if own else "integrals drawn anew"
        line = [(1 / steps, e) for steps, e in zip((8, 16, 32, 64), errors, strict=True)]
        strong_order = local_order(errors, 0.0)
        yield limit(f"srk, {name}: local strong order", strong_order, order, curve=line)
