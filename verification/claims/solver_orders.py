"""Weak orders of the solvers, and the limit that all of them have.

Expectations by backward induction through the production step are the scheme's own, to round-off;
so errors, and not noisy estimates of them, show the order, locally and from both sides, and their
extrapolation the limit. Order and limit are two checks: a drift that is 1 % too large still has an
order, and noise that is 1 % too large has one that looks like 0.9 on coarse grids.

The equation is nonlinear, its noise depends on state and time, the control is a feedback that is
held over each step, and the start is spread out. All is smooth and of period 2 pi.
"""

from collections.abc import Iterator
from dataclasses import replace

import ctrl
from verification.backward_induction import expectation, extrapolated, local_order, points
from verification.claim import Check, Setting, claim, limit, wrong
from verification.claim import expectation as exact
from verification.closed_form.circle import Circle, backward, forward

C = Circle()
STEPS = (3, 6, 12, 24)
POINTS = 24
DOUBLE = "orders are read off differences of errors, which float32's round-off covers"
FEEDBACK = ctrl.DeterministicPolicy(lambda t, x: C.steer * x.cos())
ITO = ctrl.ControlledSDE(
    lambda t, x, a: C.lift + C.bend * t + C.pull * x.sin() + a,
    lambda t, x: (C.noise + C.swing * x.cos()) * (1 + C.growth * t),
)


def means(
    setting: Setting,
    solver: ctrl.Solver,
    sde: ctrl.ControlledSDE,
    c: Circle = C,
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


OURS = {"EulerMaruyama": ctrl.EulerMaruyama(), "Milstein": ctrl.Milstein(), "Heun": ctrl.Heun()}
QUICK = ("euler", "milstein", "heun")
METHODS = ("euler", "milstein", "euler_heun", "heun", "midpoint", "reversible_heun")


@claim(
    statement="""
        EulerMaruyama and Milstein on dX = b dt + s dW (Ito), and Heun on the Stratonovich
        equation of drift b - s s' / 2, have weak order 1:
        E f(X^h_T) = E f(X_T) + C h + O(h^2), with one limit, that of Kolmogorov's equations.
        False: without the correction, or with another, Heun converges too, but elsewhere.
        """,
    source="Kloeden & Platen, Numerical Solution of SDEs, sections 4.9, 14.1",
    why_double=DOUBLE,
    wrongs=[
        wrong(
            "drift correction missing", "ctrl.sde.ControlledSDE._converted", "+ share *", "+ 0 *"
        ),
        wrong(
            "drift correction's sign", "ctrl.sde.ControlledSDE._converted", "+ share *", "- share *"
        ),
        wrong(
            "drift correction without 1/2",
            "ctrl.sde.ControlledSDE.to_stratonovich",
            "-0.5",
            "-1.0",
        ),
        wrong(
            "g' for g g' in the correction",
            "ctrl.sde.ControlledSDE.noise_drift",
            "return sigma * self._own_derivative",
            "return self._own_derivative",
        ),
        wrong(
            "diffusion not averaged over the step",
            "ctrl.solvers.Heun.step",
            "sde.diffuse(end, there, increment, action)",
            "sde.diffuse(t, states, increment, action)",
        ),
        wrong(
            "diffusion at the end only",
            "ctrl.solvers.Heun.step",
            "return states + 0.5 * "
            "(here + over_there + sde.diffuse(end, there, increment, action))",
            "return there + 0.5 * (over_there - h * sde.drift_at(t, states, action)) "
            "- sde.diffuse(t, states, increment) + sde.diffuse(end, there, increment)",
        ),
        wrong(
            "dt for sqrt(dt)",
            "ctrl.noise.gauss_hermite",
            "* step_sizes.sqrt()[:, None]",
            "* step_sizes[:, None]",
        ),
        wrong(
            "g^2 for g",
            "ctrl.sde.ControlledSDE.diffuse",
            "return sigma * increment\n",
            "return sigma * sigma * increment\n",
        ),
        wrong(
            "noise variance + 1 %",
            "ctrl.sde.ControlledSDE.diffuse",
            "return sigma * increment\n",
            "return 1.005 * sigma * increment\n",
        ),
        wrong(
            "drift + 1 %", "ctrl.sde.ControlledSDE.drift_at", "return value", "return 1.01 * value"
        ),
        wrong(
            "the action left out",
            "ctrl.sde.ControlledSDE.drift_at",
            "self.drift, t, states, actions)",
            "self.drift, t, states, 0.9 * actions)",
        ),
        wrong(
            "dW^2 not reduced by h",
            "ctrl.solvers.Milstein._correction",
            "(increment.square() - h)",
            "increment.square()",
        ),
        wrong(
            "dW^2 reduced by 1.1 h",
            "ctrl.solvers.Milstein._correction",
            "(increment.square() - h)",
            "(increment.square() - 1.1 * h)",
        ),
        wrong(
            "second derivative with g for g^2 in the reference",
            "verification.closed_form.circle.backward",
            "0.5 * diffusion**2",
            "0.5 * diffusion",
        ),
        wrong(
            "second derivative + 0.4 % in the reference",
            "verification.closed_form.circle.forward",
            "0.5 * k**2",
            "0.502 * k**2",
        ),
    ],
)
def weak_orders(setting: Setting) -> Iterator[Check]:
    """Order and limit of each of our solvers."""
    want = backward(C)
    yield exact("the references: Kolmogorov backward and forward", forward(C), want)
    for name, solver in OURS.items():
        by_steps = means(setting, solver, ITO.to_stratonovich() if name == "Heun" else ITO)
        order = local_order(by_steps, want)
        yield limit(f"{name}: local weak order", order, 1.0, curve=curve(by_steps, want))
        yield limit(f"{name}: extrapolated limit", extrapolated(by_steps), want)


@claim(
    statement="""
        The one-step methods of torchsde, behind ctrl.TorchSDE, have weak order 1 and the same
        limit: euler and milstein on the Ito equation; euler_heun, heun, midpoint and
        reversible_heun on the Stratonovich equation.
        """,
    source="Kloeden & Platen, sections 4.9, 14.1; torchsde 0.2.6",
    why_double=DOUBLE,
    wrongs=[
        wrong(
            "diffusion + 0.5 %",
            "ctrl.torchsde_solver._Equation.g",
            "return sigma.reshape_as(y) if",
            "return 1.005 * sigma.reshape_as(y) if",
        ),
        wrong(
            "drift + 1 %",
            "ctrl.torchsde_solver._Equation.f",
            "self.sde.drift_at(as_like(t, y), x, self.action)",
            "1.01 * self.sde.drift_at(as_like(t, y), x, self.action)",
        ),
        wrong(
            "g^2 for g",
            "ctrl.torchsde_solver._Equation.g",
            "return sigma.reshape_as(y) if",
            "return sigma.square().reshape_as(y) if",
        ),
        wrong(
            "time of the step lost",
            "ctrl.torchsde_solver._Equation.f",
            "self.sde.drift_at(as_like(t, y)",
            "self.sde.drift_at(0 * as_like(t, y)",
        ),
        wrong(
            "drift correction missing", "ctrl.sde.ControlledSDE._converted", "+ share *", "+ 0 *"
        ),
        wrong(
            "drift correction without 1/2",
            "ctrl.sde.ControlledSDE.to_stratonovich",
            "-0.5",
            "-1.0",
        ),
        wrong(
            "the increment used twice",
            "ctrl.torchsde_solver._Piece.__call__",
            "return (self.increment, self.integral) if return_U else self.increment",
            "return (self.increment, self.integral) if return_U else 2 * self.increment",
        ),
    ],
)
def weak_orders_of_torchsde(setting: Setting) -> Iterator[Check]:
    """Order and limit of each method of torchsde that needs increments alone."""
    want = backward(C)
    for name in METHODS if setting.full else QUICK:
        sde = ITO if name in ("euler", "milstein") else ITO.to_stratonovich()
        by_steps = means(setting, ctrl.TorchSDE(name), sde)
        order = local_order(by_steps, want)
        yield limit(f"{name}: local weak order", order, 1.0, curve=curve(by_steps, want))
        yield limit(f"{name}: extrapolated limit", extrapolated(by_steps), want)


EVEN = replace(C, swing=0.0, centre=1.6)  # noise that does not depend on the state


@claim(
    statement="""
        Heun has weak order 2 for additive noise: E f(X^h_T) = E f(X_T) + C h^2 + O(h^3) where s
        depends on time alone. False: it has order 1 still where the control is a feedback that is
        held over each step, and Euler-Maruyama has order 1 always.
        """,
    source="Kloeden & Platen, section 15.1; Milstein & Tretyakov, Stochastic Numerics, section 2.2",
    why_double=DOUBLE,
    wrongs=[
        wrong(
            "drift not averaged",
            "ctrl.solvers.Heun.step",
            "over_there = h * sde.drift_at(end, there, action)",
            "over_there = h * sde.drift_at(t, states, action)",
        ),
        wrong(
            "predictor without noise",
            "ctrl.solvers.Heun.step",
            "there = states + here",
            "there = states + h * sde.drift_at(t, states, action)",
        ),
        wrong(
            "drift at the end at the time of the start",
            "ctrl.solvers.Heun.step",
            "sde.drift_at(end, there, action)",
            "sde.drift_at(t, there, action)",
        ),
        wrong(
            "noise at the start only",
            "ctrl.solvers.Heun.step",
            "sde.diffuse(end, there, increment, action)",
            "sde.diffuse(t, states, increment, action)",
        ),
        wrong(
            "drift + 0.1 %",
            "ctrl.sde.ControlledSDE.drift_at",
            "return value",
            "return 1.001 * value",
        ),
    ],
)
def additive_noise_weak_order_two(setting: Setting) -> Iterator[Check]:
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
