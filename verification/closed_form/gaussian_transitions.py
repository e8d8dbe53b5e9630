"""Euler's transition of dX = (pull x + shift + a) dt + s dW, coordinates independent.

    x' ~ N( x + h (pull x + shift + gain x + level), h s^2 ),   s = (noise + swing x^2)(1 + widen a)
with the action a = gain x + level; sums over coordinates; natural logarithms.
"""

from dataclasses import dataclass

import numpy as np

from verification.closed_form.gaussian_law import independent_log_density


@dataclass(frozen=True)
class Equation:
    """The numbers of the dynamics; no two of them equal, none 0 or 1."""

    pull: float = -0.9
    shift: float = 0.35
    noise: float = 0.7
    swing: float = 0.15
    widen: float = 0.25


@dataclass(frozen=True)
class Feedback:
    """a = gain x + level."""

    gain: float
    level: float


def law(e: Equation, f: Feedback, x: np.ndarray, h: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the next coordinates."""
    action = f.gain * x + f.level
    s = (e.noise + e.swing * x**2) * (1 + e.widen * action)
    return x + h * (e.pull * x + e.shift + action), h * s**2


def log_density(e: Equation, f: Feedback, x: np.ndarray, after: np.ndarray, h: float) -> np.ndarray:
    """log p(x' | x), of rows [paths, dim]."""
    mean, variance = law(e, f, x, h)
    return independent_log_density(after, mean, variance)


def divergence(e: Equation, f: Feedback, g: Feedback, x: np.ndarray, h: float) -> np.ndarray:
    """KL of the transition under f from that under g, of rows [paths, dim]."""
    (m1, v1), (m0, v0) = law(e, f, x, h), law(e, g, x, h)
    return 0.5 * ((m1 - m0) ** 2 / v0 + v1 / v0 - 1 - np.log(v1 / v0)).sum(1)
