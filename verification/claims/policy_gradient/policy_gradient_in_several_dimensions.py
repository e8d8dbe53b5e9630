"""Theorem 4.1 of "Score as Action" with vectors: what a single coordinate cannot show.

For states and actions in two dimensions, dependent coordinates of the action (covariance
L L') and noise that mixes, all estimators have the exact gradient in the matrix of gains,
the offset and L. Log-densities are sums over coordinates: with their mean, which published
code uses, the gradient is divided by the dimension.

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
from ctrl.value import Value
from verification.claim import Check, Setting, expectation
from verification.closed_form import matrix_lq_chain as lq
from verification.closed_form.matrix_lq_chain import DIM, THETA, MatrixLQ
from verification.cubature import mean, point_start

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Theorem 4.1; Jia & Zhou 2022, policy gradient and '
    "actor-critic, Theorem 2"
)

P = MatrixLQ()
NODES = np.array([0.0, 0.35, 0.9])
# view B: independent coordinates of noise, and no reward of the action itself
DIAGONAL = replace(P, noise=np.diag([0.5, 0.8]), action_cost=np.zeros((2, 2)), temperature=0.0)
SILENT = np.concatenate([THETA[:6], 1e-18 * np.eye(DIM)[lq.LOWER]])
CURVE, TILT = np.array([[-0.9, 0.3], [0.3, -0.5]]), np.array([0.4, -0.7])  # any value function


def problem(setting: Setting, p: MatrixLQ) -> ctrl.ControlProblem:
    """Dynamics and rewards; the noise is diagonal if its matrix is."""
    A, B, S, M, N, H = (
        setting.tensor(each)
        for each in (p.drift, p.push, p.noise, p.state_cost, p.action_cost, p.terminal_cost)
    )

    def form(x: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("pi,ij,pj->p", x, matrix, x)

    def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return x @ A.T + a @ B.T

    if np.count_nonzero(p.noise) == DIM:
        sde = ctrl.ControlledSDE(drift, lambda t, x: S.diagonal().expand_as(x))
    else:
        sde = ctrl.ControlledSDE(
            drift, lambda t, x: S.expand(len(x), DIM, DIM), noise="general", noise_dim=DIM
        )
    return ctrl.ControlProblem(
        sde,
        float(NODES[-1]),
        lambda t, x, a: -0.5 * (form(x, M) + form(a, N)),
        lambda x: -0.5 * form(x, H),
        p.discount,
        p.temperature,
    )


def chain_value(setting: Setting, p: MatrixLQ, theta: np.ndarray) -> Value:
    """V of the chain at its nodes."""
    rows = lq.chain_value(p, theta, NODES)
    times = setting.tensor(NODES)
    squares, linears, constants = (setting.tensor(np.array(c)) for c in zip(*rows, strict=True))

    def value(t: Tensor, x: Tensor) -> Tensor:
        k = (times - t).abs().argmin()
        return 0.5 * (x @ squares[k] * x).sum(1) + x @ linears[k] + constants[k]

    return value


def any_value(setting: Setting) -> Value:
    """A quadratic function that is the value of nothing."""
    curve, tilt = setting.tensor(CURVE), setting.tensor(TILT)
    return lambda t, x: (0.5 * (x @ curve * x).sum(1) + x @ tilt) + 0.3 * t


def parameters(setting: Setting) -> list[Tensor]:
    """K, k and L, to be differentiated."""
    return [setting.tensor(each).requires_grad_() for each in lq.unpack(THETA)]


def row(gradients: tuple[Tensor, ...]) -> Tensor:
    """Gradients in K, k and the lower triangle of L, in one row."""
    gain, offset, *scale = gradients
    return torch.cat([gain.flatten(), offset, *(each[lq.LOWER] for each in scale)])


def checks(setting: Setting) -> Iterator[Check]:
    """Both views on two steps."""
    grid, theta = ctrl.TimeGrid(setting.tensor(NODES)), parameters(setting)
    gain, offset, scale = theta

    def average(t: Tensor, x: Tensor) -> Tensor:
        return x @ gain.T + offset

    drawn = ctrl.MultivariateGaussianPolicy(average, lambda t: scale)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3, noise=(DIM,), action=(DIM,))
    stated, start = problem(setting, P), point_start(noise, list(P.start))
    paths = ctrl.simulate(stated, drawn, start, grid, noise=noise)
    exact = lq.gradient(lambda th: lq.performance(P, th, NODES), THETA)
    value = chain_value(setting, P, THETA)
    for name, each in (
        ("return", pg.return_gradient(stated, drawn, paths)),
        ("dV", pg.temporal_difference_gradient(stated, drawn, value, paths)),
    ):
        slope = row(torch.autograd.grad(mean(each, paths), theta))
        yield expectation(f"drawn action: {name}", slope, exact)
    stein = lq.q_rate_gradient(P, THETA, NODES, CURVE, TILT)
    for name, each in (
        ("q-rates", pg.q_rate_gradient(stated, drawn, any_value(setting), paths)),
        ("pathwise form", pg.pathwise_gradient(stated, drawn, any_value(setting), paths)),
    ):
        slope = row(torch.autograd.grad(mean(each, paths), theta))
        yield expectation(f"drawn action: {name}", slope, stein)
    stated, mean_action = problem(setting, DIAGONAL), ctrl.DeterministicPolicy(average)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3, noise=(DIM,))
    start = point_start(noise, list(P.start))
    paths = ctrl.simulate(stated, mean_action, start, grid, noise=noise)
    view, value = pg.Transitions(ctrl.EulerMaruyama()), chain_value(setting, DIAGONAL, SILENT)
    exact = lq.gradient(lambda th: lq.performance(DIAGONAL, th, NODES), SILENT)[:6]
    for name, each in (
        ("return", pg.return_gradient(stated, mean_action, paths, decisions=view)),
        ("dV", pg.temporal_difference_gradient(stated, mean_action, value, paths, view)),
    ):
        slope = row(torch.autograd.grad(mean(each, paths), theta[:2]))
        yield expectation(f"next state: {name}", slope, exact)
    each = pg.q_rate_gradient(stated, mean_action, any_value(setting), paths, view)
    slope = row(torch.autograd.grad(mean(each, paths), theta[:2]))
    stein = lq.q_rate_gradient(DIAGONAL, SILENT, NODES, CURVE, TILT)[:6]
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
"""
