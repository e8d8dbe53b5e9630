"""Jump processes: Merton's call, Poisson laws, and moments of a jump chain, by hand."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, poisson

from verification.answers import remembered


@dataclass(frozen=True)
class Merton:
    """Price e^X, dX = (rate - noise^2/2 - intensity k) dt + noise dW + jumps of N(mean, std^2)."""

    rate: float = 0.05
    noise: float = 0.25
    intensity: float = 1.3
    mean: float = -0.1
    std: float = 0.2
    strike: float = 1.1
    horizon: float = 0.7

    @property
    def k(self) -> float:
        """Mean relative jump, E e^z - 1."""
        return math.exp(self.mean + 0.5 * self.std**2) - 1

    @remembered
    def call(self, price: np.ndarray, to_go: float, terms: int = 40) -> np.ndarray:
        """Merton's series: Black and Scholes for every number of jumps, weighted by Poisson's."""
        grown = self.intensity * (1 + self.k) * to_go
        total = np.zeros_like(price)
        for n in range(terms):
            rate = self.rate - self.intensity * self.k + n * math.log(1 + self.k) / to_go
            variance = self.noise**2 * to_go + n * self.std**2
            d1 = (np.log(price / self.strike) + rate * to_go + 0.5 * variance) / variance**0.5
            worth = price * norm.cdf(d1)
            worth = worth - self.strike * math.exp(-rate * to_go) * norm.cdf(d1 - variance**0.5)
            total = total + poisson.pmf(n, grown) * worth
        return total


def poisson_kl(rate: float, reference: float, time: float) -> float:
    """KL of Poisson laws of the number of jumps, by its sum, nats."""
    n = np.arange(int(20 + 10 * rate * time))
    one, other = poisson.logpmf(n, rate * time), poisson.logpmf(n, reference * time)
    return float((np.exp(one) * (one - other)).sum())


def count_cells(mean: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability of 0 .. most jumps, and a normal in the middle of the quantiles of each."""
    n = np.arange(most + 1)
    mass = poisson.pmf(n, mean)
    # of the upper tail, which keeps its digits
    return mass, norm.isf(poisson.sf(n, mean) + 0.5 * mass)


@dataclass(frozen=True)
class LinearIntensity:
    """dX = pull X dt + size dN, N of intensity base + slope X: a linear equation for the mean."""

    pull: float = -0.4
    size: float = 0.3
    base: float = 0.5
    slope: float = 0.35
    start: float = 0.8

    def chain_mean(self, times: np.ndarray) -> float:
        """Of a chain that holds drift and intensity over each step."""
        m = self.start
        for h in np.diff(times):
            m = m + h * (self.pull * m + self.size * (self.base + self.slope * m))
        return m

    def mean(self, t: float) -> float:
        """In continuous time."""
        growth = self.pull + self.size * self.slope
        rest = self.size * self.base / growth
        return (self.start + rest) * math.exp(growth * t) - rest
