"""Geometric Brownian motion with a drift that changes, and how far schemes are from it.

    dX = (rate + ramp t) X dt + volatility X dW (Ito),   X_0 = start
    X_T = start exp( int rate + ramp t dt - volatility^2 T / 2 + volatility W_T )

A scheme multiplies by a polynomial R(w) of its increment w ~ N(0, h); the solution by G(w). So the
mean square error at T is a difference of products over the steps,
    E (X^h_T - X_T)^2 = start^2 ( prod E R^2 - 2 prod E R G + prod E G^2 ),
in which E[ w^k G ] / E[ G ] is the k-th moment of N(volatility h, h) (Cameron & Martin).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.polynomial import Polynomial


@dataclass(frozen=True)
class GeometricBrownianMotion:
    """The numbers; no two of them equal, none 0 or 1."""

    rate: float = 0.3
    ramp: float = 0.45
    volatility: float = 0.6
    start: float = 1.3
    horizon: float = 0.8


def growth(p: GeometricBrownianMotion, before: float, after: float) -> float:
    """log E G of a step."""
    return p.rate * (after - before) + p.ramp * (after**2 - before**2) / 2


def _mean(polynomial: Polynomial, centre: float, h: float) -> float:
    """E polynomial(N(centre, h))."""
    moments = [1.0, centre]
    for k in range(2, len(polynomial.coef)):
        moments.append(centre * moments[-1] + (k - 1) * h * moments[-2])
    return float(np.dot(polynomial.coef, moments[: len(polynomial.coef)]))


def factor(p: GeometricBrownianMotion, scheme: str, before: float, after: float) -> Polynomial:
    """R(w) of a step."""
    s, h = p.volatility, after - before
    w = Polynomial([0.0, 1.0])
    drift = (p.rate + p.ramp * before) * h
    if scheme == "Euler-Maruyama":
        return 1 + drift + s * w
    if scheme == "Milstein":
        return 1 + drift + s * w + s**2 * (w**2 - h) / 2
    if scheme == "Heun":
        here = drift - s**2 * h / 2 + s * w
        there = (p.rate + p.ramp * after) * h - s**2 * h / 2 + s * w
        return 1 + (here + there * (1 + here)) / 2
    raise ValueError(f"scheme must be Euler-Maruyama, Milstein or Heun, got {scheme!r}")


def mean_square_error(p: GeometricBrownianMotion, scheme: str, nodes: np.ndarray) -> float:
    """E (X^h_T - X_T)^2."""
    products = np.ones(3)
    for before, after in pairwise(nodes.tolist()):
        h, r = after - before, factor(p, scheme, before, after)
        scale = np.exp(growth(p, before, after))
        products *= [
            _mean(r * r, 0.0, h),
            scale * _mean(r, p.volatility * h, h),
            scale**2 * np.exp(p.volatility**2 * h),
        ]
    return float(p.start**2 * (products[0] - 2 * products[1] + products[2]))
