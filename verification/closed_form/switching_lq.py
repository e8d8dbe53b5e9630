"""Scalar linear-quadratic control that switches between regimes, or changes with time: by scipy.

dX = (A X + B a + f) dt + (C X + D a + s) dW
reward -(M X^2 / 2 + N a^2 / 2 + p X), terminal -H X^2 / 2, discounted
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.integrate

from verification.answers import remembered


@dataclass(frozen=True)
class Coefficients:
    """One number for each regime."""

    A: np.ndarray
    B: np.ndarray
    f: np.ndarray
    C: np.ndarray
    D: np.ndarray
    s: np.ndarray
    M: np.ndarray
    N: np.ndarray
    p: np.ndarray
    H: np.ndarray
    discount: np.ndarray


REGIMES = Coefficients(
    A=np.array([-0.6, 0.3, 0.1]), B=np.array([0.8, 0.5, 1.2]), f=np.array([0.2, -0.3, 0.1]),
    C=np.array([0.2, 0.35, 0.1]), D=np.zeros(3), s=np.array([0.7, 0.4, 0.9]),
    M=np.array([1.1, 0.6, 2.0]), N=np.array([0.9, 0.5, 1.4]), p=np.array([0.3, -0.2, 0.5]),
    H=np.array([1.3, 0.7, 0.4]), discount=np.array([0.2, 0.5, 0.35]),
)  # fmt: skip
RATES = np.array([[0.0, 1.3, 0.4], [0.7, 0.0, 0.9], [0.25, 1.6, 0.0]])


def of_time(time: float | np.ndarray) -> Coefficients:
    """Coefficients that change with time, of one regime."""
    t = np.asarray(time)
    one = np.ones_like(t)
    return Coefficients(
        A=-0.4 + 0.5 * np.sin(3 * t), B=0.9 - 0.4 * t, f=0.3 * np.cos(2 * t), C=0.2 + 0.3 * t,
        D=0.15 + 0.1 * t, s=0.6 - 0.2 * t, M=1 + 0.5 * t, N=0.8 + 0.3 * np.cos(t), p=0.2 - t,
        H=1.1 * one, discount=0.3 + 0.2 * t,
    )  # fmt: skip


def of_regimes(time: float) -> Coefficients:
    """``REGIMES``, the same at any time."""
    return REGIMES


def of_one_regime(time: float) -> Coefficients:
    """``of_time``, as a list of one regime."""
    return of_time(np.array([time]))


@remembered
def values(
    at: Callable[[float], Coefficients], rates: np.ndarray, start: float, horizon: float
) -> np.ndarray:
    """S, e and c of every regime at ``start``, [3, regimes]: coupled Riccati equations."""
    regimes = len(rates)
    moves = rates - np.diag(rates.sum(1))

    def slope(to_go: float, y: np.ndarray) -> np.ndarray:
        S, e, c = y.reshape(3, regimes)
        k = at(horizon - to_go)
        W, G, g = k.N - k.D**2 * S, k.B * S + k.D * S * k.C, k.B * e + k.D * S * k.s
        of_S = 2 * k.A * S - k.M + k.C**2 * S + G**2 / W - k.discount * S
        of_e = k.A * e + k.f * S + k.C * k.s * S - k.p + G * g / W - k.discount * e
        of_c = k.f * e + 0.5 * k.s**2 * S + 0.5 * g**2 / W - k.discount * c
        return (np.stack([of_S, of_e, of_c]) + y.reshape(3, regimes) @ moves.T).ravel()

    end = np.concatenate([-np.atleast_1d(at(horizon).H), np.zeros(2 * regimes)])
    solution = scipy.integrate.solve_ivp(
        slope, (0, horizon - start), end, method="DOP853", rtol=1e-12, atol=1e-13
    )
    return solution.y[:, -1].reshape(3, regimes)


def after_a_step(h: float, i: int) -> np.ndarray:
    """Law of the regime after a step of the chain whose last switch has the last word."""
    rates = RATES[i] * (np.arange(len(RATES)) != i)
    none = np.exp(-h * rates)
    return np.array(
        [(1 - none[j]) * none[j + 1 :].prod() if j != i else none.prod() for j in range(len(rates))]
    )
