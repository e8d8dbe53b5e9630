"""Theorem 4.4 for unbounded rewards: transport, Wasserstein and chi-square bounds.

For any reward, with h_t of Lipschitz constant L_t, Gaussian states of variance P_t under
the old policy and K_t = KL(P'_[0,t] || P_[0,t]):
    |V' - L(pi')| <= int L_t W1(p'_t, p_t) dt               (equality for shifts, linear h)
                  <= int L_t sqrt(2 P_t K_t) dt             (equality from a point, no pull)
    |V' - L(pi')| <= int sqrt(Var_{p_t} h_t chi^2(p'_t || p_t)) dt
                                      (equality where h is affine in the likelihood ratio)
All are of second order in the change of the policy. None of the constants can be smaller.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import trust_region as tr
from verification.claim import Check, Setting, bound, expectation
from verification.closed_form import drift_shift
from verification.closed_form.drift_shift import DriftShift
from verification.problems.trust_region import (
    CURVATURE,
    FREE,
    NODES,
    PULLED,
    gap_and_kl,
)

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 4.4; Talagrand 1996'

SHIFTS = (0.05, 0.4, -0.9)


def quadratic(m: Tensor, variance: Tensor) -> Tensor:
    """Expectation of -curvature x^2 / 2 under N(m, variance)."""
    return -0.5 * CURVATURE * (m.square() + variance)


def exponential(m: Tensor, variance: Tensor) -> Tensor:
    """Expectation of exp(0.7 x) under N(m, variance)."""
    return torch.exp(0.7 * m + 0.7**2 * variance / 2)


def checks(setting: Setting) -> Iterator[Check]:
    """Unbounded rewards: transport, Wasserstein and chi-square."""
    grid = ctrl.TimeGrid(setting.tensor(NODES))

    def bounds(p: DriftShift, shift: float, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = drift_shift.quadratic_slope(p, CURVATURE, shift, NODES)
        old, variance = drift_shift.laws(p, 0.0, NODES)
        mean_shift = drift_shift.laws(p, shift, NODES)[0] - old
        L, P, W = (setting.tensor(each) for each in (np.abs(slope), variance, np.abs(mean_shift)))
        chi2 = setting.tensor(drift_shift.shift_chi2(mean_shift, np.maximum(variance, 1e-300)))
        return (
            tr.transport(L, P, kl, grid),
            tr.wasserstein(L, W, grid),
            tr.chi_square(L.square() * P, chi2, grid),
        )

    gap, kl = gap_and_kl(setting, FREE, quadratic, 0.4, rule=2)
    yield expectation("transport: equality from a point", bounds(FREE, 0.4, kl)[0], gap.abs())
    # frequency = shift / noise^2 makes h proportional to the likelihood ratio
    tilt = 0.7 * FREE.noise**2
    gap, _ = gap_and_kl(setting, FREE, exponential, tilt, rule=8)
    _, variance_of_reward = drift_shift.exponential_rate(FREE, 0.7, tilt, NODES, 0.0)
    old, variance = drift_shift.laws(FREE, 0.0, NODES)
    tilted_shift = drift_shift.laws(FREE, tilt, NODES)[0] - old
    chi2 = drift_shift.shift_chi2(tilted_shift, np.maximum(variance, 1e-300))
    exact_gap = drift_shift.exponential_gap(FREE, 0.7, tilt, NODES)
    yield expectation("gap of an exponential reward, against its closed form", gap, exact_gap)
    tight = tr.chi_square(setting.tensor(variance_of_reward), setting.tensor(chi2), grid)
    yield expectation("chi-square: equality for an exponential reward", tight, gap)

    reward_gaps, exact, each = [], [], []
    for shift in SHIFTS:
        gap, kl = gap_and_kl(setting, PULLED, quadratic, shift, rule=2)
        reward_gaps.append(gap)
        exact.append(drift_shift.quadratic_gap(PULLED, CURVATURE, shift, NODES))
        each.append(torch.stack(bounds(PULLED, shift, kl)))
    gaps, (transport, wasserstein, chi_square) = torch.stack(reward_gaps), torch.stack(each, dim=1)
    yield expectation("gap of a quadratic reward, against Gaussian moments", gaps, exact)
    second = torch.stack([g / s**2 for g, s in zip(reward_gaps, SHIFTS, strict=True)])
    yield expectation("gap by the squared shift: one number", second[1:], second[:1].expand(2))
    yield bound("transport", gaps.abs(), transport)
    yield bound("chi-square", gaps.abs(), chi_square)
    yield expectation("Wasserstein: equality for a linear h", wasserstein, gaps.abs())
    by_square = torch.stack([g / s**2 for g, s in zip(transport, SHIFTS, strict=True)])
    yield expectation("transport is of second order", by_square[1:], by_square[:1].expand(2))


MISTAKES = """
ctrl.trust_region.transport
    transport bound halved | (lipschitz * ( => (0.5 * lipschitz * (
    factor 2 of Talagrand's inequality dropped | 2 * largest_variance => largest_variance
    standard deviation for variance | 2 * largest_variance => 2 * largest_variance.sqrt()
    divergence for its root | (2 * largest_variance * path_kl).sqrt() => (2 * largest_variance).sqrt() * path_kl
ctrl.trust_region.wasserstein
    Wasserstein bound halved | lipschitz * distance => 0.5 * lipschitz * distance
    Wasserstein distance squared | lipschitz * distance => lipschitz * distance.square()
ctrl.trust_region.chi_square
    chi-square bound halved | (variance * chi2) => (0.25 * variance * chi2)
    root of the variance alone | (variance * chi2).sqrt() => variance.sqrt() * chi2
verification.closed_form.drift_shift.shift_chi2
    chi-square of Gaussians with 1/2 in the exponent | mean_shift**2 / variance => mean_shift**2 / (2 * variance)
verification.problems.trust_region.gap_and_kl
    K_t of the step before | rates.cumsum(0) - rates => (rates.cumsum(0) - rates).roll(1)
shared
    states at the right end of a step
    derivative of V in time missing
    control not in units of the noise
    mean over time for the integral
    uneven grid taken for an even one
"""
