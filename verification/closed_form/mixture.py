"""A mixture of two normal laws, noised: its score by formula, what it came from by quadrature.

Y_0 ~ sum_i weight_i N(mean_i, variance_i),   Y = alpha Y_0 + sigma eps,   one dimension
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mixture:
    """Two unlike components: no symmetry, and no Gaussian."""

    weights: tuple[float, float] = (0.3, 0.7)
    means: tuple[float, float] = (-1.1, 0.8)
    variances: tuple[float, float] = (0.15, 0.4)

    def density(self, y: np.ndarray) -> np.ndarray:
        """Density of the data."""
        parts = zip(self.weights, self.means, self.variances, strict=True)
        each = [w * np.exp(-((y - m) ** 2) / (2 * v)) / np.sqrt(v) for w, m, v in parts]
        return np.sum(each, axis=0) / np.sqrt(2 * np.pi)

    def score(self, x: float, alpha: float, sigma: float) -> float:
        """Score of Y at x."""
        variances = [alpha**2 * v + sigma**2 for v in self.variances]
        gaps = [x - alpha * m for m in self.means]
        shares = [
            w * np.exp(-(g**2) / (2 * v)) / np.sqrt(v)
            for w, g, v in zip(self.weights, gaps, variances, strict=True)
        ]
        slopes = [-g / v for g, v in zip(gaps, variances, strict=True)]
        return float(np.dot(shares, slopes) / sum(shares))

    def posterior_mean(self, x: float, alpha: float, sigma: float) -> float:
        """Mean of Y_0 given Y = x, by integrating Bayes' rule."""
        nodes, weights = np.polynomial.legendre.leggauss(300)
        y = 8 * nodes
        mass = weights * self.density(y) * np.exp(-((x - alpha * y) ** 2) / (2 * sigma**2))
        return float(mass @ y / mass.sum())
