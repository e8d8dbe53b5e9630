"""Temperature and mean: exploration in drawn scores and the tilted optimum share their mean.

Maximise E r(X_T) - E int g^2 |a - s_pre|^2 + th x entropy, with a drawn from a policy: the
optimal policy is N(s_pre + grad J / 2, th / (2 g^2)). The penalty is twice the path KL, so
the mean is that of the KL-regularised optimum with b = 2: for a diffusion the score of the
data tilted by exp(r / 2). The temperature th spreads the actions and does not move them.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ctrl import linear
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import REWARD
from verification.problems.duality import weight
from verification.problems.gaussian_diffusion import STATES

SOURCE = "Gao, Zha & Zhou 2024, arXiv 2409.04832; Wang, Zariphopoulou & Zhou 2020"
WHY_DOUBLE = "ctrl.linear solves in float64 only, and says so"

# dX = (A X + a + B u) dt + G dW with G = g 1: u is the score's change, B = g^2
A, FREE, NOISE = np.array([[-0.7, 0.45], [-0.2, 0.15]]), np.array([0.25, -0.4]), 0.8
TEMPERATURE, HORIZON = 0.35, 0.85


def score_change(value: linear.Quadratic, x: Tensor) -> Tensor:
    """grad V* / b, from the change of the drift."""
    unit = torch.eye(2).to(x)
    return linear.kl_optimal_drift(value, NOISE * unit, weight())(x) / NOISE**2


def checks(setting: Setting) -> Iterator[Check]:
    """The exploratory Riccati solution and the tilted one, at two temperatures."""
    x, unit = setting.tensor(STATES), torch.eye(2).to(setting.tensor(STATES))
    base = linear.transition(setting.tensor(A), setting.tensor(FREE), NOISE * unit, HORIZON)
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    value = linear.kl_optimal_value(base, Q, slope, weight(), c)
    want = exact.linear_riccati(A, FREE, NOISE * np.eye(2), REWARD, weight(), HORIZON)
    means = (want.l - np.array(STATES) @ want.Q) / weight()
    yield pathwise("score's change, tilt with b = 2", score_change(value, x), means)
    for temperature in (0.0, TEMPERATURE):
        problem = linear.LinearQuadratic(
            A=setting.tensor(A),
            B=NOISE**2 * unit,
            sigma=NOISE * unit,
            M=0 * unit,
            N=2 * NOISE**2 * unit,
            H=Q,
            h=-slope,
            f=setting.tensor(FREE),
            temperature=temperature,
        )
        solved = linear.solve_lq(problem, setting.tensor([0.0, HORIZON]))
        law = solved.law_at(setting.tensor(0.0))
        yield pathwise(
            f"temperature {temperature}: mean",
            law.mean(x),
            -0.5 * (np.array(STATES) @ want.Q - want.l),
        )
        yield expectation(
            f"temperature {temperature}: spread is th / (2 g^2)",
            law.covariance,
            temperature / (2 * NOISE**2) * np.eye(2),
            scale=TEMPERATURE,
        )


MISTAKES = """
verification.problems.duality.weight
    penalty taken for the path KL: b = 1 | 2.0 => 1.0
verification.claims.fine_tuning.temperature_and_mean.score_change
    drift change in place of the score's change | / NOISE**2 => ``
ctrl.linear.lq.greedy
    temperature moves the mean | gains[..., -1], 0.5 => gains[..., -1] + temperature[..., None], 0.5
    spread of the policy without the temperature | temperature[..., None, None] * torch.cholesky_solve
        => torch.cholesky_solve
shared
    b forgotten in the drift
    policy's variance temperature * W for temperature / W
    expected reward for its exponential average (noise to come ignored)
"""
