"""Scores that are off by an affine function: what they earn, what they cost, how far from the best.

    a = score + D x + c,   J = E[r(X_T)] - b KL(P_a || P_pre),   r(x) = -x'Qx/2 + l'x + const

States stay normal: moments by an ODE solver, values by another one backwards. With P* the optimum,
    J* - J(a) = b KL(P_a || P*) = b/2 E_a int g^2 |a - a*|^2   for any a (duality; eta = 1).
"""

from collections.abc import Callable

import numpy as np
from scipy.integrate import solve_ivp

from verification.answers import remembered
from verification.closed_form.gaussian_law import Normal, Quadratic
from verification.closed_form.vp_gaussian import VPGaussian

_SOLVER = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-12}


def _run(
    p: VPGaussian,
    start: Normal,
    gain: np.ndarray,
    shift: np.ndarray,
    eta: float,
    cost: Callable[[float, Normal], np.ndarray],
) -> tuple[Normal, np.ndarray]:
    """The law of X_T, and the time integral of a cost rate of (noising time, law of the state)."""
    n, push = len(start.mean), 0.5 * (1 + eta**2)

    def rate(t: float, v: np.ndarray) -> np.ndarray:
        s, m, P = p.horizon - t, v[:n], v[n : n + n * n].reshape(n, n)
        (matrix, vector), g2 = p.score(s), p.beta(s)
        A = g2 * (push * (matrix + gain) + 0.5 * np.eye(n))
        covariance_rate = A @ P + P @ A.T + eta**2 * g2 * np.eye(n)
        paid = np.atleast_1d(cost(s, Normal(m, P)))
        return np.concatenate([A @ m + push * g2 * (vector + shift), covariance_rate.ravel(), paid])

    paid = np.atleast_1d(cost(p.horizon, start))
    first = np.concatenate([start.mean, start.covariance.ravel(), 0 * paid])
    last = solve_ivp(rate, (0, p.horizon), first, **_SOLVER).y[:, -1]
    return Normal(last[:n], last[n : n + n * n].reshape(n, n)), last[n + n * n :]


def _mean_square(matrix: np.ndarray, vector: np.ndarray, law: Normal) -> float:
    centre = matrix @ law.mean + vector
    return float(centre @ centre + np.trace(matrix @ law.covariance @ matrix.T))


@remembered
def performance(
    p: VPGaussian,
    start: Normal,
    gain: np.ndarray,
    shift: np.ndarray,
    reward: Quadratic,
    b: float,
    eta: float = 1.0,
) -> float:
    """J, from the moments forwards."""
    weight = ((1 + eta**2) / (2 * eta)) ** 2

    def cost(s: float, law: Normal) -> np.ndarray:
        return 0.5 * weight * p.beta(s) * np.array([_mean_square(gain, shift, law)])

    end, paid = _run(p, start, gain, shift, eta, cost)
    return reward.expectation(end) - b * float(paid[0])


@remembered
def regret(
    p: VPGaussian,
    start: Normal,
    gain: np.ndarray,
    shift: np.ndarray,
    b: float,
    value: Callable[[float], Quadratic],
) -> float:
    """b KL(P_a || P*), given V* as a function of noising time."""

    def cost(s: float, law: Normal) -> np.ndarray:
        best = value(s)
        away = _mean_square(gain + best.Q / b, shift - best.l / b, law)
        return 0.5 * b * p.beta(s) * np.array([away])

    return float(_run(p, start, gain, shift, 1.0, cost)[1][0])


@remembered
def gradient(
    p: VPGaussian, start: Normal, gain: np.ndarray, shift: np.ndarray, reward: Quadratic
) -> tuple[np.ndarray, np.ndarray]:
    """(d/dD, d/dc) of E[r(X_T)]: int g^2 E[grad V(X) (X', 1)], V backwards, moments forwards."""
    n = len(shift)

    def back(s: float, v: np.ndarray) -> np.ndarray:
        P, e = v[: n * n].reshape(n, n), v[n * n :]
        (matrix, vector), g2 = p.score(s), p.beta(s)
        A = g2 * (matrix + gain + 0.5 * np.eye(n))
        return np.concatenate([(A.T @ P + P @ A).ravel(), A.T @ e - P @ (g2 * (vector + shift))])

    first = np.concatenate([reward.Q.ravel(), reward.l])
    values = solve_ivp(back, (0, p.horizon), first, dense_output=True, **_SOLVER).sol

    def rates(s: float, law: Normal) -> np.ndarray:
        P, e = values(s)[: n * n].reshape(n, n), values(s)[n * n :]
        slope = e - P @ law.mean
        return p.beta(s) * np.concatenate(
            [(np.outer(slope, law.mean) - P @ law.covariance).ravel(), slope]
        )

    integrals = _run(p, start, gain, shift, 1.0, rates)[1]
    return integrals[: n * n].reshape(n, n), integrals[n * n :]


def response(p: VPGaussian) -> np.ndarray:
    """d(mean of X_T)/dc = int F g^2, the transition's matrix against the clock."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    times = 0.5 * p.horizon * (nodes + 1)
    rows = (w * p.beta(s) * p.posterior(s).F for s, w in zip(times, weights, strict=True))
    return 0.5 * p.horizon * sum(rows, np.zeros_like(p.covariance))
