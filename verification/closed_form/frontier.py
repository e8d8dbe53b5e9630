"""The best reward at a KL from a law P: exactly where P is known, and by definition from samples.

    R(b) = E*[r],   KL(b) = KL(P* || P),   J*(b) = R - b KL,   dP* proportional to exp(r / b) dP

Gaussian P, quadratic r    completed squares, and the KL of two normal laws
scalar P, any r            Gauss-Legendre sums
binary r                   two numbers
samples                    weights normalised one by one, and samples left out one by one
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from verification.closed_form.gaussian_law import Normal, Quadratic, kl
from verification.closed_form.tilt import tilt


class Point(NamedTuple):
    """Reward, KL in nats, and objective at one b."""

    reward: float
    kl: float
    objective: float


def mean(points: Iterable[Point]) -> Point:
    """Where several prompts share b and count alike."""
    return Point(*(float(np.mean(each)) for each in zip(*points, strict=True)))


def of_gaussian(law: Normal, reward: Quadratic, b: float) -> Point:
    """The frontier of a normal law: the objective is b log Z."""
    tilted, log_z = tilt(law, reward, b)
    return Point(reward.expectation(tilted), kl(tilted, law), b * log_z)


def of_density(
    density: Callable[[np.ndarray], np.ndarray],
    reward: Callable[[np.ndarray], np.ndarray],
    b: float,
    reach: float,
) -> Point:
    """The frontier of a scalar law that has no mass outside [-reach, reach]."""
    nodes, weights = _rule()
    x = reach * nodes
    mass = weights * density(x)
    mass, r = mass / mass.sum(), reward(x)
    ratio = np.exp(r / b)
    ratio /= mass @ ratio  # of the tilt's density to P's
    best, divergence = float(mass @ (ratio * r)), float(mass @ (ratio * np.log(ratio)))
    return Point(best, divergence, best - b * divergence)


@cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


class Binary(NamedTuple):
    """A reward of 1 with a probability, else 0."""

    probability: float

    def at(self, b: float) -> Point:
        """The frontier: a tilted coin."""
        p, q = self.probability, self.tilted(b)
        divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
        return Point(q, divergence, q - b * divergence)

    def tilted(self, b: float) -> float:
        """Probability of 1 under the tilt."""
        odds = self.probability / (1 - self.probability) * np.exp(1 / b)
        return odds / (1 + odds)

    def moment(self, b: float, power: int) -> float:
        """E[(dP* / dP - 1)^power] under P; of power 2 it is the chi-square divergence."""
        p, q = self.probability, self.tilted(b)
        return p * (q / p - 1) ** power + (1 - p) * ((1 - q) / (1 - p) - 1) ** power


def of_samples(rewards: np.ndarray, b: float) -> Point:
    """Samples of P for P itself."""
    weights = np.array([1 / np.exp((rewards - r) / b).sum() for r in rewards])
    best = float(weights @ rewards)
    divergence = float(weights @ np.log(len(rewards) * weights))
    return Point(best, divergence, best - b * divergence)


def jackknifed(rewards: np.ndarray, b: float) -> Point:
    """The same with the jackknife's correction: every sample left out in turn."""
    n = len(rewards)
    left = mean(of_samples(np.delete(rewards, i), b) for i in range(n))
    whole = of_samples(rewards, b)
    return Point(*(n * a - (n - 1) * each for a, each in zip(whole, left, strict=True)))


def effective_samples(rewards: np.ndarray, b: float) -> float:
    """(sum e)^2 / sum e^2."""
    e = np.exp((rewards - rewards.max()) / b)
    return e.sum() ** 2 / (e @ e)
