"""Lemma 4.2: the difference of two policies' performances, by q-rates.

V'(0, x) - V(0, x) = E' int e^{-discount t} (q(t, X_t, a_t) - temperature log pi'(a_t)) dt,
where q is of the value V of the old policy, and states, actions and entropy are the new
one's. The sum over an Euler chain is known exactly and must be met to round-off; it tends
to the difference of the two performances.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from ctrl.value import Value
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import lq_policies as closed
from verification.closed_form.lq_chain import THETA as OLD
from verification.cubature import mean
from verification.problems import exploratory_lq as lq
from verification.problems.exploratory_lq import P

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Lemma 4.2; Zhao, Tang & Yao 2023, policy '
    "optimisation in continuous time, Theorem 2"
)

NEW = np.array([-0.2, 0.6, -0.75])


def value_of_old(setting: Setting) -> Value:
    """V of the old policy, in continuous time."""
    return lq.continuous_value(setting, P, OLD)


def paths_of_new(setting: Setting, nodes: np.ndarray) -> ctrl.Paths:
    """Paths of the new policy."""
    return lq.drawn_paths(setting, P, lq.parameters(setting, NEW), nodes)


def checks(setting: Setting) -> Iterator[Check]:
    """On a grid, against moments; in the limit, against both performances."""
    stated = lq.problem(P)
    value = value_of_old(setting)
    new = lq.policy(*lq.parameters(setting, NEW))

    def difference(nodes: np.ndarray) -> Tensor:
        paths = paths_of_new(setting, nodes)
        return mean(pg.performance_difference(stated, value, new, paths), paths)

    exact = closed.q_sum(P, lq.NODES, closed.continuous_value(P, OLD, lq.HORIZON), NEW, NEW)
    yield expectation("on a grid, against the states' moments", difference(lq.NODES), exact)
    finer = [difference(np.linspace(0, lq.HORIZON, steps + 1)) for steps in (1, 2, 3)]
    old, better = (closed.initial_value(P, theta, lq.HORIZON) for theta in (OLD, NEW))
    yield limit("steps to 0: the difference of performances", lq.to_zero(*finer), better - old)


MISTAKES = """
verification.claims.policy_gradient.performance_difference.value_of_old
    q of the new policy's value | P, OLD => P, NEW
verification.claims.policy_gradient.performance_difference.paths_of_new
    states and actions of the old policy | (setting, NEW) => (setting, OLD)
ctrl.paths.over_steps
    V a step late | grid.nodes[..., :-1] => grid.nodes[..., 1:]
ctrl.policy_gradient.performance_difference
    uneven grid taken for an even one | as_like(new_paths.grid.steps, rates)
        => as_like(new_paths.grid.steps, rates).mean()
    signs exchanged: old less new | return (discount_factors => return -(discount_factors
shared
    outer discount missing
    entropy's sign, in regularised_q
    entropy dropped
    discount V left out of q
    second-order term of q missing
    second-order term of q without 1/2
    derivative of V in time missing
    states at the right end of a step
    running reward left out of q
"""
