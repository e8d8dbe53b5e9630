"""Weak orders of torchsde's methods, and the limit of each.

The one-step methods of torchsde, behind ctrl.TorchSDE, have weak order 1 and the same
limit: euler and milstein on the Ito equation; euler_heun, heun, midpoint and
reversible_heun on the Stratonovich equation.
"""

from collections.abc import Iterator

import ctrl
from verification.claim import Check, Setting, limit
from verification.closed_form.circle import backward
from verification.closed_form.extrapolation import extrapolated
from verification.problems.backward_induction import local_order
from verification.problems.solver_orders import ITO, C, curve, means

SOURCE = "Kloeden & Platen, sections 4.9, 14.1; torchsde 0.2.6"
WHY_DOUBLE = "orders are read off differences of errors, which float32's round-off covers"

QUICK = ("euler", "milstein", "heun")
METHODS = ("euler", "milstein", "euler_heun", "heun", "midpoint", "reversible_heun")


def checks(setting: Setting) -> Iterator[Check]:
    """Order and limit of each method of torchsde that needs increments alone."""
    want = backward(C)
    for name in METHODS if setting.full else QUICK:
        sde = ITO if name in ("euler", "milstein") else ITO.to_stratonovich()
        by_steps = means(setting, ctrl.TorchSDE(name), sde)
        order = local_order(by_steps, want)
        yield limit(f"{name}: local weak order", order, 1.0, curve=curve(by_steps, want))
        yield limit(f"{name}: extrapolated limit", extrapolated(by_steps), want)


MISTAKES = """
ctrl.torchsde_solver._Equation.g
    diffusion + 0.5 % | return sigma.reshape_as(y) if => return 1.005 * sigma.reshape_as(y) if
    g^2 for g | return sigma.reshape_as(y) if => return sigma.square().reshape_as(y) if
ctrl.torchsde_solver._Equation.f
    drift + 1 % | self.sde.drift_at(as_like(t, y), x, self.action)
        => 1.01 * self.sde.drift_at(as_like(t, y), x, self.action)
    time of the step lost | self.sde.drift_at(as_like(t, y) => self.sde.drift_at(0 * as_like(t, y)
ctrl.torchsde_solver._Piece.__call__
    the increment used twice | return (self.increment, self.integral) if return_U else self.increment
        => return (self.increment, self.integral) if return_U else 2 * self.increment
shared
    drift correction missing
    drift correction without 1/2
"""
