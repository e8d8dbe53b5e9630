"""Gradient of the clipped surrogate's loss for a network with a low-rank adapter, by hand.

The network predicts eps(x) = e(x) + B A x, e frozen, A [rank, dim], B [dim, rank]; its score is
-eps / sigma, so that the pretrained score is missed by -B A x / sigma. Of DDIM with alpha-bar a_k:
    std_k^2 = eta^2 (1 - a_{k+1}) / (1 - a_k) (1 - a_k / a_{k+1})
    gain_k  = sqrt(a_{k+1} / a_k) sigma_k^2 - sqrt(sigma_{k+1}^2 - std_k^2) sigma_k
At equal policies a row (path, step) contributes to the gradient in its score
    -advantage gain / std noise + kl_weight ((1 + eta^2) / (2 eta))^2 log(a_{k+1} / a_k) (s - s_pre)
and to the path KL half of the square of the last factor times the two before.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampler:
    """DDIM's tables, from alpha-bar at the nodes."""

    eta: float
    alpha_bar: np.ndarray  # [nodes], increasing

    @property
    def sigma(self) -> np.ndarray:
        """Noise level at the left of every step."""
        return np.sqrt(1 - self.alpha_bar[:-1])

    @property
    def clock(self) -> np.ndarray:
        """int g^2 dt of every step."""
        return np.diff(np.log(self.alpha_bar))

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of every transition."""
        a, b = self.alpha_bar[:-1], self.alpha_bar[1:]
        return self.eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))

    @property
    def gain(self) -> np.ndarray:
        """d next mean / d score."""
        a, b = self.alpha_bar[:-1], self.alpha_bar[1:]
        return np.sqrt(b / a) * (1 - a) - np.sqrt(1 - b - self.std**2) * self.sigma

    @property
    def factor(self) -> float:
        """Factor of the path KL."""
        return ((1 + self.eta**2) / (2 * self.eta)) ** 2


def shift(s: Sampler, a: np.ndarray, b: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Score minus pretrained score, of states [paths, steps, dim]."""
    return -(states @ a.T @ b.T) / s.sigma[:, None]


def path_kl(s: Sampler, a: np.ndarray, b: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Path KL of every path and step, nats."""
    return 0.5 * s.factor * s.clock * (shift(s, a, b, states) ** 2).sum(-1)


def gradient(
    s: Sampler,
    a: np.ndarray,
    b: np.ndarray,
    states: np.ndarray,
    noises: np.ndarray,
    advantages: np.ndarray,
    kl_weight: float,
) -> tuple[np.ndarray, np.ndarray]:
    """d loss / d A and d loss / d B; the loss is summed over steps and averaged over paths."""
    of_score = -(advantages * s.gain / s.std)[..., None] * noises
    of_score = of_score + kl_weight * s.factor * s.clock[:, None] * shift(s, a, b, states)
    of_epsilon = -of_score / s.sigma[:, None] / len(states)
    of_product = np.einsum("pki,pkj->ij", of_epsilon, states)
    return b.T @ of_product, of_product @ a.T


def surrogate(
    log_ratio: np.ndarray, advantage: np.ndarray, half_width: float
) -> tuple[np.ndarray, np.ndarray]:
    """min(r A, clip(r) A) and its derivative in log r: 0 where r has gone far enough for A."""
    far = np.where(advantage > 0, log_ratio > half_width, log_ratio < -half_width)
    held = np.exp(np.sign(advantage) * half_width)
    gain = np.where(far, held, np.exp(log_ratio)) * advantage
    return gain, np.where(far, 0.0, np.exp(log_ratio) * advantage)
