"""The best reward at a KL from a law P: exactly where P is known, and by definition from samples.

    R(b) = E*[r],   KL(b) = KL(P* || P),   J*(b) = R - b KL,   dP* proportional to exp(r / b) dP

Gaussian P, quadratic r    completed squares, and the KL of two normal laws
scalar P, any r            Gauss-Legendre sums
binary r                   two numbers
samples                    weights normalised one by one, and samples left out one by one
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from verification.closed_form.tilt import tilt
from verification.closed_form.vp_gaussian import Normal, Quadratic, kl


class Point(NamedTuple):
    """Reward, KL in nats, and objective at one b."""

    reward: float
    kl: float
    objective: float


def mean(points: Iterable[Point]) -> Point:
    """Where several prompts share b and count alike."""
    return Point(*np.mean(list(points), axis=0))


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
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x = reach * nodes
    mass = weights * density(x)
    mass, r = mass / mass.sum(), reward(x)
    ratio = np.exp(r / b)
    ratio /= mass @ ratio  # of the tilt's density to P's
    best, divergence = mass @ (ratio * r), mass @ (ratio * np.log(ratio))
    return Point(best, divergence, best - b * divergence)


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
    best = weights @ rewards
    divergence = weights @ np.log(len(rewards) * weights)
    return Point(best, divergence, best - b * divergence)


def jackknifed(rewards: np.ndarray, b: float) -> Point:
    """The same with the jackknife's correction: every sample left out in turn."""
    n = len(rewards)
    left = [of_samples(np.delete(rewards, i), b) for i in range(n)]
    return Point(*(n * np.array(of_samples(rewards, b)) - (n - 1) * np.mean(left, axis=0)))


def effective_samples(rewards: np.ndarray, b: float) -> float:
    """(sum e)^2 / sum e^2."""
    e = np.exp((rewards - rewards.max()) / b)
    return e.sum() ** 2 / (e @ e)
