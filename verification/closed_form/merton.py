"""Merton's investor with log utility who is paid for exploring: all in closed form.

    dX = (r X + e a) dt + sigma a dW,   maximise E[ log X_T + lambda int entropy dt ],
a the money in the stock, e its excess return. With tau = T - t and A = 1 + lambda tau
    V = A log x + B,   pi* = N(e x / sigma^2, lambda x^2 / (sigma^2 A)),
    B = (r + e^2 / (2 sigma^2)) (tau + lambda tau^2 / 2)
        + lambda / 2 (tau log(2 pi lambda / sigma^2) - int_0^tau log(1 + lambda u) du)
since lambda log int exp(q / lambda) da is Gaussian in a; the entropy of money grows with log x,
which makes A larger than 1.
"""

import math

import numpy as np

RATE, EXCESS, SIGMA, TEMPERATURE, HORIZON = 0.03, 0.11, 0.3, 0.4, 1.2


def slope(t: float) -> float:
    """A, of log x in the value."""
    return 1 + TEMPERATURE * (HORIZON - t)


def offset(t: float) -> float:
    """B of the value."""
    tau, a = HORIZON - t, slope(t)
    logs = (a * math.log(a) - (a - 1)) / TEMPERATURE
    sharpe = EXCESS / SIGMA
    explored = tau * math.log(2 * math.pi * TEMPERATURE / SIGMA**2) - logs
    earned = (RATE + sharpe**2 / 2) * (tau + TEMPERATURE * tau**2 / 2)
    return earned + TEMPERATURE / 2 * explored


def share() -> float:
    """Mean of a / x."""
    return EXCESS / SIGMA**2


def relative_std(t: float) -> float:
    """Standard deviation of a / x."""
    return math.sqrt(TEMPERATURE / slope(t)) / SIGMA


def log_density(t: float, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """log pi*(a | t, x), nats."""
    s = relative_std(t)  # times |x|: the wealth of a chain may be negative
    z = (a - share() * x) / (s * np.abs(x))
    return -0.5 * z**2 - np.log(np.abs(x) * s * math.sqrt(2 * math.pi))


def entropy(t: float, x: np.ndarray) -> np.ndarray:
    """Of pi*(. | t, x), nats."""
    return 0.5 * math.log(2 * math.pi * math.e) + np.log(relative_std(t) * x)


def moments(nodes: np.ndarray, start: float) -> np.ndarray:
    """E X and E X^2 at the last node, of the chain that draws money at every node and holds it."""
    first, second = start, start**2
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        growth, variance = 1 + h * (RATE + EXCESS * share()), relative_std(t) ** 2
        first *= growth
        second *= (
            growth**2 + (h * EXCESS) ** 2 * variance + SIGMA**2 * h * (share() ** 2 + variance)
        )
    return np.array([first, second])
