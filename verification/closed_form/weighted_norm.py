"""shift' (sigma sigma')^{-1} shift in rational arithmetic: no round-off at any condition number."""

from fractions import Fraction

import numpy as np

Rows = list[list[float]]


def rotated(condition: float, columns: int, left: float, right: float) -> np.ndarray:
    """A matrix [2, columns] with singular values 0.8 and 0.8 / condition, in turned frames."""
    turn = np.array([[np.cos(left), -np.sin(left)], [np.sin(left), np.cos(left)]])
    frame, _ = np.linalg.qr(np.vander([right, right + 0.7, 1.9 - right][:columns]))
    return turn @ np.diag([0.8, 0.8 / condition]) @ frame[:, :2].T


def energy(sigma: Rows, shift: list[float]) -> float:
    """Weighted norm for a matrix with two rows, of the numbers as they stand in the machine."""
    (a, b), y = [[Fraction(x) for x in row] for row in sigma], [Fraction(x) for x in shift]
    aa, ab, bb = (
        sum(x * z for x, z in zip(*pair, strict=True)) for pair in ((a, a), (a, b), (b, b))
    )
    return float((bb * y[0] ** 2 - 2 * ab * y[0] * y[1] + aa * y[1] ** 2) / (aa * bb - ab**2))
