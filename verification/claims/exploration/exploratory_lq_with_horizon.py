"""Exploratory linear-quadratic control with a horizon: optimum, values of policies, HJB.

dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + sigma_j) dW_j over [t, T], reward
-(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) + gam entropy, -(x'Hx/2 + h'x) at T, discount rho:
V* = x'Sx/2 + e'x + c, pi* = N(W^{-1}(B'V_x + sum_j D_j'S(C_j x + sigma_j) - R x - l),
gam W^{-1}), W = N - sum_j D_j'S D_j, S the solution of the Riccati equation. And
gam log pi* = d_t V + H - rho V for all actions: the exploratory HJB equation.
"""

from collections.abc import Iterator

import numpy as np

import ctrl
from ctrl.q_learning import q_rate
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import lq as exact
from verification.problems.lq import (
    ACTIONS,
    HORIZON,
    LAW,
    X,
    _tensor,
    flat,
    production,
    production_law,
)

SOURCE = "Wang, Zariphopoulou & Zhou 2020, section 4; Yong & Zhou 1999, chapter 6"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"


def exact_flat(value: exact.Quadratic) -> np.ndarray:
    """S, e and c in a row."""
    return np.concatenate([value[0].ravel(), value[1], [value[2]]])


def checks(setting: Setting) -> Iterator[Check]:
    """The value of a policy, the optimum, and the HJB equation."""
    lq, still = exact.example(), exact.example(noise_moves=False)
    problem, times = production(lq, setting), _tensor([0.0, 0.37, HORIZON], setting)
    x, law = _tensor(X, setting), production_law(LAW, setting)
    policy_value = ctrl.linear.evaluate_lq(problem, law, times).value(times[0], x)
    want = [exact.value_by_moments(lq, LAW, each, HORIZON) for each in X]
    yield expectation("value of a policy, by the moments of its state", policy_value, want)

    solution = ctrl.linear.solve_lq(problem, times)
    got, want = flat(solution.value_at(times[1])), exact.riccati(lq, HORIZON - 0.37)
    yield expectation("optimal value, by scipy", got, exact_flat(want))
    end = flat(solution.value_at(times[-1]))
    yield pathwise("at the end V is the terminal reward", end, exact_flat((-lq.H, -lq.h, 0.0)))

    # every action, at any time: gam log pi = q
    policy, t = solution.policy(), _tensor(0.53, setting)
    assert not isinstance(policy, ctrl.DeterministicPolicy)  # the temperature is positive
    a = _tensor(ACTIONS, setting)
    q = q_rate(problem.problem(HORIZON), solution.value, t, x, a)
    log_pi = lq.temperature * policy.log_prob(t, x, a)
    yield pathwise("HJB equation: q = gam log pi at any action", q, log_pi)

    simple = ctrl.linear.solve_lq(production(still, setting), times)
    got, want = flat(simple.value_at(times[0])), exact.riccati_by_exponential(still, HORIZON)
    yield expectation("noise that nothing moves: by matrix exponentials", got, exact_flat(want))
    want = exact.riccati(still, HORIZON)
    yield expectation("noise that nothing moves: by scipy", got, exact_flat(want))


MISTAKES = """
ctrl.linear.lq.value_rate
    A for 2 A | both + both.mT + quadratic => 0.5 * (both + both.mT) + quadratic
    sign of the discount | quadratic - discount[..., None, None] * S => quadratic + discount[..., None, None] * S
    discount missing in the slope | slope - discount[..., None] * e => slope
    noise of the state missing | (C.mT @ each @ C).sum(-3) - lq.M => -lq.M
ctrl.linear.lq.curvature
    sign of the action's noise [ValueError] | lq.N - ( => lq.N + (
ctrl.linear.lq.LinearQuadratic.terminal
    P(T) = 0 for H | Quadratic(-self.H, => Quadratic(0 * self.H,
    sign of the linear terminal cost | -self.h, => self.h,
shared
    sign of the state's cost
    1/2 of the second-order term missing
    sigma for its square
    price of drawing missing
    log-partition term missing
    sign of the entropy
    entropy without its e
    1/2 of the entropy missing
    inverse of the temperature
    policy's variance temperature * W for temperature / W
    policy's mean halved
    action's noise missing in W
    noise that the action reaches missing in the gain
    1/2 of the second derivative missing
    HJB: sign of the discount
    second-order term of q missing
"""
