"""Bias and standard errors of the estimated KL-reward frontier.

From n samples of a prompt E[J*(b)] is too low by b chi^2 / (2 n) + O(n^-2), chi^2 of the
tilt from P, where n / (1 + chi^2) is the effective number of samples; the jackknife takes
this out, and the terms in 1 / n of R and KL, and what stays is O(n^-2). The standard error
of J* is b chi / sqrt(n), the skewness of its influences that of the density ratio. Both
fall with the square root of the number of prompts, since prompts are fixed.
"""

from collections.abc import Iterator

import numpy as np
from scipy import stats

from verification.claim import Check, Setting, limit
from verification.closed_form import frontier as exact
from verification.closed_form.frontier import Binary
from verification.problems.frontier import frontier_of, numbers

SOURCE = "delta method; Quenouille 1956; Efron & Tibshirani 1993, equation 14.15"
WHY_DOUBLE = "the frontier is computed in float64, whatever its rewards come in"

COIN, PRICE = Binary(0.4), 1.2
SIZES = (24, 48)


def expected(setting: Setting, n: int) -> tuple[np.ndarray, np.ndarray]:
    """E[estimate - truth] and E[correction], over all numbers of ones in n samples of the coin."""
    bias, correction = np.zeros(3), np.zeros(3)
    for ones in range(n + 1):
        chance = stats.binom.pmf(ones, n, COIN.probability)
        if chance < 1e-7:
            continue
        rewards = (np.arange(n) < ones).astype(np.float64)
        got = np.array(numbers(frontier_of(setting, [rewards]).at_weight(PRICE)))
        bias += chance * (got - COIN.at(PRICE))
        correction += chance * (got - exact.of_samples(rewards, PRICE))
    return bias, correction


def checks(setting: Setting) -> Iterator[Check]:
    """Many prompts alike; and a coin's reward, over all outcomes."""
    chi_square = COIN.moment(PRICE, 2)
    n, prompts = 100, 60
    shifts = np.linspace(-3, 3, prompts)[:, None]  # of rewards, which change no weight
    drawn = (np.arange(n) < COIN.probability * n) + shifts
    point = frontier_of(setting, list(drawn), resamples=300).at_weight(PRICE)
    got = point.objective
    error = PRICE * np.sqrt(chi_square / n / prompts)
    yield limit("standard error of J*", got.standard_error, error)
    skewness = COIN.moment(PRICE, 3) / chi_square**1.5
    yield limit("acceleration of J*", 6 * got.acceleration * np.sqrt(n * prompts), skewness)

    size = 0.5 * PRICE * chi_square
    by_size = [n * np.array(expected(setting, n)) for n in SIZES]
    bias, correction = 2 * by_size[1] - by_size[0]  # of c / n + d / n^2 + ..., times n, leaves c
    for name, left in zip(("reward", "KL", "J*"), bias, strict=True):
        yield limit(f"n times the bias of {name}", left, 0.0, scale=size)
    yield limit("n times the correction of J*", correction[2], size)


MISTAKES = """
diffusion_envs.frontier.Frontier._interval
    no correction | n * value - (n - 1) * usual => value
    correction of the wrong sign | n * value - (n - 1) * usual => value + (n - 1) * (usual - value)
    half of the correction | n * value - (n - 1) * usual => value - 0.5 * (n - 1) * (usual - value)
    standard error of the mean of the resamples | float(errors.std()) => float(errors.std()) / len(errors) ** 0.5
    standard error of one prompt for that of all | keepdim=True))).mean(0) => keepdim=True)))[0]
    prompts that differ for an error | float(errors.std()) => float(value.std(correction=0))
    skewness of the other sign | usual - left_out => left_out - usual
    skewness not divided by 6 | skewness / 6 => skewness
diffusion_envs.frontier.Frontier._estimated
    sample left out, its place kept | self._tilted(mass - e, gain - each, n - 1, kl_weight)
        => self._tilted(mass - e, gain - each, n, kl_weight)
diffusion_envs.frontier._resampled
    samples themselves for resamples | (uniform * sizes[:, None]).long() => torch.arange(most).expand(shape).clone()
"""
