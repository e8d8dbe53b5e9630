"""Theorem 3.1: the KL between the path laws of two controlled SDEs, on a grid.

KL(P || P_ref) = 1/2 E int |u|^2 dt, u = (b - b_ref) / sigma, under P; and on every path
log dP/dP_ref = int u . dW + 1/2 int |u|^2 dt, the ratio of the transition densities.
Both forms have the KL as their mean, and on a path they differ: by int u . dW, of variance
2 KL. The roles of P and P_ref cannot be exchanged.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from verification.claim import Check, Setting, array, expectation, pathwise
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.closed_form.gaussian_law import kl, log_density
from verification.cubature import gaussian_start, mean, point_start
from verification.problems import NODES, grid, ornstein_uhlenbeck

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 3.1; Karatzas & Shreve 3.5.1'

P = closed.OrnsteinUhlenbeck()


def sampled_policy(policy: ctrl.Policy, reference: ctrl.Policy) -> ctrl.Policy:
    """The one whose law the expectation of the theorem is under."""
    return policy


def curved(setting: Setting) -> tuple[ctrl.ControlledSDE, ctrl.Paths]:
    """Two coordinates, drift and diffusion not linear, both of them the state's functions."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a - 0.3 * x.sin(), lambda t, x: 0.5 + 0.2 * x.tanh())
    nodes = ctrl.TimeGrid(setting.tensor([0.0, 0.15, 0.6]))
    noise = ctrl.noise.gauss_hermite(nodes.steps, nodes=3, noise=(2,))
    problem, start = ctrl.ControlProblem(sde, 0.6), point_start(noise, [0.4, -0.9])
    return sde, ctrl.simulate(problem, CURVED, start, nodes, noise=noise)


CURVED = ctrl.DeterministicPolicy(lambda t, x: 0.8 - 1.1 * x.flip(1) + 0.6 * t)
CURVED_REFERENCE = ctrl.DeterministicPolicy(lambda t, x: -0.4 * x)


def curved_densities(states: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """log p / p_ref of every step [paths, steps] of ``curved``, from two normal densities."""
    each = []
    for k, h in enumerate(np.diff(nodes)):
        x, after = states[:, k], states[:, k + 1]
        own = 0.8 - 1.1 * x[:, ::-1] + 0.6 * nodes[k] - 0.3 * np.sin(x)
        other = -0.4 * x - 0.3 * np.sin(x)
        covariance = np.eye(2) * ((0.5 + 0.2 * np.tanh(x)) ** 2 * h)[:, None, :]
        one, ref = (
            log_density(after, x + h * own, covariance),
            log_density(after, x + h * other, covariance),
        )
        each.append(one - ref)
    return np.stack(each, axis=1)


def checks(setting: Setting) -> Iterator[Check]:
    """Theorem 3.1 on quadrature paths, and pathwise."""
    problem, policy, reference = ornstein_uhlenbeck(P)
    start, noise = gaussian_start(grid(setting), P.mean, P.std, nodes=4)
    sampler = sampled_policy(policy, reference)
    paths = ctrl.simulate(problem, sampler, start, grid(setting), noise=noise)
    exact = closed.euler_path_kl(P, np.array(NODES))
    yield expectation(
        "the KL by a recursion of moments, against that of the joint Gaussian laws",
        exact,
        kl(*closed.euler_laws(P, np.array(NODES))),
    )
    running = ctrl.girsanov.path_kl(problem.dynamics, policy, reference, paths)
    yield expectation(
        "running form: its mean, against the chain's KL",
        ctrl.Estimate.of(running, quadrature_weights=paths.weights).mean,
        exact,
    )
    ratio = ctrl.girsanov.log_ratio(problem.dynamics, policy, reference, paths)
    yield expectation("log-ratio: its mean, against the chain's KL", mean(ratio, paths), exact)
    yield expectation(
        "variance of what the two forms differ by, against 2 KL",
        mean((ratio - running).square(), paths),
        2 * exact,
    )
    densities = torch.zeros_like(ratio)
    for k, h in enumerate(grid(setting).steps.tolist()):
        x, after = paths.states[:, k, 0], paths.states[:, k + 1, 0]
        gap = after - x - h * (P.reference_shift - P.reference_pull * x)
        own = after - x - h * (P.shift - P.pull * x)
        densities = densities + (gap.square() - own.square()) / (2 * P.noise**2 * h)
    yield pathwise("log-ratio, against transition densities on every path", ratio, densities)

    sde, paths = curved(setting)
    ratio = ctrl.girsanov.log_ratio(sde, CURVED, CURVED_REFERENCE, paths)
    nodes = array(paths.grid.nodes)
    steps = curved_densities(array(paths.states), nodes)
    yield pathwise("log-ratio, coefficients not linear, on every path", ratio, steps.sum(1))
    euler = ctrl.EulerMaruyama()
    step_ratios = ctrl.transitions.log_ratio(sde, euler, CURVED, CURVED_REFERENCE, paths)
    yield pathwise("log-ratio of every transition, coefficients not linear", step_ratios, steps)
    running = ctrl.girsanov.path_kl(sde, CURVED, CURVED_REFERENCE, paths)
    chain = ctrl.transitions.transition_kl(sde, euler, CURVED, CURVED_REFERENCE, paths).sum(1)
    yield pathwise("running form, against the transitions' KLs on every path", running, chain)


MISTAKES = """
ctrl.sde.ControlledSDE.whiten
    diffusion ignored | shift / sigma.masked_fill(silent, 1) => shift
ctrl.girsanov.log_ratio
    increments of the reference's Brownian motion | ito_sum(u, brownian)
        => ito_sum(u, brownian + u * paths.grid.steps[:, None])
ctrl.girsanov.controls
    control of the wrong sign: log dP_ref/dP | sde.drift_at(t, x, a) - sde.drift_at(t, x, a_ref)
        => sde.drift_at(t, x, a_ref) - sde.drift_at(t, x, a)
verification.claims.girsanov.path_kl.sampled_policy
    roles exchanged: paths of the reference | return policy => return reference
ctrl.paths.time_integral
    last step missing | steps, rates)).sum(1) => steps, rates))[:, :-1].sum(1)
    step size missing | (rates * as_like(grid.steps, rates)) => rates
    step size squared | as_like(grid.steps, rates) => as_like(grid.steps, rates).square()
    mean over time for the integral | steps, rates)).sum(1) => steps, rates)).mean(1)
ctrl.estimate.Estimate.of
    sum over paths for their mean | (weights * sample).sum() => sample.sum()
verification.closed_form.ornstein_uhlenbeck.euler_path_kl
    variance of the state forgotten | ` + slope**2 * variance` => ``
ctrl.transitions.log_ratio
    shift of a transition not squared | (scale * z + 0.5 * shift) => (scale * z + 0.5)
shared
    factor 1/2 dropped
    KL off by 1 %
    diagonal noise not squared
    mean over coordinates for their sum
    sign of the stochastic integral
    Brownian motion of P taken for that of P_ref
    state at the right end of a step
    time at the right end of a step
    uneven grid treated as uniform
    transition's KL without 1/2
"""
