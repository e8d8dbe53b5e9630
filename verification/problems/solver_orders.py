"""Weak orders of the solvers, and the limit that all of them have.

Expectations by backward induction through the production step are the scheme's own, to round-off;
so errors, and not noisy estimates of them, show the order, locally and from both sides, and their
extrapolation the limit. Order and limit are two checks: a drift that is 1 % too large still has an
order, and noise that is 1 % too large has one that looks like 0.9 on coarse grids.

The equation is nonlinear, its noise depends on state and time, the control is a feedback that is
held over each step, and the start is spread out. All is smooth and of period 2 pi.
"""

import ctrl
from verification.claim import Setting
from verification.closed_form.circle import Circle
from verification.problems.backward_induction import expectation, points

C = Circle()
STEPS = (3, 6, 12, 24)
POINTS = 24
FEEDBACK = ctrl.DeterministicPolicy(lambda t, x: C.steer * x.cos())

ITO = ctrl.ControlledSDE(
    lambda t, x, a: C.lift + C.bend * t + C.pull * x.sin() + a,
    lambda t, x: (C.noise + C.swing * x.cos()) * (1 + C.growth * t),
)


def means(
    setting: Setting, solver: ctrl.Solver, sde: ctrl.ControlledSDE, c: Circle = C
) -> list[float]:
    """E exp(sin X_T) on finer and finer grids, X_0 spread out as the circle's."""
    x = points(POINTS, setting.tensor(0.0))
    density = (c.peak * (x - c.centre).cos()).exp()
    density = density / density.sum()
    by_steps: list[float] = []
    for steps in STEPS:
        nodes = ctrl.uniform_grid(c.horizon, steps).nodes.to(x)
        values = expectation(solver, sde, FEEDBACK, x.sin().exp(), nodes, rule=8)
        by_steps.append(float(density @ values))
    return by_steps


def curve(by_steps: list[float], want: float, c: Circle = C) -> list[tuple[float, float]]:
    """Step sizes and errors, for the report's plot."""
    return [(c.horizon / steps, one - want) for steps, one in zip(STEPS, by_steps, strict=True)]
