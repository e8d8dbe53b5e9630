"""Moments of normal variables, and Brownian increments on fine nodes given those on coarse ones.

With H = diag(h) the covariance of fine increments and A the sums over coarse steps, given A f = c
    f ~ N( H A' (A H A')^{-1} c,  H - H A' (A H A')^{-1} A H ).
"""

import math

import numpy as np


def normal_moment(power: int, variance: float) -> float:
    """E W^power of W ~ N(0, variance): (power - 1)!! variance^(power / 2), 0 for odd powers."""
    if power % 2:
        return 0.0
    return math.prod(range(1, power, 2)) * variance ** (power // 2)


def missed_by_quadrature(nodes: int, variance: float) -> float:
    """E W^(2 nodes) minus its Gauss-Hermite value: nodes! variance^nodes, the norm of He_nodes."""
    return math.factorial(nodes) * variance**nodes


def sums(coarse: tuple[float, ...], fine: tuple[float, ...]) -> np.ndarray:
    """A: 1 where a fine step lies in a coarse one."""
    middle = (np.array(fine[1:]) + np.array(fine[:-1])) / 2
    begin, end = np.array(coarse[:-1])[:, None], np.array(coarse[1:])[:, None]
    return ((begin < middle) & (middle < end)).astype(float)


def bridge(coarse: tuple[float, ...], fine: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean, as a matrix that acts on coarse increments, and covariance of the fine ones."""
    h, a = np.diag(np.diff(fine)), sums(coarse, fine)
    gain = h @ a.T @ np.linalg.inv(a @ h @ a.T)
    return gain, h - gain @ a @ h
