"""The Cole-Hopf transform: one value by three routes, and the drift that belongs to it.

The value of maximising E[r(X_T)] - b (path KL) over controls of dX = (AX + a)dt + G dW is
V* = b log E[exp(r(X_T) / b) | X_t = x] (Cole-Hopf). It solves the HJB equation
d_t V + (Ax + a).grad V + tr(GG' Hess V)/2 + |G' grad V|^2 / (2b) = 0, that is a Riccati
equation, and the optimal control adds GG' grad V* / b to the drift.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ctrl import linear
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.problems.gaussian_diffusion import STATES
from verification.problems.tilt import coefficients, expected

SOURCE = "Dai Pra 1991, Cole-Hopf transform; Kappen 2005"
WHY_DOUBLE = "ctrl.linear solves in float64 only, and says so"


def ou_value(setting: Setting, time_to_go: float | Tensor) -> linear.Quadratic:
    """V* of the Ornstein-Uhlenbeck base at some time to go."""
    A, b, G = (setting.tensor(each) for each in BASE)
    base = linear.transition(A, b, G, time_to_go)
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    return linear.kl_optimal_value(base, Q, slope, KL_WEIGHT, c)


# dX = (A X + a) dt + G dW: rotating, not symmetric, more noise than coordinates
BASE = (
    [[-0.7, 0.45], [-0.2, 0.15]],
    [0.25, -0.4],
    [[0.8, 0.3, -0.2], [0.15, 0.5, 0.4]],
)
TO_GO = 0.85


def checks(setting: Setting) -> Iterator[Check]:
    """One value by three routes, and the drift that belongs to it."""
    A, a, G = (np.array(each) for each in BASE)
    value = ou_value(setting, TO_GO)
    got = coefficients(-value.hessian, value.slope, value.constant)
    riccati = exact.linear_riccati(A, a, G, REWARD, KL_WEIGHT, TO_GO)
    yield expectation("V*, against the Riccati equation", got, expected(riccati))
    x = setting.tensor(STATES)
    logs = exact.log_average(A, a, G, REWARD, KL_WEIGHT, TO_GO, np.array(STATES))
    yield expectation("V*, against b log E[exp(r / b)] by quadrature", value(x), logs)
    drift = linear.kl_optimal_drift(value, setting.tensor(G), KL_WEIGHT)
    steps = G @ G.T @ (riccati.l - np.array(STATES) @ riccati.Q)[..., None] / KL_WEIGHT
    yield pathwise("drift change, against GG' grad V* / b", drift(x), steps[..., 0])
    left = setting.tensor(TO_GO)
    rate = torch.func.jvp(lambda u: ou_value(setting, u)(x), (left,), (torch.ones_like(left),))[1]
    slope, noise_covariance = value.gradient(x), setting.tensor(G @ G.T)
    transport = (slope * (x @ setting.tensor(A).mT + setting.tensor(a))).sum(-1)
    curved = 0.5 * (noise_covariance * value.hessian).sum()
    best = 0.5 * (slope * drift(x)).sum(-1)  # |G' grad V|^2 / (2b)
    yield pathwise(
        "HJB: what V* loses per time to go, against the rest", rate, transport + curved + best
    )


MISTAKES = """
ctrl.linear.kl_control._cole_hopf
    outer b missing in the log-partition term | - 0.5 * b * logdet => - 0.5 * logdet
    1/2 missing in the log-partition term | - 0.5 * b * logdet => - b * logdet
    b for 1/b in the exponent | weighted = Q / b => weighted = Q * b
    b inverted in the linear term's spread | .sum(-1) / (2 * b) => .sum(-1) * b / 2
    transpose missing on K | lean = times(K.mT, slope) => lean = times(K, slope)
    sign of the reward's curvature | hessian=-F.mT => hessian=F.mT
ctrl.linear.kl_optimal_drift
    control in place of drift change: no GG' | G @ G.mT / b[..., None, None] => torch.eye(2).to(G) / b[..., None, None]
ctrl.linear.gaussian._transition
    noise G'G for GG' in the transition's covariance | G @ G.mT => G[:, :2].mT @ G[:, :2]
shared
    log-partition term missing: seen in the value, not in its gradient
    expected reward for its exponential average (noise to come ignored)
    b forgotten in the drift
"""
