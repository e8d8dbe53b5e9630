"""Standard errors of means, plain and weighted.

The squared standard error s^2 / n of n samples has the mean Var / n, which is the variance of their
mean. With importance weights w it is sum w^2 (f - m)^2, and n times that of samples in the law's own
proportions is the limit of n Var(sum w f / sum w). A sum over the nodes of a quadrature rule has none.
"""

from collections.abc import Iterator

import numpy as np

from ctrl import Estimate
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import discrete_law as law

SOURCE = "Owen, Monte Carlo theory, methods and examples, sections 2.3 and 9.2, equation 9.8"


def checks(setting: Setting) -> Iterator[Check]:
    """All samples of three; samples in exact proportions; a rule."""
    samples, probabilities = law.tuples(3)
    each = [Estimate.of(setting.tensor(sample)) for sample in samples]
    squares = np.array([estimate.standard_error**2 for estimate in each])
    yield expectation("mean of s^2 / n", probabilities @ squares, law.variance() / 3)

    n = 1000
    counts = np.rint(n * law.SAMPLED).astype(int)
    weights = setting.tensor(np.repeat(law.TARGET / law.SAMPLED / n, counts))
    values = setting.tensor(np.repeat(law.VALUES, counts))
    weighted = Estimate.of(values, importance_weights=weights)
    yield expectation("weighted mean", weighted.mean, float(law.TARGET @ law.VALUES))
    coarse, fine = (k * law.variance_of_weighted_mean(k) for k in (40, 80))
    yield limit("n times its squared error", n * weighted.standard_error**2, 2 * fine - coarse)

    rule = Estimate.of(setting.tensor(law.VALUES), quadrature_weights=setting.tensor(law.TARGET))
    yield expectation("error of a rule", rule.standard_error, 0.0, 1.0)


MISTAKES = """
ctrl.estimate.Estimate.of
    n for n - 1 | sample.std() => sample.std(correction=0)
    standard deviation for the error | sample.std().item() / math.sqrt(len(sample)) => sample.std().item()
    error of a weighted mean about 0 | sample - mean => sample
    roots of the weights | (weights * (sample - mean)).norm() => (weights.sqrt() * (sample - mean)).norm()
    weights missing in the mean | mean = (weights * sample).sum() => mean = sample.mean()
    a rule taken for random samples | error = 0.0 => error = error
"""
