"""Theorem 4.4 of "Score as Action": how far the surrogate is from the performance, at most.

A Gaussian chain whose drift is shifted by a constant. The gap is found by production code on
quadrature paths, its closed form is known, and so is everything that the four bounds are made of.
Each bound is tested where it is an equality or nearly so: an inequality alone shows little.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from verification.claim import Setting
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
