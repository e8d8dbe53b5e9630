"""Adaptive steps of torchsde against an exact solution.

Adaptive steps of torchsde, the path refined within a step and its increment kept, converge
on every path: on geometric Brownian motion to start exp((b - s^2 / 2) h + s dW).
"""

import math
from collections.abc import Iterator

import torch

import ctrl
from verification.claim import Check, Setting, limit

SOURCE = "Kloeden & Platen, section 4.4; torchsde 0.2.6"
WHY_DOUBLE = "tolerances of the steps are near float32's round-off"


def checks(setting: Setting) -> Iterator[Check]:
    """Against the exact solution, which depends on the increment alone."""
    pull, volatility, horizon = -0.7, 0.55, 0.1
    sde = ctrl.ControlledSDE(lambda t, x, a: pull * x, lambda t, x: volatility * x)
    t0, t1 = setting.tensor([0.0, horizon])
    x, w = setting.tensor([[1.3], [0.8]]), setting.tensor([[0.6], [-0.45]])
    solver = ctrl.TorchSDE("srk", adaptive=True, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        after = solver.step(sde, t0, t1, x, 0 * x, w)
    exact = [
        [start * math.exp((pull - volatility**2 / 2) * horizon + volatility * end)]
        for start, end in zip((1.3, 0.8), (0.6, -0.45), strict=True)
    ]
    yield limit("adaptive steps, along two paths", after, exact)


MISTAKES = """
ctrl.torchsde_solver._Equation.f
    drift for torchsde + 2 % | self.sde.drift_at(as_like(t, y), x, self.action)
        => 1.02 * self.sde.drift_at(as_like(t, y), x, self.action)
ctrl.torchsde_solver._tree
    another path inside the step | `W=increment, ` => `W=1.1 * increment, `
shared
    diffusion for torchsde + 1 %
"""
