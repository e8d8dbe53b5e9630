"""Strong orders of solvers with one Brownian motion.

On geometric Brownian motion, E |X^h_T - X_T|^2 = O(h^(2p)) along one Brownian path, with
p = 1/2 for EulerMaruyama, 1 for Milstein and for Heun; and the mean square error is what a
recursion by hand says it is.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

import ctrl
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form.geometric_brownian_motion import (
    GeometricBrownianMotion,
    growth,
    mean_square_error,
)
from verification.problems.backward_induction import local_order
from verification.problems.strong_orders import STILL

SOURCE = "Kloeden & Platen, Theorems 10.2.2, 10.3.5"
WHY_DOUBLE = "orders are read off differences that float32's round-off covers"

P = GeometricBrownianMotion()
UNEVEN = (0.0, 0.1, 0.35, 0.5, 0.8)
STEPS = (4, 8, 16, 32)
ITO = ctrl.ControlledSDE(lambda t, x, a: (P.rate + P.ramp * t) * x, lambda t, x: P.volatility * x)


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


def checks(setting: Setting) -> Iterator[Check]:
    """Errors on an uneven grid by two routes, then orders on even ones."""
    stratonovich = ITO.to_stratonovich()
    solvers = {
        "Euler-Maruyama": (ctrl.EulerMaruyama(), ITO, 0.5),
        "Milstein": (ctrl.Milstein(), ITO, 1.0),
        "Heun": (ctrl.Heun(), stratonovich, 1.0),
    }
    for name, (solver, sde, _) in solvers.items():
        mean_square = error_by_products(setting, solver, sde, list(UNEVEN))
        want = mean_square_error(P, name, np.array(UNEVEN))
        yield expectation(
            f"{name}: mean square error, against a recursion by hand", mean_square, want
        )
    if setting.full:
        solvers["torchsde's milstein"] = (ctrl.TorchSDE("milstein"), ITO, 1.0)
        solvers["torchsde's midpoint"] = (ctrl.TorchSDE("midpoint"), stratonovich, 1.0)
    for name, (solver, sde, order) in solvers.items():
        errors = [
            math.sqrt(error_by_products(setting, solver, sde, grid.nodes.tolist()))
            for grid in (ctrl.uniform_grid(P.horizon, steps) for steps in STEPS)
        ]
        line = [(P.horizon / steps, e) for steps, e in zip(STEPS, errors, strict=True)]
        yield limit(f"{name}: local strong order", local_order(errors, 0.0), order, curve=line)


MISTAKES = """
ctrl.solvers.Milstein._correction
    Milstein's term without 1/2 | 0.5 * ( => (1.0) * (
    Milstein's term + 1 % | 0.5 * ( => 0.505 * (
ctrl.solvers.EulerMaruyama.step_into
    drift + 1 % in place | alpha=float(t1 - t0) => alpha=1.01 * float(t1 - t0)
verification.closed_form.geometric_brownian_motion.mean_square_error
    Girsanov shift missing in the recursion by hand | _mean(r, p.volatility * h, h) => _mean(r, 0.0, h)
shared
    Milstein's term with the wrong sign
    dW^2 not reduced by h
    g' for g g', diagonal
    drift of the next time in place
    diffusion not averaged
    predictor without noise
    dt for sqrt(dt)
    diffusion for torchsde + 1 % [full]
"""
