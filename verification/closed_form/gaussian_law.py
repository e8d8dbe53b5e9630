"""Normal laws of several variables: parts, transitions, conditional laws, and divergences.

Written with the textbook's block formulas, on dense matrices. The chain rule
    KL(joint) = KL(given) + E KL(rest | given)
is not used: both sides are computed, each from its own definition.
"""

from typing import NamedTuple

import numpy as np


class Normal(NamedTuple):
    """N(mean, covariance)."""

    mean: np.ndarray
    covariance: np.ndarray

    def of(self, *indices: int) -> "Normal":
        """The law of some of the variables."""
        chosen = [index % len(self.mean) for index in indices]
        return Normal(self.mean[chosen], self.covariance[np.ix_(chosen, chosen)])


class Transition(NamedTuple):
    """X' given X = x is N(F x + f, C)."""

    F: np.ndarray
    f: np.ndarray
    C: np.ndarray

    def of(self, law: Normal) -> Normal:
        """The law of X' if X has this one."""
        return Normal(self.F @ law.mean + self.f, self.F @ law.covariance @ self.F.T + self.C)

    def then(self, later: "Transition") -> "Transition":
        """This transition and a later one in a row."""
        law = later.of(Normal(self.f, self.C))
        return Transition(later.F @ self.F, law.mean, law.covariance)


class Quadratic(NamedTuple):
    """x -> -x'Qx/2 + l'x + c."""

    Q: np.ndarray
    l: np.ndarray  # noqa: E741  # the reward's name
    c: float

    def __call__(self, x: np.ndarray) -> np.ndarray | np.float64:
        """Its value at x [..., dim]."""
        return -0.5 * np.einsum("...i,ij,...j", x, self.Q, x) + x @ self.l + self.c

    def expectation(self, law: Normal) -> float:
        """Its mean under a law."""
        return float(self(law.mean) - 0.5 * np.trace(self.Q @ law.covariance))

    def variance(self, law: Normal) -> float:
        """Its variance under a normal law: tr(QSQS)/2 + |S^{1/2} gradient at the mean|^2."""
        product, slope = self.Q @ law.covariance, self.l - self.Q @ law.mean
        return float(0.5 * np.trace(product @ product) + slope @ law.covariance @ slope)


def kl(law: Normal, reference: Normal) -> float:
    """KL(law || reference), nats."""
    precision = np.linalg.inv(reference.covariance)
    gap = law.mean - reference.mean
    trace = np.trace(precision @ law.covariance) - len(gap)
    volume = np.linalg.slogdet(reference.covariance)[1] - np.linalg.slogdet(law.covariance)[1]
    return float(0.5 * (trace + gap @ precision @ gap + volume))


def conditional(law: Normal, known: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, constant and covariance of the other variables given one."""
    known %= len(law.mean)
    rest = [index for index in range(len(law.mean)) if index != known]
    across = law.covariance[rest, known]
    slope = across / law.covariance[known, known]
    left = law.covariance[np.ix_(rest, rest)] - np.outer(slope, across)
    return slope, law.mean[rest] - slope * law.mean[known], left


def conditional_kl(law: Normal, reference: Normal, known: int) -> float:
    """E KL(others | one), the one distributed as under ``law``, nats."""
    slope, constant, covariance = conditional(law, known)
    reference_slope, reference_constant, reference_covariance = conditional(reference, known)
    mean, variance = law.mean[known], law.covariance[known, known]
    steeper = slope - reference_slope
    apart = constant - reference_constant + steeper * mean
    precision = np.linalg.inv(reference_covariance)
    same_means = kl(Normal(0 * apart, covariance), Normal(0 * apart, reference_covariance))
    return same_means + 0.5 * float(
        apart @ precision @ apart + variance * (steeper @ precision @ steeper)
    )


def log_density(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """log N(x; mean, covariance) of every row, nats; covariance [dim, dim] or one a row."""
    gap = x - mean
    whole = np.broadcast_to(covariance, (*gap.shape, gap.shape[-1]))
    weighed = np.linalg.solve(whole, gap[..., None])[..., 0]
    volume = np.linalg.slogdet(2 * np.pi * whole)[1]
    return -0.5 * ((gap * weighed).sum(-1) + volume)


def independent_log_density(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The same of coordinates that are independent, [..., dim] each or broadcast."""
    gaps = (x - mean) ** 2 / variance
    return -0.5 * np.sum(gaps + np.log(2 * np.pi * variance), axis=-1)


def chain(start: Normal, steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Normal:
    """The joint law of X_0, ..., X_n, one after the other: X_{k+1} = F X_k + f + N(0, C)."""
    mean, blocks = [start.mean], [[start.covariance]]
    for matrix, vector, noise in steps:
        mean.append(matrix @ mean[-1] + vector)
        across = [matrix @ block for block in blocks[-1]]  # Cov(X_{k+1}, X_j)
        blocks.append([*across, across[-1] @ matrix.T + noise])
    dim, count = len(start.mean), len(mean)
    covariance = np.zeros((count * dim, count * dim))
    for i, row in enumerate(blocks):
        for j, block in enumerate(row):
            covariance[i * dim : (i + 1) * dim, j * dim : (j + 1) * dim] = block
            covariance[j * dim : (j + 1) * dim, i * dim : (i + 1) * dim] = block.T
    return Normal(np.concatenate(mean), covariance)


def second_moment_of_ratio(law: Normal, reference: Normal) -> float:
    """E (d reference / d law)^2 under ``law``: 1 and the chi-square divergence.

    Finite only while twice the reference's precision exceeds that of the law.
    """
    one, other = np.linalg.inv(law.covariance), np.linalg.inv(reference.covariance)
    both = 2 * other - one
    if np.linalg.eigvalsh(both).min() <= 0:
        return np.inf
    linear = 2 * other @ reference.mean - one @ law.mean
    exponent = 0.5 * (
        linear @ np.linalg.solve(both, linear)
        + law.mean @ one @ law.mean
        - 2 * reference.mean @ other @ reference.mean
    )
    volume = np.linalg.slogdet(other)[1] - 0.5 * (
        np.linalg.slogdet(one)[1] + np.linalg.slogdet(both)[1]
    )
    return float(np.exp(exponent + volume))
