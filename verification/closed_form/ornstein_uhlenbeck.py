"""Divergences of two Ornstein-Uhlenbeck laws: of the Euler chain, and in continuous time.

Law 1   dX = (shift - pull X) dt + noise dW,   law 0 with reference_shift, reference_pull
Start   N(mean, std^2) under both
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """The numbers of both laws; no two of them equal, none 0 or 1."""

    pull: float = 1.3
    shift: float = 0.35
    reference_pull: float = 0.4
    reference_shift: float = -0.15
    noise: float = 0.7
    mean: float = 0.6
    std: float = 0.3


def euler_path_kl(p: OrnsteinUhlenbeck, nodes: np.ndarray) -> float:
    """KL of the Euler chains on these nodes, by a recursion of mean and variance, nats."""
    total, mean, variance = 0.0, p.mean, p.std**2
    slope, constant = p.reference_pull - p.pull, p.shift - p.reference_shift
    for h in np.diff(nodes):
        gap = (constant + slope * mean) ** 2 + slope**2 * variance
        total += gap * h / (2 * p.noise**2)
        mean = mean + h * (p.shift - p.pull * mean)
        variance = (1 - p.pull * h) ** 2 * variance + p.noise**2 * h
    return total
