"""Lemma 4.2 and Theorem 4.4 of "Score as Action" in two dimensions, with coefficients of time.

V' - V = E' int e^{-discount t} (q - temperature log pi') dt, and the surrogate L' - V is the
same with the old policy's states. Between policies whose mean actions differ by a constant
h_t = E_{a ~ pi'}[q - temperature log pi'] is linear in the state, so with g_t = grad h_t
    V' - L' = int e^{-discount t} g_t . (E' X_t - E X_t) dt,
which transport, Wasserstein and chi-square bound, where K_t = 1/2 int |S^{-1} B shift|^2.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from ctrl import trust_region as tr
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import matrix_lq_chain as lq
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.matrix_lq_chain import HORIZON, NODES, THETA
from verification.cubature import mean
from verification.problems.matrix_lq import (
    OTHER,
    P,
    along,
    drawn_paths,
    parameters,
    policy,
    problem,
    quadratic,
)

SOURCE = '"Score as Action", arXiv 2502.01819, Lemma 4.2 and Theorem 4.4'

SHIFT = np.array([0.17, 0.47])  # of the mean action, for the trust region
SHIFTED = np.concatenate([THETA[:4], THETA[4:6] + SHIFT, THETA[6:]])


def difference(setting: Setting, acting: np.ndarray) -> Tensor:
    """The performance difference along a chain of the new policy."""
    theta = parameters(setting, acting)
    paths, value = drawn_paths(setting, theta), quadratic(setting, lq.value)
    each = pg.performance_difference(problem(setting), value, policy(theta), paths)
    return mean(each, paths).detach()


def surrogate_by_hand(paths: ctrl.Paths) -> np.ndarray:
    """sum h e^{-discount t} ratio (q - temperature log pi') of every path, step by step."""
    total = np.zeros(len(paths.states))
    for _, t, h, x, a in along(paths):
        new, old = (lq.log_density(theta, x, a) for theta in (OTHER, THETA))
        rate = lq.q_rate(P, t, x, a) - P.temperature * new
        total += h * np.exp(-P.discount * t) * np.exp(new - old) * rate
    return total


def trust_region() -> tuple[float, np.ndarray, list[np.ndarray]]:
    """The gap, K_t, and |g|, |E'X - EX|, largest variance, Var h and chi^2 at every step."""
    gap, kl, kls, rows = 0.0, 0.0, list[float](), list[list[float]]()
    gain, _, _ = lq.unpack(THETA)
    old, new = (list(lq.moments(P, theta, NODES)) for theta in (THETA, SHIFTED))
    for (t, h, mean_old, second), (_, _, mean_new, _) in zip(old, new, strict=True):
        _, B, S, N = P.at(t)
        g = np.exp(-P.discount * t) * (lq.value(t).P @ B - gain.T @ N) @ SHIFT
        apart, covariance = mean_new - mean_old, second - np.outer(mean_old, mean_old)
        gap += h * g @ apart
        kls.append(kl)
        kl += h * np.sum(np.linalg.solve(S, B @ SHIFT) ** 2) / 2
        chi2 = np.expm1(apart @ np.linalg.pinv(covariance) @ apart)
        largest = np.linalg.eigvalsh(covariance)[-1]
        sizes = [np.linalg.norm(g), np.linalg.norm(apart), largest, g @ covariance @ g, chi2]
        rows.append([float(each) for each in sizes])
    return gap, np.array(kls), list(np.array(rows).T.clip(0))


def checks(setting: Setting) -> Iterator[Check]:
    """Grids against moments, limits against performances, bounds against the gap."""
    on_grid = difference(setting, OTHER)
    exact = lq.q_rate_sum(P, NODES, OTHER, OTHER)
    yield expectation("difference on a grid, against the states' moments", on_grid, exact)

    old, new = policy(parameters(setting)), policy(parameters(setting, OTHER))
    stated, value = problem(setting), quadratic(setting, lq.value)
    paths = drawn_paths(setting, parameters(setting))
    each = pg.surrogate(stated, value, old, new, paths)
    yield pathwise("surrogate, step by step on every path", each, surrogate_by_hand(paths))

    shifted = policy(parameters(setting, SHIFTED))
    assert paths.actions is not None
    held = replace(paths, actions=paths.actions + setting.tensor(SHIFT))
    there = drawn_paths(setting, parameters(setting, SHIFTED))
    whole = difference(setting, SHIFTED)
    at_old = mean(pg.performance_difference(stated, value, shifted, held), held)
    gap, kls, (slope, apart, largest, variance, chi2) = trust_region()
    yield expectation("gap of the surrogate, against the states' moments", whole - at_old, gap)
    means = [ctrl.DeterministicPolicy(each.mean) for each in (shifted, old)]
    u = ctrl.girsanov.controls(stated.dynamics, means[0], means[1], there)
    rates = 0.5 * mean(u.square().sum(-1), there) * there.grid.steps
    kl = rates.cumsum(0) - rates
    yield expectation("K_t, through noise that mixes", kl, kls)
    grid = there.grid
    assert isinstance(grid, ctrl.TimeGrid)
    g, far, wide, var, chi = (setting.tensor(e) for e in (slope, apart, largest, variance, chi2))
    limits = [tr.transport(g, wide, kl, grid), tr.wasserstein(g, far, grid)]
    limits.append(tr.chi_square(var, chi, grid))
    sizes = torch.stack(limits)
    yield bound("transport, Wasserstein, chi-square", abs(whole - at_old).expand(3), sizes)

    # as far as the grid is from steps of 0 the moments know exactly
    grids = [np.linspace(0, HORIZON, steps + 1) for steps in (16, 32, 64, 128, 256)]
    beyond = extrapolated([lq.q_rate_sum(P, nodes, OTHER, OTHER) for nodes in grids]) - exact
    true = lq.continuous_performance(P, OTHER) - float(lq.value(0.0)(np.array(P.start)))
    yield limit("steps to 0: the difference of performances", on_grid + beyond, true)


MISTAKES = """
ctrl.policy_gradient.performance_difference
    rates of a vector problem not discounted | (discount_factors(problem, new_paths) * rates
        => (rates
ctrl.policy_gradient.surrogate
    ratio of densities left out | * ratio * rates => * rates
    entropy of the old policy in the surrogate | _regularised_q(problem, value, new_policy
        => _regularised_q(problem, value, policy
ctrl.girsanov.controls
    drifts of one action | sde.whiten(t, x, shift, a) => sde.whiten(t, x, shift.flip(1), a)
shared
    derivative of V in time missing
    second-order term of q without 1/2
    entropy's sign, in regularised_q
    discount V left out of q
    running reward left out of q
    sigma' for its inverse
    scale transposed
    sigma transposed
    mean over time for the integral
    states at the right end of a step
"""
