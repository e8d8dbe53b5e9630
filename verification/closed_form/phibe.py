"""Quadratic values of a linear diffusion at step h: true, PhiBE's and the Bellman equation's.

    dX = (A X + c) dt + G dW, reward rate -(x'Mx/2 + p'x), discount; V = x'Sx/2 + e'x + k

All three map quadratics to quadratics: as rows (``lq_policies``), E V(X_h) = V exp(h L). And in one
dimension Optimal-PhiBE of order 1, where the action is held over the step, as the root of a scalar
equation.
"""

import numpy as np
from scipy.linalg import expm
from scipy.optimize import brentq

from verification.closed_form.lq_policies import row, uncontrolled

A = np.array([[-0.7, 0.4], [-0.3, -1.1]])
DRIFT = np.array([0.2, -0.1])
G = np.array([[0.5, 0.0], [0.2, 0.4]])
M = np.array([[1.0, 0.3], [0.3, 0.8]])
SLOPE = np.array([0.4, -0.6])
DISCOUNT = 0.5

# one dimension: dX = (PULL X + PUSH a) dt + NOISE dW, cost (STATE x^2 + ACTION a^2) / 2
PULL, PUSH, NOISE, STATE, ACTION = 0.6, 1.3, 0.5, 1.7, 0.9
_L = uncontrolled(A, DRIFT, G)
_ONE = np.eye(len(_L))


def _solved(equation: np.ndarray) -> np.ndarray:
    """Coefficients of 1, x1, x2, x1^2, x1 x2, x2^2 in the V with V equation = reward rate."""
    v = np.linalg.solve(equation.T, row(-M, -SLOPE, 0.0))
    return v[[0, 1, 2, 4, 5, 8]] * [1, 2, 2, 1, 2, 1]


def true() -> np.ndarray:
    """The value of the diffusion itself."""
    return _solved(DISCOUNT * _ONE - _L)


def phibe(h: float, weights: list[float]) -> np.ndarray:
    """PhiBE's solution, of differences sum_j weights[j - 1] (f(jh) - f(0)) / h."""
    moves = [w / h * (expm(j * h * _L) - _ONE) for j, w in enumerate(weights, 1)]
    return _solved(DISCOUNT * _ONE - np.sum(moves, axis=0))


def bellman(h: float) -> np.ndarray:
    """The solution of V = r h + e^{-discount h} E V(X_h)."""
    return _solved((_ONE - np.exp(-DISCOUNT * h) * expm(h * _L)) / h)


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
