"""Weak orders of our solvers, and the limit of each.

EulerMaruyama and Milstein on dX = b dt + s dW (Ito), and Heun on the Stratonovich
equation of drift b - s s' / 2, have weak order 1:
E f(X^h_T) = E f(X_T) + C h + O(h^2), with one limit, that of Kolmogorov's equations.
False: without the correction, or with another, Heun converges too, but elsewhere.
"""

from collections.abc import Iterator

import ctrl
from verification.claim import Check, Setting, limit
from verification.claim import expectation as exact
from verification.closed_form.circle import backward, forward
from verification.closed_form.extrapolation import extrapolated
from verification.problems.backward_induction import local_order
from verification.problems.solver_orders import ITO, C, curve, means

SOURCE = "Kloeden & Platen, Numerical Solution of SDEs, sections 4.9, 14.1"
WHY_DOUBLE = "orders are read off differences of errors, which float32's round-off covers"

OURS = {"EulerMaruyama": ctrl.EulerMaruyama(), "Heun": ctrl.Heun(), "Milstein": ctrl.Milstein()}


def checks(setting: Setting) -> Iterator[Check]:
    """Order and limit of each of our solvers."""
    want = backward(C)
    yield exact("the references: Kolmogorov backward and forward", forward(C), want)
    for name, solver in OURS.items():
        by_steps = means(setting, solver, ITO.to_stratonovich() if name == "Heun" else ITO)
        order = local_order(by_steps, want)
        yield limit(f"{name}: local weak order", order, 1.0, curve=curve(by_steps, want))
        yield limit(f"{name}: extrapolated limit", extrapolated(by_steps), want)


MISTAKES = r"""
ctrl.solvers.Heun.step
    diffusion at the end only | return states + 0.5 * (here + over_there + sde.diffuse(end, there, increment, action))
        => return there + 0.5 * (over_there - h * sde.drift_at(t, states, action)) - sde.diffuse(t, states, increment) + sde.diffuse(end, there, increment)
ctrl.sde.ControlledSDE.diffuse
    g^2 for g | return sigma * increment\n => return sigma * sigma * increment\n
    noise variance + 1 % | return sigma * increment\n => return 1.005 * sigma * increment\n
ctrl.sde.ControlledSDE.drift_at
    drift + 1 % | return value => return 1.01 * value
    the action left out | self.drift, t, states, actions) => self.drift, t, states, 0.9 * actions)
ctrl.solvers.Milstein._correction
    dW^2 reduced by 1.1 h | (increment.square() - h) => (increment.square() - 1.1 * h)
verification.closed_form.circle.backward
    second derivative with g for g^2 in the reference | 0.5 * diffusion**2 => 0.5 * diffusion
verification.closed_form.circle.forward
    second derivative + 0.4 % in the reference | 0.5 * k**2 => 0.502 * k**2
shared
    drift correction missing
    correction's sign
    drift correction without 1/2
    g' for g g', diagonal
    diffusion not averaged
    dt for sqrt(dt)
    dW^2 not reduced by h
"""
