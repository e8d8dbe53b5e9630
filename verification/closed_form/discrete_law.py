"""A law of finitely many values: exact moments of what is estimated from samples of it."""

import itertools
import math

import numpy as np

VALUES = np.array([-0.7, 0.4, 1.9])
SAMPLED = np.array([0.5, 0.3, 0.2])
TARGET = np.array([0.2, 0.5, 0.3])


def tuples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All samples of size n, [samples n], and their probabilities, [samples]."""
    places = np.array(list(itertools.product(range(len(VALUES)), repeat=n)))
    return VALUES[places], SAMPLED[places].prod(1)


def variance() -> float:
    """Variance of one sample."""
    return float(SAMPLED @ (VALUES - SAMPLED @ VALUES) ** 2)


def variance_of_weighted_mean(n: int) -> float:
    """Variance of sum w f / sum w, w = TARGET / SAMPLED, over n samples: a sum over counts."""
    first = second = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        if a + b > n:
            continue
        counts = np.array([a, b, n - a - b])
        log = math.lgamma(n + 1) - sum(math.lgamma(c + 1) for c in counts)
        probability = math.exp(log + float(counts @ np.log(SAMPLED)))
        weights = counts * TARGET / SAMPLED
        mean = float(weights @ VALUES / weights.sum())
        first, second = first + probability * mean, second + probability * mean**2
    return second - first**2
