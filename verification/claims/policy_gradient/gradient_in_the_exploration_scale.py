"""Theorem 4.1 for the exploration's scale: the gradient in the covariance.

With a terminal reward only, a drift affine in the action and a diffusion without it,
E[(z^2 - 1) q] = 0: in continuous time the performance has no gradient in the spread of the
actions. On a grid it has one, of O(h), from actions held over steps, which the estimators
find exactly. It is not so in general: where the action moves the diffusion, the gradient in
the spread stays.

In continuous time it depends on it only through what is paid or charged for it: with a terminal
reward, a drift affine in the action and an uncontrolled diffusion it does not, because q is linear in the
action. On a grid actions are held over a step, which adds O(h).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import complex_steps, lq_chain
from verification.closed_form import lq_policies as closed
from verification.closed_form.lq_chain import THETA, LQChain
from verification.cubature import mean
from verification.problems import exploratory_lq as lq

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 4.1, for the covariance of the policy'

PAID = replace(LQChain(), state_cost=0.0, action_cost=0.0, temperature=0.0)  # at the horizon only
PLAIN = replace(PAID, noise_slope=0.0, noise_push=0.0)
CONTROLLED = PAID  # the action moves the diffusion too


def _slope(each: Tensor, paths: ctrl.Paths, log_std: Tensor) -> Tensor:
    return torch.autograd.grad(mean(each, paths), log_std)[0]


def checks(setting: Setting) -> Iterator[Check]:
    """Returns, temporal differences and q-rates, differentiated in log s."""
    theta = lq.parameters(setting, THETA)
    policy, log_std = lq.policy(*theta), theta[2]

    def by_return(nodes: np.ndarray) -> Tensor:
        paths = lq.drawn_paths(setting, PLAIN, theta, nodes)
        return _slope(pg.return_gradient(lq.problem(PLAIN), policy, paths), paths, log_std)

    def by_difference(nodes: np.ndarray) -> Tensor:
        paths = lq.drawn_paths(setting, PLAIN, theta, nodes)
        value = lq.chain_value(setting, PLAIN, THETA, nodes)
        each = pg.temporal_difference_gradient(lq.problem(PLAIN), policy, value, paths)
        return _slope(each, paths, log_std)

    def by_rates(p: LQChain, nodes: np.ndarray) -> Tensor:
        paths = lq.drawn_paths(setting, p, theta, nodes)
        value = lq.continuous_value(setting, p, THETA)
        return _slope(pg.q_rate_gradient(lq.problem(p), policy, value, paths), paths, log_std)

    exact = complex_steps.gradient(lambda th: closed.performance(PLAIN, th, lq.NODES), THETA)
    yield expectation("return: what held actions add on a grid", by_return(lq.NODES), exact[2])
    difference_slope = by_difference(lq.NODES)
    yield expectation("temporal difference: the same", difference_slope, exact[2])
    scale = abs(exact[0])
    yield expectation("q-rates: 0 on a grid", by_rates(PLAIN, lq.NODES), 0.0, scale=scale)
    grids = [np.linspace(0, lq.HORIZON, steps + 1) for steps in (1, 2, 3)]
    per_step = [by_difference(nodes) / nodes[1] for nodes in grids]
    first_order = lq_chain.held_action_slope(PLAIN, THETA, lq.HORIZON)
    yield limit(
        "gradient by h, steps to 0: not 0, nor infinite", lq.to_zero(*per_step), first_order
    )
    true = closed.continuous_value(CONTROLLED, THETA, lq.HORIZON)
    stays = closed.q_gradient(CONTROLLED, lq.NODES, true, THETA)[2]
    rates_slope = by_rates(CONTROLLED, lq.NODES)
    yield expectation("q-rates where the action moves the diffusion: not 0", rates_slope, stays)


MISTAKES = """
ctrl.policy_gradient.DrawnActions.log_prob
    normalisation of the density left out | return _log_probs(policy, paths)
        => return _log_probs(policy, paths) + policy.std_at(paths.grid.nodes[0]).log()
ctrl.noise_sources.Prescribed.for_action
    actions wider than their density | return self.noise.actions[:, k] => return 1.1 * self.noise.actions[:, k]
ctrl.solvers.EulerMaruyama.step_into
    mean actions move the states | sde.drift_at(t, states, action)
        => sde.drift_at(t, states, action.mean(0).expand_as(action))
    sqrt(h) for h | alpha=float(t1 - t0) => alpha=float(t1 - t0) ** 0.5
ctrl.value._columns
    diffusion without the action | sde.diffusion_at(t, states, actions) => sde.diffusion_at(t, states, 0 * actions)
verification.problems.exploratory_lq.problem
    a drift that is quadratic in the action | + p.push * a, => + p.push * a + 0.1 * a.square(),
shared
    chain rule of log s missing
    second-order term of q missing
    second-order term of q without 1/2
"""
