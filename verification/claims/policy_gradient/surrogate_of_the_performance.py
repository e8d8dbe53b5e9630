"""Theorem 4.4's surrogate: its value, gap and slope.

The surrogate L(pi') - V = E int e^{-discount t} E_{a ~ pi'}[ q - temperature log pi' ] dt
keeps the states of the old policy; the new actions are the old ones, reweighted by
pi' / pi. What it misses is exactly the change of the state law,
    V' - L(pi') = int e^{-discount t} (E_{p'_t} h_t - E_{p_t} h_t) dt,
h_t(x) = E_{a ~ pi'}[ q - temperature log pi' ]; and its slope at pi' = pi is the policy
gradient, with the entropy's share.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, expectation
from verification.closed_form.lq_chain import THETA as OLD
from verification.closed_form.lq_policies import continuous_value, q_gradient, q_sum
from verification.cubature import mean
from verification.problems import exploratory_lq as lq
from verification.problems.exploratory_lq import P

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 4.4'

NEAR = np.array([0.3, 0.4, OLD[2]])  # of the old std: then the ratio is entire in the noise
SHORT = np.array([0.0, 0.35, 0.9])


def paths_of_old(setting: Setting, nodes: np.ndarray, rule: int = 3) -> ctrl.Paths:
    """Paths of the old policy."""
    return lq.drawn_paths(setting, P, lq.parameters(setting, OLD), nodes, rule)


def checks(setting: Setting) -> Iterator[Check]:
    """Value, gap and slope of the surrogate."""
    stated, value = lq.problem(P), lq.continuous_value(setting, P, OLD)
    theta = lq.parameters(setting, OLD)
    old, near = lq.policy(*theta), lq.policy(*lq.parameters(setting, NEAR))
    with torch.no_grad():
        paths = paths_of_old(setting, SHORT, rule=9)
        linearised = mean(pg.surrogate(stated, value, old, near, paths), paths)
        there = lq.drawn_paths(setting, P, lq.parameters(setting, NEAR), SHORT)
        whole = mean(pg.performance_difference(stated, value, near, there), there)
    true = continuous_value(P, OLD, lq.HORIZON)
    here = q_sum(P, SHORT, true, visiting=OLD, acting=NEAR)
    both_changed = q_sum(P, SHORT, true, visiting=NEAR, acting=NEAR)
    yield expectation("surrogate, against the old states' moments", linearised, here)
    yield expectation(
        "what it misses: the change of the state law", whole - linearised, both_changed - here
    )
    paths = paths_of_old(setting, lq.NODES)
    slope = torch.autograd.grad(mean(pg.surrogate(stated, value, old, old, paths), paths), theta)
    gradient = q_gradient(P, lq.NODES, true, OLD)
    yield expectation("slope at the old policy: the policy gradient", torch.stack(slope), gradient)


MISTAKES = """
ctrl.policy_gradient.surrogate
    ratio upside down | (new - old.detach()) => (old.detach() - new)
    ratio to first order | (new - old.detach()).exp() => 1 + new - old.detach()
    ratio left out | (new - old.detach()).exp() => torch.ones_like(new)
    gradient through the old policy too | old.detach() => old
    entropy of the old policy | _regularised_q(problem, value, new_policy, paths, probes)
        => _regularised_q(problem, value, policy, paths, probes)
verification.claims.policy_gradient.surrogate_of_the_performance.paths_of_old
    states of the new policy | lq.parameters(setting, OLD), nodes => lq.parameters(setting, NEAR), nodes
shared
    outer discount missing
    entropy's sign, in regularised_q
    entropy dropped
    discount V left out of q
    second-order term of q missing
    derivative of V in time missing
    states at the right end of a step
"""
