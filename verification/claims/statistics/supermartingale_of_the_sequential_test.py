"""The sequential test's evidence is a supermartingale.

E exp(phi(lam X)) <= 1 + lam^2 v / 2 <= exp(lam^2 v / 2) for every law of X of mean 0 and
variance v, heavy-tailed ones too: the sum of phi(lam (X_i - m)) - lam^2 v / 2 is the
logarithm of a supermartingale, and its running maximum exceeds log(1 / alpha) with
probability alpha at most. The bound is tight as lam tends to 0.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from verification.claim import Check, Setting, bound, pathwise
from verification.statistics import decide, influence

SOURCE = "Catoni 2012; Ville 1939; Wang & Ramdas 2023"
WHY_DOUBLE = "the test runs in float64 whatever its samples are"


def _phi(x: float) -> float:
    return float(influence(torch.tensor([x], dtype=torch.float64)))


def _normal_mean(lam: float) -> float:
    def density(x: float) -> float:
        return math.exp(_phi(lam * x) - x * x / 2) / math.sqrt(2 * math.pi)

    return sum(integrate.quad(density, *ends, epsabs=1e-9)[0] for ends in ((-12, 0), (0, 12)))


def _exponential_mean(lam: float) -> float:
    def density(x: float) -> float:
        return math.exp(_phi(lam * (x - 1)) - x)

    return sum(integrate.quad(density, *ends, epsabs=1e-9)[0] for ends in ((0, 1), (1, 60)))


def _evidence(samples: Tensor) -> list[float]:
    """By numpy, from the definition: against the claim, against too low, against too high."""
    x, tolerance, variance = samples.numpy() - 0.1, 0.3, 1.4
    lam = tolerance / variance

    def walk(y: np.ndarray) -> float:
        phi = np.sign(y) * np.log(1 + np.abs(y) + y * y / 2)
        return max(0.0, float(np.cumsum(phi - lam * lam * variance / 2).max()))

    either = max(walk(lam * x), walk(-lam * x))
    return [either, walk(lam * (x + tolerance)), walk(-lam * (x - tolerance))]


def checks(setting: Setting) -> Iterator[Check]:
    """The test's evidence, and the inequality that it rests on."""
    jump = math.sqrt(0.998 / 0.002)
    two_point = ((jump, 0.002), (-1 / jump, 0.998))
    grown, paid = [], []
    for lam in (-0.8, -0.05, 0.05, 0.3, 1.1):
        grown += [_normal_mean(lam), _exponential_mean(lam)]
        grown.append(sum(p * math.exp(_phi(lam * x)) for x, p in two_point))
        paid += [1 + lam**2 / 2] * 3
    yield bound("E exp(phi(lam X)) of three laws", grown, paid)
    tight = (_normal_mean(0.02) - 1) / (0.02**2 / 2)
    yield bound("(E exp(phi(lam X)) - 1) / (lam^2 / 2) as lam tends to 0 is 1", [0.99], [tight])
    samples = torch.randn(50, generator=setting.generator("evidence"), dtype=torch.float64)
    decision = decide([samples], 0.1, tolerance=0.3, variance=1.4, false_fail=1e-9)
    yield pathwise(
        "evidence, against the running maxima", decision.log_evidence, _evidence(samples)
    )


MISTAKES = """
verification.statistics.influence
    square root for logarithm | torch.log1p( => torch.sqrt(
    influence halved | return x => return 0.5 * x
    x^2 for x^2 / 2 | 0.5 * x => 1.0 * x
    sign lost | `x.sign() * ` => ``
verification.statistics.decide
    half of the variance | 0.5 * lam**2 => 0.25 * lam**2
    last value for the maximum | walk.amax(1) => walk[:, -1]
    one edge for both | (x - tolerance) => (x + tolerance)
shared
    variance not paid for
"""
