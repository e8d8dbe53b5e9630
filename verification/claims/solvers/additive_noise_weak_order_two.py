"""Weak order two for additive noise, and the two ways to lose it.

Heun has weak order 2 for additive noise: E f(X^h_T) = E f(X_T) + C h^2 + O(h^3) where s
depends on time alone. False: it has order 1 still where the control is a feedback that is
held over each step, and Euler-Maruyama has order 1 always.
"""

from collections.abc import Iterator
from dataclasses import replace

import ctrl
from verification.claim import Check, Setting, limit
from verification.closed_form.circle import backward
from verification.closed_form.extrapolation import extrapolated
from verification.problems.backward_induction import local_order
from verification.problems.solver_orders import C, curve, means

SOURCE = "Kloeden & Platen, section 15.1; Milstein & Tretyakov, Stochastic Numerics, section 2.2"
WHY_DOUBLE = "orders are read off differences of errors, which float32's round-off covers"

EVEN = replace(C, swing=0.0, centre=1.6)  # noise that does not depend on the state


def checks(setting: Setting) -> Iterator[Check]:
    """Order 2, and the two ways to lose it."""
    sde = ctrl.ControlledSDE(
        lambda t, x, a: C.lift + C.bend * t + C.pull * x.sin() + a,
        lambda t, x: EVEN.noise * (1 + EVEN.growth * t) + 0 * x,
        calculus="stratonovich",
    )
    whole = replace(sde, drift=lambda t, x, a: sde.drift(t, x, C.steer * x.cos()))
    want = backward(EVEN)
    by_steps = means(setting, ctrl.Heun(), whole, EVEN)
    line = curve(by_steps, want, EVEN)
    yield limit("Heun: local weak order is 2", local_order(by_steps, want), 2.0, curve=line)
    yield limit("Heun: extrapolated limit", extrapolated(by_steps, power=2), want)
    held = means(setting, ctrl.Heun(), sde, EVEN)
    yield limit("Heun with a feedback held: local weak order is 1", local_order(held, want), 1.0)


MISTAKES = """
ctrl.solvers.Heun.step
    drift not averaged | over_there = h * sde.drift_at(end, there, action)
        => over_there = h * sde.drift_at(t, states, action)
    drift at the end at the time of the start | sde.drift_at(end, there, action) => sde.drift_at(t, there, action)
ctrl.sde.ControlledSDE.drift_at
    drift + 0.1 % | return value => return 1.001 * value
shared
    predictor without noise
    diffusion not averaged
"""
