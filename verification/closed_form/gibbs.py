"""Gibbs policies by brute force: sums over a fine grid of actions, no completed square.

The trapezoidal rule of an analytic function that vanishes at the ends converges faster than any
power of its spacing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from verification.answers import remembered
from verification.closed_form.lq import LQ, Quadratic, q_rate

HALF, NODES = 6.5, 53  # of the box of actions, in each coordinate


@dataclass(frozen=True)
class Gibbs:
    """pi proportional to exp(q / gam).

    Attributes:
        soft_maximum: gam log int exp(q / gam) da.
        mean: of the action.
        covariance: of the action.
    """

    soft_maximum: float
    mean: np.ndarray
    covariance: np.ndarray


def gibbs(q: Callable[[np.ndarray], np.ndarray], temperature: float) -> Gibbs:
    """By sums over a box [-6.5, 6.5]^2.

    Args:
        q: actions [n, 2] -> [n].
        temperature: gam.
    """
    actions, cell = _actions()
    rate = q(actions) / temperature
    top = rate.max()
    density = np.exp(rate - top)
    mass = density / density.sum()
    mean = mass @ actions
    covariance = (mass[:, None] * (actions - mean)).T @ (actions - mean)
    return Gibbs(float(temperature * (top + np.log(density.sum() * cell))), mean, covariance)


def _actions() -> tuple[np.ndarray, float]:
    side = np.linspace(-HALF, HALF, NODES)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    return grid, float(side[1] - side[0]) ** 2


@remembered
def lq_gibbs(lq: LQ, value: Quadratic, slope: Quadratic, x: np.ndarray) -> Gibbs:
    """The Gibbs policy of a linear-quadratic q at x; q is known from six of its values."""
    points = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [1, 1]], dtype=float)
    at = np.array([q_rate(lq, value, slope, x, a) for a in points])
    coefficients = np.linalg.solve(_monomials(points), at)
    return gibbs(lambda actions: _monomials(actions) @ coefficients, lq.temperature)


def _monomials(a: np.ndarray) -> np.ndarray:
    one, two = a[:, 0], a[:, 1]
    return np.stack([np.ones_like(one), one, two, one**2, two**2, one * two], axis=1)


def gaussian_mean(
    mean: np.ndarray, root: np.ndarray, function: Callable[[np.ndarray], np.ndarray]
) -> float:
    """E f(a), a ~ N(mean, root root'), by 12 x 12 Gauss-Hermite nodes."""
    points, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()
    normals = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)
    return float(np.outer(weights, weights).ravel() @ function(mean + normals @ root.T))
