"""Strong orders of solvers with several Brownian motions, commutative and not.

Several Brownian motions: Heun has strong order 1 where they commute and 1/2 where they do
not, EulerMaruyama 1/2, and 1 for additive noise; Milstein 1 for one Brownian motion that
drives all coordinates, srk 3/2 with the integrals of that path. Measured along one path, on
a grid and on the refined one. False: srk with integrals that are drawn anew on every grid
has order 3/2 along a path; it has 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ctrl
from ctrl.torchsde_solver import _Piece
from verification.claim import Check, Setting, limit
from verification.problems.backward_induction import local_order
from verification.problems.strong_orders import STILL

SOURCE = "Kloeden & Platen, sections 10.3, 11.1; Clark & Cameron 1980; Roessler 2010"
WHY_DOUBLE = "orders are read off differences that float32's round-off covers"

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


def _pairs(
    setting: Setting, *cases: tuple[str, ctrl.Solver, ctrl.ControlledSDE, float]
) -> Iterator[Check]:
    """The order of each solver, from pairs of runs along one path."""
    for name, solver, sde, order in cases:
        errors = [difference(setting, solver, sde, steps) for steps in (8, 16, 32, 64)]
        line = [(1 / steps, e) for steps, e in zip((8, 16, 32, 64), errors, strict=True)]
        yield limit(f"{name}: local strong order", local_order(errors, 0.0), order, curve=line)


def checks(setting: Setting) -> Iterator[Check]:
    """Orders of pairs of runs."""
    mixing = linear(setting, DRIFT, FIRST, SECOND)
    commuting = linear(setting, DRIFT, FIRST, TOGETHER)
    additive = linear(setting, RESTORING, SHIFT)
    b = setting.tensor(SECOND)
    single = ctrl.ControlledSDE(mixing.drift, lambda t, x: x @ b.T, noise="scalar")
    yield from _pairs(
        setting,
        ("EulerMaruyama, noises that commute", ctrl.EulerMaruyama(), commuting, 0.5),
        ("EulerMaruyama, additive noise", ctrl.EulerMaruyama(), additive, 1.0),
        ("Milstein, one noise for all coordinates", ctrl.Milstein(), single, 1.0),
    )
    a, c = setting.tensor(RESTORING), setting.tensor(STRETCH)
    sde = ctrl.ControlledSDE(lambda t, x, _: x @ a.T, lambda t, x: x @ c.T, noise="scalar")
    for own, order in ((True, 1.5), (False, 1.0)):
        errors = [with_areas(setting, sde, steps, own) for steps in (8, 16, 32, 64)]
        name = "the path's integrals" if own else "integrals drawn anew"
        line = [(1 / steps, e) for steps, e in zip((8, 16, 32, 64), errors, strict=True)]
        strong_order = local_order(errors, 0.0)
        yield limit(f"srk, {name}: local strong order", strong_order, order, curve=line)
    yield from _pairs(
        setting,
        ("Heun, noises that commute", ctrl.Heun(), commuting.to_stratonovich(), 1.0),
        ("Heun, noises that do not", ctrl.Heun(), mixing.to_stratonovich(), 0.5),
    )


MISTAKES = """
ctrl.noise.coarsen
    coarse increments not summed | increments[:, a:b].sum(1) => increments[:, a:b].mean(1)
    coarse increments without the last fine one | increments[:, a:b].sum(1) => 1.4142135623730951 * increments[:, a]
ctrl.solvers.Heun.step
    columns exchanged at the end of the step | sde.diffuse(end, there, increment, action)
        => sde.diffuse(end, there, increment.flip(-1), action)
ctrl.sde.ControlledSDE.noise_drift
    derivative of sigma in the wrong direction | return along(sigma) => return along(sigma.flip(-1))
ctrl.solvers.Milstein._correction
    Milstein's term + 10 % | 0.5 * ( => 0.55 * (
verification.claims.solvers.strong_orders_of_several_brownian_motions.with_areas
    the path's own integral where another is meant | if not own: => if own is None:
    the integral over a coarse step without the area between its halves | first + second + w * h / 2
        => first + second + after * h / 2
ctrl.torchsde_solver._Piece.__call__
    W in place of its integral, times h | (self.increment, self.integral)
        => (self.increment, (tb - ta) * self.increment)
ctrl.solvers.EulerMaruyama.step_into
    additive noise that depends on the step | sde.diffuse(t, states, increment, action)
        => (1 + float(t1 - t0) ** 0.5) * sde.diffuse(t, states, increment, action)
shared
    diffusion not averaged
    Milstein's term with the wrong sign
"""
