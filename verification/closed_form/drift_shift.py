"""A constant shift of the drift: by how much the surrogate misses the performance, in closed form.

Law        dX = (action - pull X) dt + noise dW, X_0 ~ N(mean, std^2); the new policy adds ``shift``
Rate       h_t(x) = shift V'(t, x), with V of the old policy in continuous time
Gap        sum_k h_k (E_{p'_k} h_k - E_{p_k} h_k), p and p' the Gaussian laws of the Euler chains
Rewards    -curvature x^2 / 2, cos(frequency x), exp(frequency x), at the horizon
"""

from dataclasses import dataclass

import numpy as np

from verification.closed_form.ornstein_uhlenbeck import euler_law


@dataclass(frozen=True)
class DriftShift:
    """The numbers of the old law."""

    pull: float = 0.8
    action: float = 0.35
    noise: float = 0.6
    mean: float = 0.45
    std: float = 0.7


def laws(p: DriftShift, shift: float, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the Euler chain at the left end of every step."""
    law = euler_law(p.pull, p.action + shift, p.noise, p.mean, p.std, nodes)
    return law.mean[:-1], law.covariance.diagonal()[:-1].copy()


def path_kl(p: DriftShift, shift: float, nodes: np.ndarray) -> np.ndarray:
    """KL of the paths until the left end of every step, nats."""
    return shift**2 * (nodes[:-1] - nodes[0]) / (2 * p.noise**2)


def flow(p: DriftShift, left: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X_T | X_t = x is N(factor x + offset, variance) under the old policy: these three."""
    factor = np.exp(-p.pull * left)
    if p.pull == 0:
        return factor, p.action * left, p.noise**2 * left
    variance = p.noise**2 * (1 - factor**2) / (2 * p.pull)
    return factor, p.action * (1 - factor) / p.pull, variance


def quadratic_slope(p: DriftShift, curvature: float, shift: float, nodes: np.ndarray) -> np.ndarray:
    """dh / dx, a constant at every step: h is linear."""
    factor, _, _ = flow(p, nodes[-1] - nodes[:-1])
    return -curvature * factor**2 * shift


def quadratic_gap(p: DriftShift, curvature: float, shift: float, nodes: np.ndarray) -> float:
    """The gap for a quadratic reward."""
    mean_shift = laws(p, shift, nodes)[0] - laws(p, 0.0, nodes)[0]
    return float(np.diff(nodes) @ (quadratic_slope(p, curvature, shift, nodes) * mean_shift))


def shift_chi2(mean_shift: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """chi^2 of two Gaussians of one variance, whose means differ by ``mean_shift``."""
    return np.expm1(mean_shift**2 / variance)


def cosine_oscillation(
    p: DriftShift, frequency: float, shift: float, nodes: np.ndarray
) -> np.ndarray:
    """sup h - inf h at every step."""
    factor, _, flow_variance = flow(p, nodes[-1] - nodes[:-1])
    return 2 * np.abs(shift * frequency * factor) * np.exp(-(frequency**2) * flow_variance / 2)


def cosine_gap(p: DriftShift, frequency: float, shift: float, nodes: np.ndarray) -> float:
    """The gap for a cosine."""
    factor, offset, flow_variance = flow(p, nodes[-1] - nodes[:-1])

    def expected(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        damping = np.exp(-(frequency**2) * (flow_variance + factor**2 * variance) / 2)
        sine = np.sin(frequency * (factor * mean + offset))
        return -shift * frequency * factor * damping * sine

    change = expected(*laws(p, shift, nodes)) - expected(*laws(p, 0.0, nodes))
    return float(np.diff(nodes) @ change)


def pinsker(p: DriftShift, frequency: float, shift: float, nodes: np.ndarray) -> float:
    """sum h_k osc(h_k) sqrt(K_k / 2) = sum h_k osc(h_k) |shift| sqrt(t_k) / (2 noise)."""
    farthest = np.abs(shift) * np.sqrt(nodes[:-1] - nodes[0]) / (2 * p.noise)
    return float(np.diff(nodes) @ (cosine_oscillation(p, frequency, shift, nodes) * farthest))


def exponential_rate(
    p: DriftShift, frequency: float, shift: float, nodes: np.ndarray, visiting: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of h for an exponential reward, under the law shifted by ``visiting``."""
    factor, offset, flow_variance = flow(p, nodes[-1] - nodes[:-1])
    mean, variance = laws(p, visiting, nodes)
    width = (frequency * factor) ** 2 * variance
    level = shift * frequency * factor
    level = level * np.exp(frequency * (factor * mean + offset) + frequency**2 * flow_variance / 2)
    return level * np.exp(width / 2), level**2 * np.exp(width) * np.expm1(width)


def exponential_gap(p: DriftShift, frequency: float, shift: float, nodes: np.ndarray) -> float:
    """The gap for an exponential."""
    new, _ = exponential_rate(p, frequency, shift, nodes, shift)
    old, _ = exponential_rate(p, frequency, shift, nodes, 0.0)
    return float(np.diff(nodes) @ (new - old))
