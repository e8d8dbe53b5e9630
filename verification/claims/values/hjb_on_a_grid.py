"""The exploratory Hamilton-Jacobi-Bellman equation on a grid, against Riccati's.

rho v = gam log int exp(H(x, a, v_x, v_xx) / gam) da, and v_t + ... = rho v with a horizon:
the monotone grid scheme's limit is the closed form of the linear-quadratic problem: value,
mean and standard deviation of the policy. Second order in time by backward
differentiation, first by Euler's; first order in space where noise is weaker than |b| h.

    rho v = gam log int exp((b v_x + sigma^2 v_xx / 2 + r) / gam) da

A scheme on a grid, which knows nothing of quadratics, finds the value, the mean and the std of
the linear-quadratic closed form. Central differences of a quadratic are exact, so that what is left
of the error is the grid's wall, the step in time, or (weak noise) the artificial noise.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

import ctrl
from ctrl import hjb
from ctrl.action_grid import gauss_legendre
from ctrl.state_grid import Axis
from verification.claim import Check, Setting, limit
from verification.closed_form import lq as exact
from verification.problems.lq import production

SOURCE = "Wang, Zariphopoulou & Zhou 2020, equation 13; Kushner & Dupuis 2001, chapters 5, 6"
WHY_DOUBLE = "the grids of ctrl.hjb are in float64"

SCALAR = exact.Scalar(-0.6, 0.8, 0.0, 0.5, 1.3, 0.4, 0.9, 0.33, -0.21, 0.45, 0.3)
NOISE = 0.7  # that nothing moves, of a second Brownian motion
LAW = exact.Law(np.array([[-0.3]]), np.array([0.2]), np.array([[0.36]]))
WIDE = (Axis(-5.0, 5.0, 81),)
HORIZON = 0.8


def problem_of(p: exact.Scalar, noise: float, end: float = 0.0) -> exact.LQ:
    """The scalar problem with noise of its own, and perhaps a terminal cost."""
    one = np.ones((1, 1))
    return exact.LQ(
        A=p.A * one, B=p.B * one, sigma=np.array([[0.0], [noise]]), M=p.M * one, N=p.N * one,
        R=p.R * one, p=np.array([p.P]), l=np.array([p.L]), H=end * one, h=np.array([end / 3]),
        f=np.array([0.0]), C=np.array([[[p.C]], [[0.0]]]), D=np.array([[[p.D]], [[0.0]]]),
        discount=p.discount, temperature=p.temperature,
    )  # fmt: skip


def near(table: Tensor, axes: tuple[Axis, ...], width: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes within ``width`` of 0, and what the table has there."""
    x = axes[0].points().numpy()
    inside = np.abs(x) <= width
    return x[inside], table.reshape(len(x)).numpy()[inside]


def solved(
    p: exact.Scalar,
    noise: float,
    axes: tuple[Axis, ...],
    differences: Literal["monotone", "central"] = "monotone",
) -> hjb.Solution:
    """By production's grid."""
    problem = production(problem_of(p, noise), Setting()).problem()
    return hjb.solve_discounted(
        problem, axes, gauss_legendre(-7.0, 7.0, 36), differences=differences
    )


def order(errors: list[float]) -> float:
    """log2 of the ratio of two successive differences, the grids halving."""
    one, two, three = errors
    return math.log2(max(abs(one - two), 1e-9) / max(abs(two - three), 1e-9))


def checks(setting: Setting) -> Iterator[Check]:
    """Without horizon, with one, and the orders."""
    p = SCALAR
    form = exact.solve_scalar(p)
    solution = solved(p, NOISE, WIDE, differences="central")
    x, v = near(solution.value.table, WIDE, 1.0)
    constant = (form.rate + NOISE**2 * form.k2 / 2) / p.discount
    want = form.k2 * x**2 / 2 + form.k1 * x + constant
    yield limit("discounted: value", v, want)
    _, mean = near(solution.mean_action.table, WIDE, 1.0)
    yield limit("discounted: mean of the policy", mean, form.gain * x + form.offset)
    _, std = near(solution.action_std.table, WIDE, 1.0)
    yield limit("discounted: spread of the policy", std, math.sqrt(form.variance) + 0 * x)

    lq = problem_of(p, NOISE)
    policy = ctrl.GaussianPolicy(lambda t, x: -0.3 * x + 0.2, 0.6)
    problem = production(lq, setting).problem()
    value = hjb.evaluate_discounted(problem, policy, WIDE, differences="central")
    _, v = near(value.table, WIDE, 1.0)
    want = [exact.discounted_value_by_moments(lq, LAW, np.array([each])) for each in x]
    yield limit("discounted: value of a policy, by moments", v, want)

    lq = problem_of(replace(p, D=0.0), NOISE, end=1.1)  # at a wall v_xx would reward D
    problem = production(lq, setting).problem(HORIZON)
    actions = gauss_legendre(-7.0, 7.0, 36)
    axes = (Axis(-5.0, 5.0, 41),)
    S, e, c = exact.riccati(lq, HORIZON)
    methods: tuple[tuple[str, Literal[1, 2], tuple[int, ...]], ...] = (
        ("differentiation", 2, (8, 16, 32)),
        ("Euler", 1, (16, 32, 64)),
    )
    for name, method, counts in methods:
        rows = []
        for steps in counts:
            solution = hjb.solve_finite_horizon(
                problem, axes, actions, steps=steps, order=method, differences="central"
            )
            x, v = near(solution.value.table[0], axes, 0.8)
            rows.append(v)
        level = [float(row[-2]) for row in rows]
        if method == 2:
            yield limit(f"backward {name}: order in time", order(level), 2.0)
        power = 2**method
        last = (power * rows[2] - rows[1]) / (power - 1)
        want = S[0, 0] * x**2 / 2 + e[0] * x + c
        yield limit(f"backward {name}: value, as steps vanish", last, want)
    if setting.full:
        axes = (Axis(-5.0, 5.0, 41),)
        level = []
        for steps in (64, 128, 256):
            solution = hjb.solve_finite_horizon(
                problem, axes, actions, steps=steps, order=1, differences="central"
            )
            level.append(float(near(solution.value.table[0], axes, 0.8)[1][-2]))
        yield limit("backward Euler: order in time", order(level), 1.0)
        weak = replace(p, D=0.0)
        form = exact.solve_scalar(weak)
        errors = []
        for nodes in (41, 81, 161, 321):
            axes = (Axis(-4.0, 4.0, nodes),)
            x, v = near(solved(weak, 0.02, axes).value.table, axes, 0.8)
            constant = (form.rate + 0.02**2 * form.k2 / 2) / weak.discount
            want = form.k2 * x**2 / 2 + form.k1 * x + constant
            errors.append(float(np.abs(v - want).max()))
        name = "noise weaker than |b| h: order in space"
        yield limit(name, math.log2(errors[2] / errors[3]), 1.0)


MISTAKES = """
ctrl.markov_chain._coefficients
    sigma for its square | = sigma @ sigma.mT => = (sigma @ sigma.mT)**.5
ctrl.markov_chain._rates
    drift over one spacing for two | drift[..., i] / (2 * h) => drift[..., i] / h
    drift's direction | (full + sign * pull) => (full - sign * pull)
ctrl.bellman.gibbs
    temperature inverse [RuntimeError] | H / temperature + log => H * temperature + log
    log-partition term missing | return temperature * normaliser => return (logits.exp()*H).sum(0)/normaliser.exp()
ctrl.bellman.backward
    sign of the discount | discount(t) + slope => slope - discount(t)
    P(T) = 0 for H | v = before = terminal => v = before = 0 * terminal
    backward differentiation without its memory | slope, source, guess = 1.5 / h, (4 * v - before) / (2 * h), 2 * v - before
        => slope, source, guess = 1 / h, v / h, v
ctrl.hjb._function
    time runs forward | rows[::-1] => rows
ctrl.hjb._given
    entropy of a policy missing | bonus = problem.temperature * entropy => bonus = 0 * entropy
    drawn actions: their mean alone | if policy.is_random: => if False:
shared
    outer temperature missing, in gibbs [RuntimeError]
    noise of a step without its half
    weights of the actions missing
"""
