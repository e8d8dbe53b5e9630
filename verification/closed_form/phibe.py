"""Quadratic values of a linear diffusion at step h: true, PhiBE's and the Bellman equation's.

    dX = (A X + c) dt + G dW, reward rate -(x'Mx/2 + p'x), discount; V = x'Sx/2 + e'x + k

All three map quadratics to quadratics: monomials (1, x1, x2, x1^2, x1 x2, x2^2) are mapped one by
one, and the linear equation of the six coefficients is solved. And in one dimension Optimal-PhiBE
of order 1, where the action is held over the step, as the root of a scalar equation.
"""

from collections.abc import Callable

import numpy as np
from scipy.linalg import expm
from scipy.optimize import brentq

Equation = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray, float]]
"""(S, e, k) of a quadratic -> those of its image, linearly."""

A = np.array([[-0.7, 0.4], [-0.3, -1.1]])
DRIFT = np.array([0.2, -0.1])
G = np.array([[0.5, 0.0], [0.2, 0.4]])
M = np.array([[1.0, 0.3], [0.3, 0.8]])
SLOPE = np.array([0.4, -0.6])
DISCOUNT = 0.5

# one dimension: dX = (PULL X + PUSH a) dt + NOISE dW, cost (STATE x^2 + ACTION a^2) / 2
PULL, PUSH, NOISE, STATE, ACTION = 0.6, 1.3, 0.5, 1.7, 0.9


def law(h: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F, f and C of X_h | x ~ N(F x + f, C), by exponentials of blocks (Van Loan)."""
    n = len(A)
    grown = expm(h * np.block([[-A, G @ G.T], [np.zeros_like(A), A.T]]))
    F = grown[n:, n:].T
    moved = expm(h * np.block([[A, DRIFT[:, None]], [np.zeros((1, n + 1))]]))
    return F, moved[:n, n], F @ grown[:n, n:]


def coefficients(S: np.ndarray, e: np.ndarray, k: float) -> np.ndarray:
    """Of 1, x1, x2, x1^2, x1 x2, x2^2."""
    return np.array([k, e[0], e[1], S[0, 0] / 2, S[0, 1], S[1, 1] / 2])


def _solved(equation: Equation) -> np.ndarray:
    """The quadratic V with equation(V) = reward rate."""
    columns = []
    for one in np.eye(6):
        S = np.array([[2 * one[3], one[4]], [one[4], 2 * one[5]]])
        columns.append(coefficients(*equation(S, one[1:3], one[0])))
    return np.linalg.solve(np.array(columns).T, coefficients(-M, -SLOPE, 0.0))


def true() -> np.ndarray:
    """Coefficients of the value of the diffusion itself."""

    def equation(S: np.ndarray, e: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray, float]:
        constant = e @ DRIFT + 0.5 * np.trace(S @ G @ G.T)
        return (
            DISCOUNT * S - A.T @ S - S @ A,
            DISCOUNT * e - A.T @ e - S @ DRIFT,
            DISCOUNT * k - constant,
        )

    return _solved(equation)


def phibe(h: float, weights: list[float]) -> np.ndarray:
    """Coefficients of PhiBE's solution, of differences sum_j weights[j - 1] (f(jh) - f(0)) / h."""
    laws = [law(j * h) for j in range(1, len(weights) + 1)]

    def equation(S: np.ndarray, e: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray, float]:
        out = [DISCOUNT * S, DISCOUNT * e, DISCOUNT * k]
        for w, (F, f, C) in zip(weights, laws, strict=True):
            move = F - np.eye(2)  # d = move x + f + noise
            out[0] = out[0] - w / h * (move.T @ S + S @ move + move.T @ S @ move)
            out[1] = out[1] - w / h * (move.T @ e + S @ f + move.T @ S @ f)
            out[2] = out[2] - w / h * (e @ f + 0.5 * f @ S @ f + 0.5 * np.trace(S @ C))
        return out[0], out[1], out[2]

    return _solved(equation)


def bellman(h: float) -> np.ndarray:
    """Coefficients of the solution of V = r h + e^{-discount h} E V(X_h)."""
    F, f, C = law(h)
    keep = np.exp(-DISCOUNT * h)

    def equation(S: np.ndarray, e: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray, float]:
        after = k + e @ f + 0.5 * f @ S @ f + 0.5 * np.trace(S @ C)
        return (
            (S - keep * F.T @ S @ F) / h,
            (e - keep * (F.T @ e + F.T @ S @ f)) / h,
            (k - keep * after) / h,
        )

    return _solved(equation)


def optimal(h: float) -> tuple[float, float]:
    """Hessian of the value and gain of the policy that solve Optimal-PhiBE in one dimension."""
    grown = np.exp(PULL * h)
    move, push = (grown - 1) / h, PUSH * (grown - 1) / (PULL * h)

    def gain(S: float) -> float:
        return S * (push + h * move * push) / (ACTION - h * S * push**2)

    def gap(S: float) -> float:
        K = gain(S)
        drift = move + push * K
        return 2 * S * drift + h * S * drift**2 - STATE - ACTION * K**2 - DISCOUNT * S

    S = brentq(gap, -20.0, -1e-9, xtol=1e-15)
    assert isinstance(S, float)
    return S, gain(S)
