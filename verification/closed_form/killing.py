"""Ornstein-Uhlenbeck, killed at a rate quadratic in the state: Mehler's formula, and its chain."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Killed:
    """dX = -pull X dt + noise dW, killed at the rate level (1 + t) + curvature X^2 / 2."""

    pull: float = 0.7
    noise: float = 0.9
    level: float = 0.3
    curvature: float = 1.1
    horizon: float = 0.8

    def rate(self, t: float, x: np.ndarray) -> np.ndarray:
        """Of killing."""
        return self.level * (1 + t) + 0.5 * self.curvature * x**2

    def survival(self, t: float, x: np.ndarray) -> np.ndarray:
        """E exp(-int_t^T rate ds) from x at t."""
        to_go = self.horizon - t
        root = np.sqrt(self.pull**2 + self.curvature * self.noise**2)
        c, s = np.cosh(root * to_go), np.sinh(root * to_go)
        spread = c + self.pull / root * s
        killed = self.level * (to_go + 0.5 * (self.horizon**2 - t**2))
        gain = self.curvature * s / (root * spread)
        return np.exp(-0.5 * gain * x**2 - killed + 0.5 * self.pull * to_go) / np.sqrt(spread)

    def chain(self, times: np.ndarray, x: float, paid: float, nodes: int) -> float:
        """Value of Euler's chain that is paid (paid + x) a unit of time and 1 + x^2 at the end."""
        z, w = np.polynomial.hermite_e.hermegauss(nodes)
        w = w / w.sum()

        def value(k: int, x: np.ndarray) -> np.ndarray:
            if k == len(times) - 1:
                return 1 + x**2
            h = times[k + 1] - times[k]
            after = x[:, None] * (1 - self.pull * h) + self.noise * np.sqrt(h) * z
            ahead = value(k + 1, after.ravel()).reshape(after.shape) @ w
            return (paid + x) * h + np.exp(-self.rate(times[k], x) * h) * ahead

        return float(value(0, np.array([x]))[0])
