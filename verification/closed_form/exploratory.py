"""What drawn actions average to, by moments of polynomials; and the chains that draw them.

Scalar   dX = (A X + B a) dt + (C X + D a + G a^2) dW, drift + E a^2;  a ~ N(m X + n, s^2)
Plane    dX = (a_1 a_2, X_1 + a_2) dt + (F X + J a) dW, one Brownian motion; a ~ N(mean, L L')

Laws are compared through moments 1, x, .., x^4, which a polynomial generator maps to themselves.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg

ORDER = 4  # of the highest moment
NORMAL = np.array([1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 15.0, 0.0, 105.0])  # moments of N(0, 1)


@dataclass(frozen=True)
class Scalar:
    """The numbers of the scalar problem; no two of them equal, none 0 or 1."""

    A: float = -0.7
    B: float = 0.9
    C: float = 0.3
    D: float = 0.8
    E: float = 0.35
    G: float = -0.25
    m: float = -0.6
    n: float = 0.2
    s: float = 0.45
    start: float = 0.4
    horizon: float = 0.5
    noise: float = 0.55  # where the diffusion is control-free


def averaged_drift(p: Scalar, x: np.ndarray) -> np.ndarray:
    """E[A x + B a + E a^2]."""
    mean = p.m * x + p.n
    return p.A * x + p.B * mean + p.E * (mean**2 + p.s**2)


def averaged_square(p: Scalar, x: np.ndarray) -> np.ndarray:
    """E[(C x + D a + G a^2)^2], by the first four moments of a normal variable."""
    mean, c = p.m * x + p.n, p.C * x
    second, third = mean**2 + p.s**2, mean**3 + 3 * mean * p.s**2
    fourth = mean**4 + 6 * mean**2 * p.s**2 + 3 * p.s**4
    linear = c**2 + 2 * c * p.D * mean + (p.D**2 + 2 * c * p.G) * second
    return linear + 2 * p.D * p.G * third + p.G**2 * fourth


def generator(p: Scalar, controlled: bool = True) -> np.ndarray:
    """The averaged generator (E = G = 0) on 1, x, .., x^4: row k holds what x^k is mapped to."""
    drift, shift = p.A + p.B * p.m, p.B * p.n
    slope, level = p.C + p.D * p.m, p.D * p.n
    square = [level**2 + p.D**2 * p.s**2, 2 * slope * level, slope**2]
    if not controlled:
        square = [p.noise**2, 0.0, 0.0]
    rows = np.zeros((ORDER + 1, ORDER + 1))
    for k in range(1, ORDER + 1):
        rows[k, k] += k * drift
        rows[k, k - 1] += k * shift
        for j, each in enumerate(square):
            if k >= 2:
                rows[k, k - 2 + j] += k * (k - 1) / 2 * each
    return rows


def moments(p: Scalar, controlled: bool = True) -> np.ndarray:
    """E X_T^k, k = 1 .. 4, of the averaged SDE from the start."""
    start = p.start ** np.arange(ORDER + 1)
    return (scipy.linalg.expm(p.horizon * generator(p, controlled)) @ start)[1:]


def chain_moments(p: Scalar, steps: np.ndarray) -> np.ndarray:
    """E X^k, k = 1 .. 4, of the Euler chain that draws an action at every node (E = G = 0)."""
    moments = p.start ** np.arange(ORDER + 1)
    for h in steps:
        moments = _step(p, float(h)) @ moments
    return moments[1:]


def _step(p: Scalar, h: float) -> np.ndarray:
    """Row k: E[X'^k | x] as a polynomial in x, where X' = u(w) + sigma(w) sqrt(h) z."""
    points = np.linspace(-1.0, 1.0, ORDER + 1)
    rows = []
    for x in points:
        mean = p.m * x + p.n
        u = np.polynomial.Polynomial([x + h * (p.A * x + p.B * mean), h * p.B * p.s])
        sigma = np.polynomial.Polynomial([p.C * x + p.D * mean, p.D * p.s])
        each = [1 + 0 * u, u, u**2 + h * sigma**2, u**3 + 3 * h * u * sigma**2]
        each.append(u**4 + 6 * h * u**2 * sigma**2 + 3 * h**2 * sigma**4)
        rows.append([one.coef @ NORMAL[: len(one.coef)] for one in each])
    powers = points[:, None] ** np.arange(ORDER + 1)
    return np.linalg.solve(powers, np.array(rows)).T


def excess_variance_rate(p: Scalar) -> float:
    """lim (Var of the drawing chain - Var of the mean's chain) / h: B^2 s^2 int e^{2 k u} du."""
    k = p.A + p.B * p.m
    return p.B**2 * p.s**2 * np.expm1(2 * k * p.horizon) / (2 * k)


@dataclass(frozen=True)
class Plane:
    """The numbers of the problem in the plane."""

    F: tuple[tuple[float, float], ...] = ((0.3, -0.2), (0.5, 0.7))
    J: tuple[tuple[float, float], ...] = ((0.9, 0.4), (-0.3, 0.6))
    L: tuple[tuple[float, float], ...] = ((0.5, 0.0), (-0.2, 0.3))


def plane_averages(p: Plane, x: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averaged drift [points, 2] and covariance [points, 2, 2]."""
    F, J, action_covariance = np.array(p.F), np.array(p.J), np.array(p.L) @ np.array(p.L).T
    drift = np.stack(
        [mean[:, 0] * mean[:, 1] + action_covariance[0, 1], x[:, 0] + mean[:, 1]], axis=1
    )
    centre = x @ F.T + mean @ J.T
    return drift, centre[:, :, None] * centre[:, None, :] + J @ action_covariance @ J.T
