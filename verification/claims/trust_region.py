"""Theorem 4.4 of "Score as Action": how far the surrogate is from the performance, at most.

A Gaussian chain whose drift is shifted by a constant. The gap is found by production code on
quadrature paths, its closed form is known, and so is everything that the four bounds are made of.
Each bound is tested where it is an equality or nearly so: an inequality alone shows little.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from ctrl import trust_region as tr
from verification.claim import Check, Setting, bound, claim, expectation, limit, pathwise, wrong
from verification.closed_form import drift_shift
from verification.closed_form.drift_shift import DriftShift
from verification.cubature import gaussian_start, mean, point_start

Expected = Callable[[Tensor, Tensor], Tensor]
"""The reward's expectation under N(mean, variance)."""

NODES = np.array([0.0, 0.3, 0.5, 0.9])
HORIZON = 0.9
PULLED = DriftShift()
CURVATURE, FREQUENCY = 1.15, 2.5
# from a point and without a pull the mean moves as far as the divergence of the paths allows
FREE = DriftShift(pull=0.0, std=0.0)
# ... and here h is steepest at the mean
STEEP = replace(FREE, mean=np.pi / FREQUENCY - FREE.action * HORIZON)
SHIFTS = (0.05, 0.4, -0.9)


def quadratic(m: Tensor, variance: Tensor) -> Tensor:
    """Expectation of -curvature x^2 / 2 under N(m, variance)."""
    return -0.5 * CURVATURE * (m.square() + variance)


def cosine(m: Tensor, variance: Tensor) -> Tensor:
    """Expectation of cos(frequency x) under N(m, variance)."""
    return torch.cos(FREQUENCY * m) * torch.exp(-(FREQUENCY**2) * variance / 2)


def exponential(m: Tensor, variance: Tensor) -> Tensor:
    """Expectation of exp(0.7 x) under N(m, variance)."""
    return torch.exp(0.7 * m + 0.7**2 * variance / 2)


def shifted(p: DriftShift, shift: float) -> ctrl.DeterministicPolicy:
    """a = action + shift."""
    return ctrl.DeterministicPolicy(lambda t, x: torch.full_like(x, p.action + shift))


def gap_and_kl(
    setting: Setting, p: DriftShift, expected: Expected, shift: float, rule: int
) -> tuple[Tensor, Tensor]:
    """V' - L' by two performance differences, and K_t at every step, on quadrature paths."""

    def value(t: Tensor, x: Tensor) -> Tensor:
        left = HORIZON - t
        factor = torch.exp(-p.pull * left)
        offset, variance = p.action * left, p.noise**2 * left
        if p.pull:
            offset = p.action * (1 - factor) / p.pull
            variance = p.noise**2 * (1 - factor.square()) / (2 * p.pull)
        return expected(factor * x[:, 0] + offset, variance)

    problem = ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: a - p.pull * x, lambda t, x: p.noise),
        HORIZON,
        terminal_reward=lambda x: expected(x[:, 0], x.new_zeros(())),
    )
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    if p.std:
        start, noise = gaussian_start(grid, p.mean, p.std, rule)
    else:
        noise = ctrl.noise.gauss_hermite(grid.steps, nodes=rule)
        start = point_start(noise, [p.mean])
    old, new = shifted(p, 0.0), shifted(p, shift)
    here = ctrl.simulate(problem, old, start, grid, noise=noise)
    there = ctrl.simulate(problem, new, start, grid, noise=noise)
    assert here.actions is not None
    held = replace(here, actions=here.actions + shift)  # new actions at the old states
    whole = mean(pg.performance_difference(problem, value, new, there), there)
    surrogate = mean(pg.performance_difference(problem, value, new, held), held)
    u = ctrl.girsanov.controls(problem.dynamics, new, old, there)
    rates = mean(0.5 * u.square().sum(-1), there) * grid.steps
    return whole - surrogate, rates.cumsum(0) - rates


RIGHT_END = wrong(
    "states at the right end of a step",
    "ctrl.paths.over_steps",
    "paths.states[:, :-1]",
    "paths.states[:, 1:]",
)
TIME_SLOPE = wrong(
    "derivative of V in time missing",
    "ctrl.value.transport",
    "torch.ones_like(t)",
    "torch.zeros_like(t)",
)
SIGMA = wrong(
    "control not in units of the noise",
    "ctrl.girsanov.controls",
    "sde.whiten(t, x, shift, a)",
    "shift",
)
INTEGRAL = wrong(
    "mean over time for the integral", "ctrl.trust_region._integral", ".sum(-1)", ".mean(-1)"
)
EVEN = wrong(
    "uneven grid taken for an even one",
    "ctrl.trust_region._integral",
    "as_like(grid.steps, rates)",
    "as_like(grid.steps, rates).mean()",
)


@claim(
    statement="""
        For any reward, with h_t of Lipschitz constant L_t, Gaussian states of variance P_t under
        the old policy and K_t = KL(P'_[0,t] || P_[0,t]):
            |V' - L(pi')| <= int L_t W1(p'_t, p_t) dt               (equality for shifts, linear h)
                          <= int L_t sqrt(2 P_t K_t) dt             (equality from a point, no pull)
            |V' - L(pi')| <= int sqrt(Var_{p_t} h_t chi^2(p'_t || p_t)) dt
                                              (equality where h is affine in the likelihood ratio)
        All are of second order in the change of the policy. None of the constants can be smaller.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.4; Talagrand 1996',
    wrongs=[
        RIGHT_END,
        TIME_SLOPE,
        SIGMA,
        INTEGRAL,
        EVEN,
        wrong(
            "transport bound halved",
            "ctrl.trust_region.transport",
            "(lipschitz * (",
            "(0.5 * lipschitz * (",
        ),
        wrong(
            "factor 2 of Talagrand's inequality dropped",
            "ctrl.trust_region.transport",
            "2 * largest_variance",
            "largest_variance",
        ),
        wrong(
            "standard deviation for variance",
            "ctrl.trust_region.transport",
            "2 * largest_variance",
            "2 * largest_variance.sqrt()",
        ),
        wrong(
            "divergence for its root",
            "ctrl.trust_region.transport",
            "(2 * largest_variance * path_kl).sqrt()",
            "(2 * largest_variance).sqrt() * path_kl",
        ),
        wrong(
            "Wasserstein bound halved",
            "ctrl.trust_region.wasserstein",
            "lipschitz * distance",
            "0.5 * lipschitz * distance",
        ),
        wrong(
            "Wasserstein distance squared",
            "ctrl.trust_region.wasserstein",
            "lipschitz * distance",
            "lipschitz * distance.square()",
        ),
        wrong(
            "chi-square bound halved",
            "ctrl.trust_region.chi_square",
            "(variance * chi2)",
            "(0.25 * variance * chi2)",
        ),
        wrong(
            "root of the variance alone",
            "ctrl.trust_region.chi_square",
            "(variance * chi2).sqrt()",
            "variance.sqrt() * chi2",
        ),
        wrong(
            "chi-square of Gaussians with 1/2 in the exponent",
            "verification.closed_form.drift_shift.shift_chi2",
            "mean_shift**2 / variance",
            "mean_shift**2 / (2 * variance)",
        ),
        wrong(
            "K_t of the step before",
            "verification.claims.trust_region.gap_and_kl",
            "rates.cumsum(0) - rates",
            "(rates.cumsum(0) - rates).roll(1)",
        ),
    ],
)
def trust_region(setting: Setting) -> Iterator[Check]:
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


@claim(
    statement="""
        For bounded h_t: |V' - L(pi')| <= int (sup h_t - inf h_t) sqrt(K_t / 2) dt (Pinsker), here
        for a reward cos(w x). It is of second order. Half of it is less than the gap of a steep
        cosine. The oscillation counts, up to twice sup |h|; for a shift c of the score and
        |grad V| <= G it makes |gap| <= 4/3 G sqrt(B) K_T with B = int g^2 dt, the form
        "performance >= surrogate - C KL" of trust region methods. For a quadratic reward h is
        unbounded and the bound says nothing.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.4',
    wrongs=[
        RIGHT_END,
        TIME_SLOPE,
        SIGMA,
        INTEGRAL,
        EVEN,
        wrong(
            "bound halved",
            "ctrl.trust_region.bounded",
            "(oscillation * (",
            "(0.5 * oscillation * (",
        ),
        wrong(
            "sup |h| for the oscillation",
            "verification.closed_form.drift_shift.cosine_oscillation",
            "return 2 * ",
            "return ",
        ),
        wrong(
            "2 for 1/2 in Pinsker's inequality",
            "ctrl.trust_region.bounded",
            "path_kl / 2",
            "path_kl * 2",
        ),
        wrong(
            "1/2 inside for 1/2 outside the root",
            "ctrl.trust_region.bounded",
            "(path_kl / 2).sqrt()",
            "path_kl.sqrt() / 2",
        ),
        wrong(
            "divergence for its root",
            "ctrl.trust_region.bounded",
            "(path_kl / 2).sqrt()",
            "path_kl / 2",
        ),
        wrong(
            "K_t of the whole horizon",
            "verification.claims.trust_region.gap_and_kl",
            "rates.cumsum(0) - rates",
            "rates.sum(0).expand_as(rates)",
        ),
    ],
)
def trust_region_of_bounded_rewards(setting: Setting) -> Iterator[Check]:
    """A cosine reward."""
    grid = ctrl.TimeGrid(setting.tensor(NODES))

    def both(p: DriftShift, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        gap, kl = gap_and_kl(setting, p, cosine, shift, rule=10 if p.std else 8)
        size = drift_shift.cosine_oscillation(p, FREQUENCY, shift, NODES)
        return gap, kl, tr.bounded(setting.tensor(size), kl, grid)

    gap, kl, most = both(PULLED, 0.4)
    exact = drift_shift.cosine_gap(PULLED, FREQUENCY, 0.4, NODES)
    yield expectation("gap of a cosine, against its closed form", gap, exact)
    exact_kl = drift_shift.path_kl(PULLED, 0.4, NODES)
    yield expectation("K_t, against its closed form", kl, exact_kl)
    yield expectation(
        "the bound, against its closed form",
        most,
        drift_shift.pinsker(PULLED, FREQUENCY, 0.4, NODES),
    )
    steep, _, nearly = both(STEEP, 0.1)
    gaps, bounds = torch.stack([gap, steep]), torch.stack([most, nearly])
    yield bound("a cosine, pulled back, and where it is steepest", gaps.abs() / bounds, [1.0, 1.0])
    yield expectation("twice the shift, four times the bound", both(STEEP, 0.2)[2], 4 * nearly)
    # h = +-G g^2 c at worst, g = 0.6, on finer and finer grids
    gain, size, shift = 0.75, 0.6**2, 0.4
    levels = []
    for steps in (512, 1024):
        fine = ctrl.uniform_grid(HORIZON, steps, dtype=setting.dtype, device=setting.device)
        kl = shift**2 * size * fine.nodes[:-1] / 2
        levels.append(tr.bounded(torch.full_like(kl, 2 * gain * size * shift), kl, fine))
    B = size * HORIZON
    constant = 4 / 3 * gain * np.sqrt(B) * (shift**2 * B / 2)
    yield limit("4/3 G sqrt(B) K_T", 2 * levels[1] - levels[0], constant)


@claim(
    statement="""
        The clipped surrogate is min(ratio A, clip(ratio) A) with the clip on the log-ratio: where
        the advantage is positive the ratio is cut from above only, where it is negative from below
        only, and where it is cut the gradient is 0. At equal policies it is A, and its
        gradient that of log-ratio times A. The penalised surrogate is ratio A - penalty sqrt(KL),
        the root taken state by state, with a finite slope at equal policies.
        """,
    source="Schulman et al. 2017, proximal policy optimisation, equation 7; Zhao, Tang & Yao 2023, "
    "policy optimisation in continuous time, section 4",
    wrongs=[
        wrong(
            "max for min",
            "ctrl.trust_region.clipped_surrogate",
            "return torch.minimum(",
            "return torch.maximum(",
        ),
        wrong(
            "clip sides swapped for negative advantage",
            "ctrl.trust_region.clipped_surrogate",
            "return torch.minimum(ratio * advantage, trusted * advantage)",
            "return torch.minimum(ratio, half_width.exp()) * advantage",
        ),
        wrong(
            "clipped on both sides, without the minimum",
            "ctrl.trust_region.clipped_surrogate",
            "return torch.minimum(ratio * advantage, trusted * advantage)",
            "return trusted * advantage",
        ),
        wrong(
            "never clipped from below",
            "ctrl.trust_region.clipped_surrogate",
            "torch.maximum(log_ratio, -half_width)",
            "log_ratio",
        ),
        wrong(
            "ratio clipped instead of its logarithm",
            "ctrl.trust_region.clipped_surrogate",
            "torch.minimum(torch.maximum(log_ratio, -half_width), half_width).exp()",
            "torch.minimum(torch.maximum(ratio, 1 - half_width), 1 + half_width)",
        ),
        wrong(
            "log-ratio for the ratio",
            "ctrl.trust_region.clipped_surrogate",
            "ratio = log_ratio.exp()",
            "ratio = 1 + log_ratio",
        ),
        wrong(
            "one width for all rows",
            "ctrl.trust_region.clipped_surrogate",
            "-half_width), half_width)",
            "-half_width), half_width.mean())",
        ),
        wrong(
            "divergence for its root",
            "ctrl.trust_region.penalised_surrogate",
            "kl.clamp_min(tiny).sqrt()",
            "kl",
        ),
        wrong(
            "root of the mean divergence",
            "ctrl.trust_region.penalised_surrogate",
            "kl.clamp_min(tiny).sqrt()",
            "kl.mean().clamp_min(tiny).sqrt()",
        ),
        wrong(
            "penalty's sign",
            "ctrl.trust_region.penalised_surrogate",
            "advantage - penalty",
            "advantage + penalty",
        ),
        wrong(
            "infinite slope at equal policies",
            "ctrl.trust_region.penalised_surrogate",
            "kl.clamp_min(tiny).sqrt()",
            "kl.sqrt()",
        ),
    ],
)
def clipped_and_penalised_surrogates(setting: Setting) -> Iterator[Check]:
    """Values and slopes, row by row, on a table of ratios, advantages of both signs and widths."""
    table = np.array(
        [
            (ratio, advantage, width)
            for ratio in (-0.9, -0.23, -0.07, 0.0, 0.08, 0.27, 1.1)
            for advantage in (-1.7, -0.4, 0.6, 2.3)
            for width in (0.17, 0.31)
        ]
    )
    log_ratio, advantage, width = (setting.tensor(column) for column in table.T)
    log_ratio.requires_grad_()
    clipped_value = tr.clipped_surrogate(log_ratio, advantage, width)
    (slope,) = torch.autograd.grad(clipped_value.sum(), log_ratio)
    exact, exact_slope = clipped(*table.T)
    yield pathwise("clipped surrogate", clipped_value, exact)
    yield pathwise("its slope in the log-ratio", slope, exact_slope)
    kl = setting.tensor(0.01 + table[:, 2] ** 2 * table[:, 1] ** 2)
    penalised_value = tr.penalised_surrogate(log_ratio, advantage, kl, 0.65)
    exact = np.exp(table[:, 0]) * table[:, 1] - 0.65 * np.hypot(0.1, table[:, 2] * table[:, 1])
    yield pathwise("penalised surrogate", penalised_value, exact)
    equal = setting.tensor(np.zeros(len(table))).requires_grad_()
    at_equality = tr.penalised_surrogate(equal, advantage, equal.square(), 0.65)
    (slope,) = torch.autograd.grad(at_equality.sum(), equal)
    yield pathwise("slope of the penalised surrogate at equal policies", slope, table[:, 1])


def clipped(
    log_ratio: np.ndarray, advantage: np.ndarray, width: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The surrogate case by case, and its slope."""
    up, down = advantage > 0, advantage < 0
    cut = (up & (log_ratio > width)) | (down & (log_ratio < -width))
    edge = np.where(up, width, -width)
    value = np.exp(np.where(cut, edge, log_ratio)) * advantage
    return value, np.where(cut, 0.0, value)
