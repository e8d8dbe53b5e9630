"""Scalar linear-quadratic policies: value on any grid of held actions, and in continuous time.

dX = (A x + B a) dt + S dW,  r = -(M x^2 + N a^2),  a ~ N(k x, s^2),  temperature LAM per nat.
"""

import numpy as np

A, B, S, M, N, LAM, DISCOUNT, END = -0.3, 0.8, 0.6, 1.1, 0.5, 0.2, 0.7, 0.9
TARGET, BEHAVIOUR = (-0.5, 0.45), (-0.2, 0.5)  # gain k and standard deviation s
START = 0.7
GRIDS = (np.array([0.0, 0.35, 0.6]), np.array([0.1, 0.6]))  # the second has one step


def entropy(s: float) -> float:
    """Of N(., s^2), nats."""
    return 0.5 * np.log(2 * np.pi * np.e * s**2)


def on_grid(nodes: np.ndarray) -> float:
    """E of the discounted return of the target's Euler chain, -END x^2 paid at the end."""
    k, s = TARGET
    second, total = START**2, 0.0
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        worth = np.exp(-DISCOUNT * (t - nodes[0])) * h
        total += worth * (-(M + N * k**2) * second - N * s**2 + LAM * entropy(s))
        second = (1 + h * (A + B * k)) ** 2 * second + (h * B * s) ** 2 + S**2 * h
    return total - np.exp(-DISCOUNT * (nodes[-1] - nodes[0])) * END * second


def without_end() -> np.ndarray:
    """V = P x^2 + R and q = c1 a^2 + c2 x a + ... of the target, endless: (P, R, c1, c2).

    discount V = E_pi r + LAM entropy + V' (A + B k) x + S^2 P.
    """
    k, s = TARGET
    p = -(M + N * k**2) / (DISCOUNT - 2 * (A + B * k))
    r = (-N * s**2 + LAM * entropy(s) + S**2 * p) / DISCOUNT
    return np.array([p, r, -N, 2 * B * p])
