"""Theorem 4.1 in view B: transitions as decisions, all estimators on a chain.

Where the next state is the decision (view B), the gradient of the deterministic policy's
chain is E sum e^{-discount t} (grad log p(X_{k+1}|X_k) A_k + h grad_a r d mu / d theta),
with A the return to go, the temporal difference, or (in the limit) grad V . (X_{k+1} -
E X_{k+1}): a running reward of the action itself has a slope of its own, whatever the next
state is.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import ctrl
from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, expectation
from verification.closed_form import complex_steps, lq_policies
from verification.closed_form.lq_chain import THETA
from verification.problems import exploratory_lq as lq
from verification.problems.exploratory_lq import P, gradient

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Theorem 4.1, with the decisions of its algorithm '
    "(the transitions of DDPO)"
)

# view B: the next state is decided, so the action's std has no part
TRANSITIONS = replace(P, noise_slope=0.0, noise_push=0.0, temperature=0.0)
SILENT = np.array([THETA[0], THETA[1], -40.0])  # a std of 4e-18 is none


def checks(setting: Setting) -> Iterator[Check]:
    """All estimators of view B, on a chain of three steps."""
    p, theta = TRANSITIONS, lq.parameters(setting, THETA)[:2]
    stated, chosen = lq.problem(p), lq.deterministic(*theta)
    value = lq.chain_value(setting, p, SILENT, lq.NODES)
    paths, view = lq.silent_paths(setting, p, theta, lq.NODES), pg.Transitions(ctrl.EulerMaruyama())
    exact = complex_steps.gradient(lambda th: lq_policies.performance(p, th, lq.NODES), SILENT)[:2]
    each = pg.return_gradient(stated, chosen, paths, decisions=view)
    yield expectation("return", gradient(each, paths, theta), exact)
    each = pg.return_gradient(stated, chosen, paths, value, view)
    yield expectation("return less V", gradient(each, paths, theta), exact)
    each = pg.temporal_difference_gradient(stated, chosen, value, paths, view)
    yield expectation("temporal difference", gradient(each, paths, theta), exact)
    smooth = lq.continuous_value(setting, p, SILENT)
    true = lq_policies.continuous_value(p, SILENT, lq.HORIZON)
    each = pg.q_rate_gradient(stated, chosen, smooth, paths, view)
    slopes = lq_policies.q_gradient(p, lq.NODES, true, SILENT)[:2]
    yield expectation("q-rates on a grid", gradient(each, paths, theta), slopes)


MISTAKES = """
ctrl.transitions._laws
    transition of the step after | in enumerate(paths.states[:, :-1] => in enumerate(paths.states[:, 1:]
ctrl.solvers.EulerMaruyama.transition
    sqrt(h) missing in the transition | sigma.abs() * math.sqrt(h) => sigma.abs()
ctrl.policy_gradient._summed
    last transition left out | (log_prob * advantages.detach() + held)).sum(1)
        => (log_prob * advantages.detach() + held))[:, :-1].sum(1)
    the action's own slope dropped | + held => ``
    the action's own slope not discounted | discount_factors(problem, paths) * (log_prob * advantages.detach() + held)
        => discount_factors(problem, paths) * log_prob * advantages.detach() + held
ctrl.policy_gradient.Transitions.advantages
    slope of V at the next state | _directional(value, t, x, surprise)
        => _directional(value, t, paths.states[:, k + 1], surprise)
    increment not centred, and V at the next time | _directional(value, t, x, surprise)
        => _directional(value, nodes[k + 1].to(x), x, surprise)
    surprise of twice the size | after[k] - mean => 2 * (after[k] - mean)
ctrl.policy_gradient.Transitions.held_rewards
    the action's own slope without dt | return rates * as_like(paths.grid.steps, rates) => return rates
    the action's own slope of a fixed action | reward(t, x, again) => reward(t, x, a)
shared
    sign of the score
    discount inside the return missing
    discount inside the temporal difference missing
    outer discount missing
    terminal reward missing
    dt missing in the reward
    value of step i for i + 1
    factor 1/2 of the normal density dropped
    transition's score divided by s for s^2
"""
