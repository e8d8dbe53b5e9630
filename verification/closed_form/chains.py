"""Jump chains of four states: path KLs from skeletons, tilts from a nonlinear equation, by scipy.

Nothing here is computed the way ``ctrl.chains`` does it: the KL of paths is the limit of that of
the states at finer and finer times, and V of the tilt solves
    -V' = r + b sum_y Q0 (e^{(V(y) - V(x)) / b} - 1).
"""

import itertools
from collections.abc import Callable

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm

NODES = np.array([0.0, 0.5, 1.3])
RATES = np.array(
    [
        [[0, 0.8, 0.3, 0.1], [0.5, 0, 0.9, 0.4], [0.2, 1.1, 0, 0.7], [0.6, 0.3, 0.5, 0]],
        [[0, 0.4, 0.9, 0.6], [1.2, 0, 0.3, 0.2], [0.7, 0.5, 0, 1.4], [0.1, 0.8, 0.6, 0]],
    ]
)
REFERENCE = np.array(
    [
        [[0, 0.5, 0.6, 0.2], [0.9, 0, 0.4, 0.3], [0.3, 0.7, 0, 1.0], [0.2, 0.6, 0.9, 0]],
        [[0, 0.9, 0.4, 0.5], [0.6, 0, 0.8, 0.1], [0.4, 0.9, 0, 0.8], [0.3, 0.4, 1.1, 0]],
    ]
)
START = np.array([0.4, 0.1, 0.3, 0.2])
KL_WEIGHT = 0.6
TERMINAL = np.array([0.5, -0.8, 1.1, 0.2])
RUNNING = np.array([0.3, 0.7, -0.5, 0.1])


def generator(rates: np.ndarray) -> np.ndarray:
    """The same with the diagonal that makes rows sum to 0."""
    return rates - np.eye(rates.shape[-1]) * rates.sum(-1, keepdims=True)


def skeleton_kl(pieces: int) -> float:
    """KL of the states at ``pieces`` even times in each step of NODES, nats."""
    law, total = START, 0.0
    for Q, Q0, h in zip(generator(RATES), generator(REFERENCE), np.diff(NODES), strict=True):
        P, P0 = expm(Q * h / pieces), expm(Q0 * h / pieces)
        each = (P * np.log(P / P0)).sum(1)
        for _ in range(pieces):
            total += law @ each
            law = law @ P
    return float(total)


def path_kl() -> float:
    """Limit of the skeletons' KL."""
    row = [skeleton_kl(8 * 2**k) for k in range(7)]
    for power in range(1, 7):
        row = [(2**power * b - a) / (2**power - 1) for a, b in itertools.pairwise(row)]
    return row[0]


def log_density(rates: np.ndarray, times: list[float], states: list[int]) -> float:
    """Logarithm of a path's density: rates of its jumps, and waiting in between."""
    Q, t, x, total = generator(rates), float(NODES[0]), states[0], 0.0

    def waited(x: int, begin: float, end: float) -> float:
        each = np.clip(np.minimum(end, NODES[1:]) - np.maximum(begin, NODES[:-1]), 0, None)
        return float(each @ Q[:, x, x])

    for time, state in zip(times, states[1:], strict=True):
        k = int(np.searchsorted(NODES[1:-1], time, side="right"))
        total += waited(x, t, time) + float(np.log(Q[k, x, state]))
        t, x = time, state
    return total + waited(x, t, float(NODES[-1]))


def values(t: float) -> np.ndarray:
    """V(t, .) of the tilt, by its nonlinear equation."""
    Q = generator(REFERENCE)

    def backwards(k: int) -> Callable[[float, np.ndarray], np.ndarray]:
        def rate(_: float, V: np.ndarray) -> np.ndarray:
            jumps = np.exp((V[None, :] - V[:, None]) / KL_WEIGHT) - 1
            return RUNNING + KL_WEIGHT * (Q[k] * jumps).sum(1)

        return rate

    V = TERMINAL
    for k in (1, 0):
        duration = NODES[k + 1] - max(t, NODES[k])
        if duration > 0:
            solved = solve_ivp(backwards(k), (0, duration), V, "DOP853", rtol=1e-13, atol=1e-13)
            V = solved.y[:, -1]
    return V


def tilted_law() -> np.ndarray:
    """Probabilities of the last state: all weighted by exp of what was earned, over b."""
    weighted = START / np.exp(values(0.0) / KL_WEIGHT)  # the law of the start is not tilted
    for Q0, h in zip(generator(REFERENCE), np.diff(NODES), strict=True):
        weighted = weighted @ expm((Q0 + np.diag(RUNNING) / KL_WEIGHT) * h)
    return weighted * np.exp(TERMINAL / KL_WEIGHT)
