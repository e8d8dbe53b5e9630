"""Signal and noise of every schedule as its source writes them; and what an SDE makes of them.

dY = k(s) Y ds + sqrt(g2(s)) dB, Y_0 = y:  mean alpha y, variance sigma^2,
alpha = exp(int k),   sigma^2 = int g2(u) (alpha(s) / alpha(u))^2 du
"""

from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


def vp_linear(
    s: np.ndarray, low: float, high: float, horizon: float
) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma; beta runs from low to high: its mean on [0, s] times s is the exponent."""
    beta = low + (high - low) * s / horizon
    alpha_bar = np.exp(-0.5 * (low + beta) * s)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def cosine(s: np.ndarray, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma; alpha-bar = f(s) / f(0), f = cos^2(pi / 2 (s + offset) / (1 + offset))."""
    f = np.cos(0.5 * np.pi * (s + offset) / (1 + offset)) ** 2
    alpha_bar = f / np.cos(0.5 * np.pi * offset / (1 + offset)) ** 2
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def exploding(s: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma; sigma^2 = (low (high / low)^s)^2 - low^2."""
    return np.ones_like(s), np.sqrt((low * (high / low) ** s) ** 2 - low**2)


def flow(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma: the straight line from data to noise."""
    return 1 - s, s.copy()


def table(s: np.ndarray, alpha_bars: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma; entry i of alpha-bar stands at (i + 1) / n, its logarithm linear between."""
    nodes = np.arange(len(alpha_bars) + 1) / len(alpha_bars)
    alpha_bar = np.exp(np.interp(s, nodes, np.log(np.concatenate([[1.0], alpha_bars]))))
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def integral(
    function: Function, a: np.ndarray | float, b: float, cuts: Iterable[float] = ()
) -> np.ndarray:
    """From each a to b, by Gauss's rule between the cuts, where the integrand may jump."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    begin = np.asarray(a, dtype=np.float64)[..., None]
    total = np.zeros(begin.shape[:-1])
    for low, high in pairwise([0.0, *(c for c in cuts if c < b), b]):
        left = np.maximum(begin, low)
        half = 0.5 * (np.maximum(left, high) - left)  # 0 where the interval begins later
        total += (half * weights * function(left + half * (1 + nodes))).sum(-1)
    return total


def of_sde(k: Function, g2: Function, s: float, cuts: Iterable[float] = ()) -> tuple[float, float]:
    """alpha and sigma at s of the SDE with these coefficients."""
    stops = list(cuts)

    def lost(u: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(integral(k, u, s, stops)))

    variance = integral(lambda u: g2(u) * lost(u) ** 2, 0.0, s, stops)
    return float(lost(np.zeros(()))), float(np.sqrt(variance))
