"""Gaussian data noised by the variance-preserving SDE: all its laws, from joint normality alone.

    dY = -beta(s) Y / 2 ds + sqrt(beta(s)) dB,   Y_0 ~ N(mean, covariance),   s in [0, horizon]
    beta(s) = beta_start + (beta_end - beta_start) s / horizon;  equal ends: constant

    Y_s = alpha_s Y_0 + sigma_s eps,  alpha_s = exp(-1/2 int_0^s beta),  sigma_s^2 = 1 - alpha_s^2
    (Y_a, Y_b) are jointly normal,  Cov(Y_a, Y_b) = (alpha_b / alpha_a) Cov(Y_a)  for a <= b

Everything else is conditioning of joint normals. The generation SDE with the exact score is the
time reversal, so its transition from noising time s to s' < s is the law of Y_s' given Y_s.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import sqrtm

from verification.closed_form.gaussian_law import Normal, Transition


@dataclass(frozen=True, eq=False)
class VPGaussian:
    """Data N(mean, covariance) and the schedule that noises it."""

    mean: np.ndarray
    covariance: np.ndarray
    beta_start: float = 0.1
    beta_end: float = 20.0
    horizon: float = 1.0

    def beta(self, s: float) -> float:
        """Noising rate, squared diffusion."""
        return self.beta_start + (self.beta_end - self.beta_start) * s / self.horizon

    def integrated_beta(self, s: float, s_from: float = 0.0) -> float:
        """Int of beta from s_from to s: the trapezium, since beta is linear."""
        return 0.5 * (self.beta(s) + self.beta(s_from)) * (s - s_from)

    def alpha(self, s: float) -> float:
        """Signal left at s."""
        return float(np.exp(-0.5 * self.integrated_beta(s)))

    def sigma(self, s: float) -> float:
        """Standard deviation of Y_s given Y_0."""
        return float(np.sqrt(-np.expm1(-self.integrated_beta(s))))

    def with_data(self, law: Normal) -> "VPGaussian":
        """The same schedule, other data (a tilt, say)."""
        return replace(self, mean=law.mean, covariance=law.covariance)

    def noised(self, s: float) -> Normal:
        """Law of Y_s."""
        unit = np.eye(len(self.mean))
        covariance = self.alpha(s) ** 2 * self.covariance + self.sigma(s) ** 2 * unit
        return Normal(self.alpha(s) * self.mean, covariance)

    def score(self, s: float) -> tuple[np.ndarray, np.ndarray]:
        """(matrix, vector) of the score x -> matrix x + vector of Y_s."""
        law = self.noised(s)
        precision = np.linalg.inv(law.covariance)
        return -precision, precision @ law.mean

    def drift(self, s: float) -> tuple[np.ndarray, np.ndarray]:
        """(matrix, vector) of the generation SDE's drift, beta (x / 2 + score), at s."""
        matrix, vector = self.score(s)
        return self.beta(s) * (matrix + 0.5 * np.eye(len(vector))), self.beta(s) * vector

    def transition(self, s_from: float, s_to: float) -> Transition:
        """Law of Y at s_to given Y at s_from > s_to: the generation SDE with the exact score."""
        before, after = self.noised(s_from), self.noised(s_to)
        covariance = self.alpha(s_from) / self.alpha(s_to) * after.covariance  # of both
        F = np.linalg.solve(before.covariance, covariance).T
        return Transition(F, after.mean - F @ before.mean, after.covariance - F @ covariance)

    def posterior(self, s: float) -> Transition:
        """Law of the data given Y_s; its mean is Tweedie's."""
        return self.transition(s, 0.0)

    def flow(self, s_from: float, s_to: float) -> Transition:
        """The probability-flow ODE's map, without noise: whitens, then colours."""
        before, after = self.noised(s_from), self.noised(s_to)
        F = np.real(sqrtm(after.covariance)) @ np.linalg.inv(np.real(sqrtm(before.covariance)))
        return Transition(F, after.mean - F @ before.mean, np.zeros_like(F))


# Data whose covariance has eigenvalues above and below the noise's 1; no number 0 or 1.
MEAN = np.array([0.8, -0.5])
COVARIANCE = np.array([[1.3, 0.45], [0.45, 0.6]])
LONG = VPGaussian(MEAN, COVARIANCE)  # beta .1 -> 20: alpha_T = .0066
SHORT = VPGaussian(MEAN, COVARIANCE, 2.0, 2.0)  # beta = 2: alpha_T = .37
