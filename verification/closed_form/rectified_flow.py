"""Gaussian data under x = (1 - s) x_0 + s epsilon: everything by conditioning joint normals.

(x_0, epsilon) given x is normal; the velocity is E[epsilon - x_0 | x].
"""

import numpy as np

from verification.closed_form.gaussian_law import Normal, Transition


def pair_given(data: Normal, s: float) -> Transition:
    """Law of (x_0, epsilon), stacked, given x."""
    n, unit = len(data.mean), np.eye(len(data.mean))
    both = np.zeros((2 * n, 2 * n))
    both[:n, :n], both[n:, n:] = data.covariance, unit
    mixing = np.hstack([(1 - s) * unit, s * unit])
    covariance = both @ mixing.T
    F = np.linalg.solve(mixing @ covariance, covariance.T).T
    mean = np.concatenate([data.mean, np.zeros(n)])
    return Transition(F, mean - F @ mixing @ mean, both - F @ covariance.T)


def velocity(data: Normal, s: float) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, vector) of x -> E[epsilon - x_0 | x]."""
    pair, n = pair_given(data, s), len(data.mean)
    return pair.F[n:] - pair.F[:n], pair.f[n:] - pair.f[:n]


def covariance_with_reward(
    data: Normal, s: float, Q: np.ndarray, slope: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Cov(r(x_0), epsilon - x_0 | x), r = -y'Qy/2 + l'y: E[gradient] times Cov(x_0, .) (Stein)."""
    pair, n = pair_given(data, s), len(data.mean)
    mean = x @ pair.F[:n].T + pair.f[:n]
    cross = pair.C[:n, n:] - pair.C[:n, :n]
    return (slope - mean @ Q) @ cross


def marginal(data: Normal, s: float) -> Normal:
    """Law of x."""
    unit = np.eye(len(data.mean))
    return Normal((1 - s) * data.mean, (1 - s) ** 2 * data.covariance + s**2 * unit)
