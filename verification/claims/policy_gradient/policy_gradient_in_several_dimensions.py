"""Theorem 4.1 of "Score as Action" with vectors and time: what a single coordinate cannot show.

For states and actions in two dimensions, dependent coordinates of the action (covariance
L L'), noise that mixes and coefficients of time, all estimators have the exact gradient in
the matrix of gains, the offset and L. Log-densities are sums over coordinates: with their
mean, which published code uses, the gradient is divided by the dimension.

Dependent action coordinates, noise that mixes, drifts without symmetry: a transpose left out, or a
mean over coordinates where a log-density is a sum, changes the gradient here and nothing in 1-d.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, expectation
from verification.closed_form import complex_steps
from verification.closed_form import matrix_lq_chain as lq
from verification.closed_form.matrix_lq_chain import DIM, NODES, THETA
from verification.cubature import mean, point_start
from verification.problems.matrix_lq import (
    P,
    chain_value,
    drawn_paths,
    parameters,
    policy,
    problem,
    quadratic,
)

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Theorem 4.1; Jia & Zhou 2022, policy gradient and '
    "actor-critic, Theorem 2"
)

# view B: independent coordinates of noise, and no entropy
DIAGONAL = replace(P, noise=np.diag([0.5, 0.8]), temperature=0.0)
SILENT = np.concatenate([THETA[:6], 1e-18 * np.eye(DIM)[lq.LOWER]])


def row(gradients: tuple[Tensor, ...]) -> Tensor:
    """Gradients in K, k and the lower triangle of L, in one row."""
    gain, offset, *scale = gradients
    return torch.cat([gain.flatten(), offset, *(each[lq.LOWER] for each in scale)])


def checks(setting: Setting) -> Iterator[Check]:
    """Both views on two steps."""
    theta, true = parameters(setting), quadratic(setting, lq.value)
    drawn, stated, paths = policy(theta), problem(setting), drawn_paths(setting, theta)
    exact = complex_steps.gradient(lambda th: lq.performance(P, th, NODES), THETA)
    value = chain_value(setting)
    for name, each in (
        ("return", pg.return_gradient(stated, drawn, paths)),
        ("dV", pg.temporal_difference_gradient(stated, drawn, value, paths)),
    ):
        slope = row(torch.autograd.grad(mean(each, paths), theta))
        yield expectation(f"drawn action: {name}", slope, exact)
    stein = lq.q_rate_gradient(P, THETA, NODES)
    each = pg.pathwise_gradient(stated, drawn, true, paths)
    slope = row(torch.autograd.grad(mean(each, paths), theta))
    yield expectation("drawn action: pathwise form", slope, stein)
    each = pg.surrogate(stated, true, drawn, drawn, paths)
    slope = row(torch.autograd.grad(mean(each, paths), theta))
    yield expectation("drawn action: slope of the surrogate", slope, stein)
    each = pg.q_rate_gradient(stated, drawn, true, paths)
    slope = row(torch.autograd.grad(mean(each, paths), theta))
    yield expectation("drawn action: q-rates", slope, stein)
    stated, mean_action = problem(setting, DIAGONAL), ctrl.DeterministicPolicy(drawn.mean)
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3, noise=(DIM,))
    start = point_start(noise, list(P.start))
    paths = ctrl.simulate(stated, mean_action, start, grid, noise=noise)
    view, value = pg.Transitions(ctrl.EulerMaruyama()), chain_value(setting, DIAGONAL, SILENT)
    exact = complex_steps.gradient(lambda th: lq.performance(DIAGONAL, th, NODES), SILENT)[:6]
    for name, each in (
        ("return", pg.return_gradient(stated, mean_action, paths, decisions=view)),
        ("dV", pg.temporal_difference_gradient(stated, mean_action, value, paths, view)),
    ):
        slope = row(torch.autograd.grad(mean(each, paths), theta[:2]))
        yield expectation(f"next state: {name}", slope, exact)
    each = pg.q_rate_gradient(stated, mean_action, true, paths, view)
    slope = row(torch.autograd.grad(mean(each, paths), theta[:2]))
    stein = lq.q_rate_gradient(DIAGONAL, SILENT, NODES)[:6]
    yield expectation("next state: q-rates", slope, stein)


MISTAKES = r"""
ctrl.policy.MultivariateGaussianPolicy.distribution
    L for the covariance | scale_tril=self.scale_at(t, mean, states)
        => covariance_matrix=self.scale_at(t, mean).tril() + self.scale_at(t, mean).tril(-1).T
    coordinates of the action taken for independent | scale_tril=self.scale_at(t, mean, states)
        => scale_tril=self.scale_at(t, mean).diag().diag()
ctrl.policy.MultivariateGaussianPolicy.log_prob
    mean over coordinates of the action for the sum | return _log_prob(self.distribution(t, states), actions)
        => return _log_prob(self.distribution(t, states), actions) / actions.shape[1]
ctrl.policy.MultivariateGaussianPolicy.noise_of
    action's noise recovered with L' for L | torch.linalg.solve_triangular(scale, gap, upper=False)
        => torch.linalg.solve(scale.mT, gap)
ctrl.policy_gradient.pathwise_gradient
    mean over coordinates in the pathwise form | .sum(1)\n\n => .mean(1)\n\n
ctrl.policy_gradient.surrogate
    ratio held in the surrogate | ratio = (new - old.detach()).exp() => ratio = (new - old).exp()
ctrl.policy_gradient.Transitions.held_rewards
    the action's own slope dropped, of vectors | rates * as_like(paths.grid.steps, rates)
        => 0 * rates * as_like(paths.grid.steps, rates)
ctrl.transitions._laws
    first coordinate's standard deviation for all | yield mean, std.expand_as(mean)
        => yield mean, std[:, :1].expand_as(mean)
ctrl.policy_gradient.Transitions.advantages
    surprise of the first coordinate alone | surprise = after[k] - mean
        => surprise = torch.cat([after[k][:, :1] - mean[:, :1], 0 * mean[:, 1:]], 1)
shared
    scale transposed
    mean over coordinates of the state for the sum
    sigma transposed
    states at the right end of a step
"""
