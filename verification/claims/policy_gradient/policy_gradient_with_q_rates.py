"""Theorem 4.1 by q-rates, and pathwise by their derivative in the action.

grad V(0, x) = E int e^{-discount t} grad log pi(a_t) (q - temperature log pi) dt
= E int e^{-discount t} (d a / d theta)' grad_a (q - temperature log pi) dt
with q = L^a V + r - discount V. On a grid both sums are, for any value function, moments
of the states times Stein's identities, exactly; with V of the continuous-time problem they
tend to its gradient, and are biased by O(h) before.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import complex_steps
from verification.closed_form import lq_policies as exact
from verification.closed_form.lq_chain import THETA
from verification.problems import exploratory_lq as lq
from verification.problems.exploratory_lq import P, gradient

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Theorem 4.1; Jia & Zhou 2022, policy gradient and '
    "actor-critic, Theorem 2"
)


def checks(setting: Setting) -> Iterator[Check]:
    """q-rates and their derivative in the action, on a grid and in the limit."""
    theta = lq.parameters(setting, THETA)
    stated, chosen = lq.problem(P), lq.policy(*theta)
    value = lq.continuous_value(setting, P, THETA)

    def by_ratio(nodes: np.ndarray) -> Tensor:
        paths = lq.drawn_paths(setting, P, theta, nodes)
        each = pg.q_rate_gradient(stated, chosen, value, paths)
        return gradient(each, paths, theta)

    stein = exact.q_gradient(P, lq.NODES, exact.continuous_value(P, THETA, lq.HORIZON), THETA)
    yield expectation("q-rates on a grid, against Stein's identities", by_ratio(lq.NODES), stein)
    paths = lq.drawn_paths(setting, P, theta, lq.NODES)
    by_path = gradient(pg.pathwise_gradient(stated, chosen, value, paths), paths, theta)
    yield expectation("pathwise form on a grid, against Stein's identities", by_path, stein)
    true = complex_steps.gradient(lambda th: exact.initial_value(P, th, lq.HORIZON), THETA)
    finer = [by_ratio(np.linspace(0, lq.HORIZON, steps + 1)) for steps in (1, 2, 3)]
    yield limit("q-rates, steps to 0: the continuous gradient", lq.to_zero(*finer), true)


MISTAKES = """
ctrl.policy_gradient.pathwise_gradient
    entropy dropped in the pathwise form | if problem.temperature: => if False:
ctrl.paths.over_steps
    value of step i + 1 for i | paths.grid.nodes[..., :-1] => paths.grid.nodes[..., 1:]
ctrl.policy_gradient.DrawnActions.advantages
    dt missing | return rates * as_like(paths.grid.steps, rates) => return rates
ctrl.policy_gradient._reparametrised
    noise of the action not held in the pathwise form | return policy.act(mean, t, noise, x)
        => return mean + 0 * policy.act(mean, t, noise, x)
ctrl.value._columns
    diffusion of an average action, so that q is linear in the action | sde.diffusion_at(t, states, actions)
        => sde.diffusion_at(t, states, actions.mean(0).expand_as(actions))
shared
    entropy's sign, in regularised_q
    entropy dropped
    sign of the score
    score halved
    second-order term of q missing
    second-order term of q without 1/2
    states at the right end of a step
    running reward left out of q
    outer discount missing
"""
