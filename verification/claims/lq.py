"""Exploratory linear-quadratic control: the one family with everything in closed form.

The value is a quadratic, the optimal policy Gaussian with the classical mean, its covariance
temperature * W^{-1} and free of the state. References: the Riccati equation by scipy and by a
matrix exponential, the value of a policy by the moments of its state, and the published formulas
of one dimension, which share no line with each other.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.linear import LinearGaussian, LinearQuadratic
from ctrl.q_learning import q_rate
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.closed_form import lq as exact

WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"
HORIZON = 0.9
X = np.array([[0.7, -0.4], [-1.2, 0.3]])
LAW = exact.Law(
    np.array([[-0.6, 0.2], [0.15, -0.45]]),
    np.array([0.25, -0.35]),
    np.array([[0.31, 0.07], [0.07, 0.19]]),
)
ACTIONS = np.array([[0.4, -0.7], [-0.9, 0.2]])


def production(lq: exact.LQ, setting: Setting) -> LinearQuadratic:
    """The same problem for ``ctrl``."""
    tensors = {each.name: _tensor(getattr(lq, each.name), setting) for each in fields(lq)}
    tensors["sigma"] = tensors["sigma"].mT.contiguous()
    return LinearQuadratic(**tensors)


def production_law(law: exact.Law, setting: Setting) -> LinearGaussian:
    """The same policy for ``ctrl``."""
    return LinearGaussian(*(_tensor(each, setting) for each in (law.K, law.k, law.Sigma)))


def _tensor(value: np.ndarray | float | list, setting: Setting) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=setting.device)


def scalar(p: exact.Scalar, setting: Setting) -> LinearQuadratic:
    """A scalar problem for ``ctrl``: the Brownian motion is moved by state and action only."""

    def matrix(value: float) -> Tensor:
        return _tensor([[value]], setting)

    return LinearQuadratic(
        A=matrix(p.A), B=matrix(p.B), sigma=matrix(0.0), M=matrix(p.M), N=matrix(p.N),
        R=matrix(p.R), p=matrix(p.P)[0], l=matrix(p.L)[0], C=matrix(p.C)[None], D=matrix(p.D)[None],
        discount=p.discount, temperature=p.temperature,
    )  # fmt: skip


def flat(value: ctrl.linear.Quadratic) -> Tensor:
    """S, e and c in a row."""
    return torch.cat([value.hessian.flatten(), value.slope, value.constant.reshape(1)])


def exact_flat(value: exact.Quadratic) -> np.ndarray:
    """S, e and c in a row."""
    return np.concatenate([value[0].ravel(), value[1], [value[2]]])


def numbers(solution: ctrl.linear.Stationary) -> list[float]:
    """Numbers of production's solution, in the order of ``exact.ScalarSolution``."""
    value, law, discount = solution.quadratic, solution.law, solution.lq.rates[0]
    average = solution.average_reward
    rate = discount * value.constant if average is None else average
    each = (value.hessian, value.slope, rate, law.gain, law.offset, law.covariance)
    return [float(one) for one in each]


def published(p: exact.Scalar) -> list[float]:
    """The published formulas, in the same order."""
    solution = exact.solve_scalar(p)
    return [getattr(solution, each.name) for each in fields(solution)]


VALUE, GREEDY = "ctrl.linear.lq.value_rate", "ctrl.linear.lq.greedy"
MOMENTS, CLOSED = "ctrl.linear.lyapunov.second_moments", "ctrl.linear.riccati._closed_loop"
WRONGS = [
    wrong(
        "1/2 of the second-order term missing",
        VALUE,
        "0.5 * (s * carried)",
        "(s * carried)",
    ),
    wrong("sigma for its square", VALUE, "0.5 * (s * carried)", "0.5 * (carried)"),
    wrong("price of drawing missing", VALUE, "constant - drawn + _entropy", "constant + _entropy"),
    wrong(
        "log-partition term missing",
        VALUE,
        "constant - drawn + _entropy_reward(lq, law.covariance)",
        "constant",
    ),
    wrong("sign of the entropy", VALUE, "- drawn + _entropy", "- drawn - _entropy"),
    wrong(
        "entropy without its e",
        "ctrl.linear.lq._entropy_reward",
        "2 * math.pi * math.e * safe",
        "2 * math.pi * safe",
    ),
    wrong(
        "1/2 of the entropy missing",
        "ctrl.linear.lq._entropy_reward",
        "0.5 * torch.linalg.slogdet",
        "torch.linalg.slogdet",
    ),
    wrong(
        "inverse of the temperature",
        GREEDY,
        "covariance = temperature[..., None, None] * ",
        "covariance = 1 / temperature[..., None, None].clamp_min(0.01) * ",
    ),
    wrong(
        "policy's variance temperature * W for temperature / W",
        GREEDY,
        "torch.cholesky_solve(eye, root)",
        "root @ root.mT",
    ),
    wrong(
        "policy's mean halved",
        GREEDY,
        "LinearGaussian(gains[..., :-1],",
        "LinearGaussian(0.5 * gains[..., :-1],",
    ),
    wrong(
        "action's noise missing in W",
        GREEDY,
        "(curvature(lq, S))",
        "(lq.N.expand_as(curvature(lq, S)))",
    ),
    wrong(
        "noise that the action reaches missing in the gain",
        GREEDY,
        "(DS @ C).sum(-3) - lq.R",
        "-lq.R",
    ),
]


@claim(
    statement="""
        dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + sigma_j) dW_j over [t, T], reward
        -(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) + gam entropy, -(x'Hx/2 + h'x) at T, discount rho:
        V* = x'Sx/2 + e'x + c, pi* = N(W^{-1}(B'V_x + sum_j D_j'S(C_j x + sigma_j) - R x - l),
        gam W^{-1}), W = N - sum_j D_j'S D_j, S the solution of the Riccati equation. And
        gam log pi* = d_t V + H - rho V for all actions: the exploratory HJB equation.
        """,
    source="Wang, Zariphopoulou & Zhou 2020, section 4; Yong & Zhou 1999, chapter 6",
    wrongs=[
        *WRONGS,
        wrong(
            "A for 2 A", VALUE, "both + both.mT + quadratic", "0.5 * (both + both.mT) + quadratic"
        ),
        wrong(
            "sign of the state's cost",
            VALUE,
            "(C.mT @ each @ C).sum(-3) - lq.M",
            "(C.mT @ each @ C).sum(-3) + lq.M",
        ),
        wrong(
            "sign of the discount",
            VALUE,
            "quadratic - discount[..., None, None] * S",
            "quadratic + discount[..., None, None] * S",
        ),
        wrong(
            "discount missing in the slope",
            VALUE,
            "slope - discount[..., None] * e",
            "slope",
        ),
        wrong("noise of the state missing", VALUE, "(C.mT @ each @ C).sum(-3) - lq.M", "-lq.M"),
        wrong(
            "sign of the action's noise",
            "ctrl.linear.lq.curvature",
            "lq.N - (",
            "lq.N + (",
            raises=ValueError,
        ),
        wrong(
            "P(T) = 0 for H",
            "ctrl.linear.lq.LinearQuadratic.terminal",
            "Quadratic(-self.H,",
            "Quadratic(0 * self.H,",
        ),
        wrong(
            "sign of the linear terminal cost",
            "ctrl.linear.lq.LinearQuadratic.terminal",
            "-self.h,",
            "self.h,",
        ),
        wrong(
            "HJB: 1/2 of the second-order term missing",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift + trace",
        ),
        wrong(
            "HJB: sign of the discount",
            "ctrl.q_learning.q_rate",
            "rate - problem.discount",
            "rate + problem.discount",
        ),
        wrong(
            "HJB: second-order term missing",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift",
        ),
    ],
    why_double=WHY_DOUBLE,
)
def exploratory_lq_with_horizon(setting: Setting) -> Iterator[Check]:
    """The optimum, the value of a policy, and the HJB equation."""
    lq, still = exact.example(), exact.example(noise_moves=False)
    problem, times = production(lq, setting), _tensor([0.0, 0.37, HORIZON], setting)
    solution = ctrl.linear.solve_lq(problem, times)
    got, want = flat(solution.value_at(times[1])), exact.riccati(lq, HORIZON - 0.37)
    yield expectation("optimal value, by scipy", got, exact_flat(want))
    simple = ctrl.linear.solve_lq(production(still, setting), times)
    got, want = flat(simple.value_at(times[0])), exact.riccati_by_exponential(still, HORIZON)
    yield expectation("noise that nothing moves: by matrix exponentials", got, exact_flat(want))
    want = exact.riccati(still, HORIZON)
    yield expectation("noise that nothing moves: by scipy", got, exact_flat(want))
    end = flat(solution.value_at(times[-1]))
    yield pathwise("at the end V is the terminal reward", end, exact_flat((-lq.H, -lq.h, 0.0)))

    # every action, at any time: gam log pi = q
    policy, t = solution.policy(), _tensor(0.53, setting)
    assert not isinstance(policy, ctrl.DeterministicPolicy)  # the temperature is positive
    x, a = _tensor(X, setting), _tensor(ACTIONS, setting)
    q = q_rate(problem.problem(HORIZON), solution.value, t, x, a)
    log_pi = lq.temperature * policy.log_prob(t, x, a)
    yield pathwise("HJB equation: q = gam log pi at any action", q, log_pi)

    law = production_law(LAW, setting)
    policy_value = ctrl.linear.evaluate_lq(problem, law, times).value(times[0], x)
    want = [exact.value_by_moments(lq, LAW, each, HORIZON) for each in X]
    yield expectation("value of a policy, by the moments of its state", policy_value, want)


def evaluated(lq: LinearQuadratic, law: LinearGaussian, x: Tensor) -> Tensor:
    """The value of a stationary policy at each x."""
    return ctrl.linear.evaluate_lq_discounted(lq, law).quadratic(x)


@claim(
    statement="""
        One dimension, without horizon: rho k2 = (k2 (B + C D) - R)^2 / W + k2 (2 A + C^2) - M with
        W = N - k2 D^2, rho k1 = (k1 B - L) K + k1 A - P, pi* = N(K x + (k1 B - L)/W, gam / W),
        K = (k2 (B + C D) - R) / W, and rho k0, or the average reward where rho = 0, is
        (k1 B - L)^2/(2 W) + (gam/2)(log(2 pi e gam / W) - 1). The ergodic benchmark of Jia & Zhou:
        pi* = N(-0.354249 x - 0.708497, 0.035425), average 0.708497, or 0.658497 exploring.
        """,
    source="Wang, Zariphopoulou & Zhou 2020, Theorem 4; Jia & Zhou 2022b, section 6, appendix B2",
    wrongs=[
        *WRONGS,
        wrong(
            "A for 2 A",
            MOMENTS,
            "kron(A.mT, eye) + kron(eye, A.mT)",
            "kron(A.mT, eye)",
        ),
        wrong("sign of the discount", CLOSED, "kept = lq.A - 0.5 *", "kept = lq.A + 0.5 *"),
        wrong("noise of the state missing", MOMENTS, " + scaled)", ")"),
        wrong("1/2 of the discount missing", CLOSED, "kept = lq.A - 0.5 *", "kept = lq.A - "),
        wrong(
            "sign of the state's cost",
            VALUE,
            "(C.mT @ each @ C).sum(-3) - lq.M",
            "(C.mT @ each @ C).sum(-3) + lq.M",
            raises=ValueError,
        ),
        wrong(
            "constant not divided by the discount",
            "ctrl.linear.riccati.evaluate_lq_discounted",
            "rate / lq.rates[0]",
            "rate",
        ),
        wrong(
            "half of the discount where one is meant",
            "ctrl.linear.riccati._stationary",
            "kept = kept - 0.5 * lq.rates[0]",
            "kept = kept - 0 * lq.rates[0]",
        ),
    ],
    why_double=WHY_DOUBLE,
)
def exploratory_lq_without_horizon(setting: Setting) -> Iterator[Check]:
    """Discounted and ergodic problems, the benchmark, and several dimensions."""
    for name, p, solve in (
        ("discounted", exact.DISCOUNTED, ctrl.linear.solve_lq_discounted),
        ("ergodic", exact.ERGODIC, ctrl.linear.solve_lq_ergodic),
    ):
        got = numbers(solve(scalar(p, setting)))
        yield expectation(f"{name}: value, policy and rate, by formula", got, published(p))
    benchmark = scalar(exact.BENCHMARK, setting)
    best = ctrl.linear.solve_lq_ergodic(benchmark)
    cold = replace(benchmark, temperature=0 * benchmark.rates[1])
    plain = ctrl.linear.evaluate_lq_ergodic(cold, best.law).average_reward
    law = best.law
    classical = ctrl.linear.solve_lq_ergodic(cold).average_reward
    assert classical is not None
    assert plain is not None
    got = [float(each) for each in (law.gain, law.offset, law.covariance, classical, plain)]
    want = [-0.354249, -0.708497, 0.035425, 0.708497, 0.658497]
    yield limit("the benchmark's published numbers, to their six digits", got, want)

    lq = exact.example()
    lq = replace(lq, A=lq.A - np.eye(2))
    still = replace(lq, C=0 * lq.C, D=0 * lq.D)
    got = ctrl.linear.solve_lq_discounted(production(still, setting)).quadratic.hessian
    want = exact.stationary_hessian(still)
    yield expectation("several dimensions: optimal Hessian, by scipy's Riccati solver", got, want)
    got = flat(ctrl.linear.solve_lq_discounted(production(lq, setting)).quadratic)
    left = exact.riccati_rate(lq, got.cpu().numpy())
    yield pathwise("several dimensions: what is left of the HJB equation", left, 0 * left, 1.0)
    lq, x = exact.example(), _tensor(X, setting)
    got = evaluated(production(lq, setting), production_law(LAW, setting), x)
    want = [exact.discounted_value_by_moments(lq, LAW, each) for each in X]
    yield expectation("several dimensions: value of a policy, by moments", got, want)
    lq = replace(lq, discount=0.0)
    ergodic = ctrl.linear.evaluate_lq_ergodic(production(lq, setting), production_law(LAW, setting))
    assert ergodic.average_reward is not None
    want = exact.average_reward_by_moments(lq, LAW)
    yield expectation(
        "several dimensions: average of a policy, at rest", ergodic.average_reward, want
    )
