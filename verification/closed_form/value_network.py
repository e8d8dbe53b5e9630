"""What a value network has to learn, Gaussian data and a quadratic reward r(x) = -x'Qx/2 + l'x + c.

V(s, x) = first(s, x) + F(s, x): a fixed first guess, and a residual that is trained by least
squares on the reward of the sample. X_s ~ p_s, and Y_0 given Y_s = x is N(F x + f, C).
"""

from collections.abc import Callable

import numpy as np

from verification.closed_form.gaussian_law import Normal, Quadratic
from verification.closed_form.vp_gaussian import VPGaussian


def of_denoised(p: VPGaussian, reward: Quadratic, s: float) -> Quadratic:
    """r(xhat_0(x)), xhat_0 = E[Y_0 | Y_s = x]."""
    F, f, _ = p.posterior(s)
    slope = F.T @ (reward.l - reward.Q @ f)
    return Quadratic(F.T @ reward.Q @ F, slope, float(reward(f)))


def value(p: VPGaussian, reward: Quadratic, s: float) -> Quadratic:
    """E[r(Y_0) | Y_s = x] = r(xhat_0) - tr(QC)/2: the second term does not depend on x."""
    guess = of_denoised(p, reward, s)
    return guess._replace(c=guess.c - 0.5 * float(np.trace(reward.Q @ p.posterior(s).C)))


def irreducible(p: VPGaussian, reward: Quadratic, s: float) -> float:
    """E Var(r(Y_0) | Y_s): the loss of the exact value."""
    F, f, C = p.posterior(s)
    law, Q = p.noised(s), reward.Q
    slope = reward.l - Q @ (F @ law.mean + f)
    product = F.T @ Q @ C @ Q @ F @ law.covariance
    return float(0.5 * np.trace(Q @ C @ Q @ C) + slope @ C @ slope + np.trace(product))


def without_affine(function: Quadratic, law: Normal) -> float:
    """Variance of what the best affine function leaves of a quadratic: tr(QPQP)/2."""
    product = function.Q @ law.covariance
    return float(0.5 * np.trace(product @ product))


Skip = Callable[[float], float]
SKIPS: dict[str, Skip] = {
    "constant 1": lambda s: 1.0,
    "cosine": lambda s: float(np.cos(0.5 * np.pi * s)),
    "linear": lambda s: 1.0 - s,
    "none": lambda s: 0.0,
}


def excess(
    p: VPGaussian, reward: Quadratic, s: float, skip: float, denoised: bool = True
) -> tuple[float, float]:
    """Least loss above the irreducible one, if the residual is constant in x, and if affine.

    What is left to learn is V - skip * first, first = r(xhat_0) or, where not denoised, r(x).
    """
    law, guess = p.noised(s), of_denoised(p, reward, s) if denoised else reward
    exact = value(p, reward, s)
    left = Quadratic(exact.Q - skip * guess.Q, exact.l - skip * guess.l, exact.c - skip * guess.c)
    return left.variance(law), without_affine(left, law)
