"""Investing under Heston's stochastic volatility: Kraft's answer, by scipy.

dS/S = (premium y) dt + sqrt(y) dW1,  dY = pull (level - Y) dt + swing sqrt(Y) dW2,
d<W1, W2> = correlation dt,  wealth dw/w = a (premium y dt + sqrt(y) dW1),  utility w^g / g
"""

from dataclasses import dataclass

import numpy as np
import scipy.integrate


@dataclass(frozen=True)
class Heston:
    """Interest 0; a is the share of wealth in the stock."""

    premium: float = 2.0
    pull: float = 3.0
    level: float = 0.09
    swing: float = 0.6
    correlation: float = -0.7
    power: float = -1.5
    horizon: float = 0.5

    def solution(self, t: float) -> tuple[float, float, float]:
        """A, B and the share: V = w^g / g exp(A(t) + B(t) y), the best share is free of y.

        The supremum over a of g (a premium + a swing correlation B) + g (g - 1) a^2 / 2, over g.
        """
        g, k = self.power, self.swing * self.correlation

        def slope(to_go: float, ab: np.ndarray) -> list[float]:
            B = ab[1]
            share = (self.premium + k * B) / (1 - g)
            gain = g * share * (self.premium + k * B) + 0.5 * g * (g - 1) * share**2
            return [self.pull * self.level * B, -self.pull * B + 0.5 * self.swing**2 * B**2 + gain]

        end = scipy.integrate.solve_ivp(
            slope, (0, self.horizon - t), [0.0, 0.0], rtol=1e-11, atol=1e-12
        ).y[:, -1]
        return float(end[0]), float(end[1]), float((self.premium + k * end[1]) / (1 - g))
