"""Steps of the drift-implicit and the tamed Euler method, by hand."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stiff:
    """dX = (1 + t) A X dt + (1 + t) noise dW in the plane, A stiff and not symmetric."""

    noise: float = 0.6

    @property
    def A(self) -> np.ndarray:
        """The drift's matrix."""
        return np.array([[-90.0, 40.0], [5.0, -3.0]])

    def implicit(self, x: np.ndarray, dw: np.ndarray, t0: float, t1: float) -> np.ndarray:
        """(1 - h (1 + t1) A) Y = X + (1 + t0) noise dW."""
        matrix = np.eye(2) - (t1 - t0) * (1 + t1) * self.A
        return np.linalg.solve(matrix, (x + (1 + t0) * self.noise * dw).T).T

    def tamed(self, x: np.ndarray, dw: np.ndarray, t0: float, t1: float) -> np.ndarray:
        """X + h b / (1 + h |b|) + (1 + t0) noise dW."""
        push = (t1 - t0) * (1 + t0) * x @ self.A.T
        length = np.sqrt((push**2).sum(1, keepdims=True))
        return x + push / (1 + length) + (1 + t0) * self.noise * dw


def cubic_root(known: np.ndarray, h: float) -> np.ndarray:
    """y of y - h (y - y^3) = known, h < 1, by Cardano's formula."""
    p, q = (1 - h) / h, -known / h  # y^3 + p y + q = 0, p > 0
    root = np.sqrt(q**2 / 4 + p**3 / 27)
    u = np.cbrt(np.abs(q) / 2 + root)
    return -np.sign(q) * (u - p / (3 * u))
