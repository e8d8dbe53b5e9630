"""Exploratory linear-quadratic control without a horizon: discounted and ergodic.

One dimension, without horizon: rho k2 = (k2 (B + C D) - R)^2 / W + k2 (2 A + C^2) - M with
W = N - k2 D^2, rho k1 = (k1 B - L) K + k1 A - P, pi* = N(K x + (k1 B - L)/W, gam / W),
K = (k2 (B + C D) - R) / W, and rho k0, or the average reward where rho = 0, is
(k1 B - L)^2/(2 W) + (gam/2)(log(2 pi e gam / W) - 1). The ergodic benchmark of Jia & Zhou:
pi* = N(-0.354249 x - 0.708497, 0.035425), average 0.708497, or 0.658497 exploring.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor

import ctrl
from ctrl.linear import LinearGaussian, LinearQuadratic
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import lq as exact
from verification.problems import lq as case

SOURCE = "Wang, Zariphopoulou & Zhou 2020, Theorem 4; Jia & Zhou 2022b, section 6, appendix B2"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"


def evaluated(lq: LinearQuadratic, law: LinearGaussian, x: Tensor) -> Tensor:
    """The value of a stationary policy at each x."""
    return ctrl.linear.evaluate_lq_discounted(lq, law).quadratic(x)


def checks(setting: Setting) -> Iterator[Check]:
    """Discounted and ergodic problems, the benchmark, and several dimensions."""
    for name, p, solve in (
        ("discounted", exact.DISCOUNTED, ctrl.linear.solve_lq_discounted),
        ("ergodic", exact.ERGODIC, ctrl.linear.solve_lq_ergodic),
    ):
        got = case.numbers(solve(case.production(p.lq(), setting)))
        yield expectation(f"{name}: value, policy and rate, by formula", got, case.published(p))
    benchmark = case.production(exact.BENCHMARK.lq(), setting)
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
    got = ctrl.linear.solve_lq_discounted(case.production(still, setting)).quadratic.hessian
    want = exact.stationary_hessian(still)
    yield expectation("several dimensions: optimal Hessian, by scipy's Riccati solver", got, want)
    got = case.flat(ctrl.linear.solve_lq_discounted(case.production(lq, setting)).quadratic)
    left = exact.riccati_rate(lq, got.cpu().numpy())
    yield pathwise("several dimensions: what is left of the HJB equation", left, 0 * left, 1.0)
    lq, x = exact.example(), case._tensor(case.X, setting)
    got = evaluated(case.production(lq, setting), case.production_law(case.LAW, setting), x)
    want = [exact.discounted_value_by_moments(lq, case.LAW, each) for each in case.X]
    yield expectation("several dimensions: value of a policy, by moments", got, want)
    lq = replace(lq, discount=0.0)
    ergodic = ctrl.linear.evaluate_lq_ergodic(
        case.production(lq, setting), case.production_law(case.LAW, setting)
    )
    assert ergodic.average_reward is not None
    want = exact.average_reward_by_moments(lq, case.LAW)
    yield expectation(
        "several dimensions: average of a policy, at rest", ergodic.average_reward, want
    )


MISTAKES = """
ctrl.linear.lyapunov.second_moments
    A for 2 A | kron(A.mT, eye) + kron(eye, A.mT) => kron(A.mT, eye)
    noise of the state missing | ` + scaled)` => )
ctrl.linear.riccati._closed_loop
    sign of the discount | kept = lq.A - 0.5 * => kept = lq.A + 0.5 *
    1/2 of the discount missing | kept = lq.A - 0.5 * => `kept = lq.A - `
ctrl.linear.riccati.evaluate_lq_discounted
    constant not divided by the discount | rate / lq.rates[0] => rate
ctrl.linear.riccati._stationary
    half of the discount where one is meant | kept = kept - 0.5 * lq.rates[0] => kept = kept - 0 * lq.rates[0]
shared
    sign of the state's cost [ValueError]
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
"""
