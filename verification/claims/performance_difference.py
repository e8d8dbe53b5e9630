"""Lemma 4.2 of "Score as Action": the difference of two policies' performances, and its surrogate.

The exploratory LQ problem again. q-rates are those of the old policy's value in continuous time,
known as a power series; so are their expectations along the Euler chain of either policy.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from ctrl.value import Value
from verification.claim import Check, Setting, claim, expectation, limit, wrong
from verification.closed_form import lq_chain
from verification.closed_form.lq_chain import LQChain
from verification.cubature import mean
from verification.exploratory_lq import (
    HORIZON,
    NODES,
    continuous_value,
    drawn_paths,
    parameters,
    policy,
    problem,
    to_zero,
)

P = LQChain()
OLD = lq_chain.THETA
NEW = np.array([-0.2, 0.6, -0.75])
NEAR = np.array([0.3, 0.4, OLD[2]])  # of the old std: then the ratio is entire in the noise
SHORT = np.array([0.0, 0.35, 0.9])


def value_of_old(setting: Setting) -> Value:
    """V of the old policy, in continuous time."""
    return continuous_value(setting, P, OLD)


def paths_of_new(setting: Setting, nodes: np.ndarray) -> ctrl.Paths:
    """Paths of the new policy."""
    return drawn_paths(setting, P, parameters(setting, NEW), nodes)


def paths_of_old(setting: Setting, nodes: np.ndarray, rule: int = 3) -> ctrl.Paths:
    """Paths of the old policy."""
    return drawn_paths(setting, P, parameters(setting, OLD), nodes, rule)


OUTER_DISCOUNT = wrong(
    "outer discount missing", "ctrl.value.discount_factors", "-discount * ", "-0.0 * "
)
ENTROPY_SIGN = wrong(
    "entropy's sign",
    "ctrl.policy_gradient._regularised_q",
    "return q - problem.temperature",
    "return q + problem.temperature",
)
ENTROPY_DROPPED = wrong(
    "entropy dropped",
    "ctrl.policy_gradient._regularised_q",
    "if not problem.temperature:",
    "if True:",
)
DISCOUNT_IN_Q = wrong(
    "discount V left out of q", "ctrl.q_learning.q_rate", "if problem.discount:", "if False:"
)
SECOND_ORDER = wrong(
    "second-order term of q missing",
    "ctrl.value.generator",
    "along_drift + 0.5 * trace",
    "along_drift",
)
HALF = wrong("second-order term of q without 1/2", "ctrl.value.generator", "0.5 * trace", "trace")
TIME_SLOPE = wrong(
    "derivative of V in time missing",
    "ctrl.value.transport",
    "torch.ones_like(t)",
    "torch.zeros_like(t)",
)
RIGHT_END = wrong(
    "states at the right end of a step",
    "ctrl.paths.over_steps",
    "paths.states[:, :-1]",
    "paths.states[:, 1:]",
)
LATE = wrong(
    "V a step late", "ctrl.paths.over_steps", "grid.nodes[..., :-1]", "grid.nodes[..., 1:]"
)


@claim(
    statement="""
        V'(0, x) - V(0, x) = E' int e^{-discount t} (q(t, X_t, a_t) - temperature log pi'(a_t)) dt,
        where q is of the value V of the old policy, and states, actions and entropy are the new
        one's. The sum over an Euler chain is known exactly and must be met to round-off; it tends
        to the difference of the two performances.
        """,
    source='"Score as Action", arXiv 2502.01819, Lemma 4.2; Zhao, Tang & Yao 2023, policy '
    "optimisation in continuous time, Theorem 2",
    wrongs=[
        wrong(
            "q of the new policy's value",
            "verification.claims.performance_difference.value_of_old",
            "P, OLD",
            "P, NEW",
        ),
        wrong(
            "states and actions of the old policy",
            "verification.claims.performance_difference.paths_of_new",
            "(setting, NEW)",
            "(setting, OLD)",
        ),
        OUTER_DISCOUNT,
        ENTROPY_SIGN,
        ENTROPY_DROPPED,
        DISCOUNT_IN_Q,
        SECOND_ORDER,
        HALF,
        TIME_SLOPE,
        RIGHT_END,
        LATE,
        wrong(
            "running reward left out of q",
            "ctrl.q_learning.q_rate",
            "rate = rate + one_a_path",
            "rate = rate + 0 * one_a_path",
        ),
        wrong(
            "uneven grid taken for an even one",
            "ctrl.policy_gradient.performance_difference",
            "as_like(new_paths.grid.steps, rates)",
            "as_like(new_paths.grid.steps, rates).mean()",
        ),
        wrong(
            "signs exchanged: old less new",
            "ctrl.policy_gradient.performance_difference",
            "return (discount_factors",
            "return -(discount_factors",
        ),
    ],
)
def performance_difference(setting: Setting) -> Iterator[Check]:
    """On a grid, against moments; in the limit, against both performances."""
    stated, value, new = problem(P), value_of_old(setting), policy(*parameters(setting, NEW))

    def difference(nodes: np.ndarray) -> Tensor:
        paths = paths_of_new(setting, nodes)
        return mean(pg.performance_difference(stated, value, new, paths), paths)

    exact = lq_chain.q_rate_sum(P, NODES, valued=OLD, visiting=NEW, acting=NEW)
    yield expectation("on a grid, against the states' moments", difference(NODES), exact)
    finer = [difference(np.linspace(0, HORIZON, steps + 1)) for steps in (1, 2, 3)]
    old, better = [lq_chain.continuous_performance(P, theta, HORIZON) for theta in (OLD, NEW)]
    yield limit(
        "steps to 0: the difference of performances", to_zero(*finer), np.real(better - old)
    )


@claim(
    statement="""
        The surrogate L(pi') - V = E int e^{-discount t} E_{a ~ pi'}[ q - temperature log pi' ] dt
        keeps the states of the old policy; the new actions are the old ones, reweighted by
        pi' / pi. What it misses is exactly the change of the state law,
            V' - L(pi') = int e^{-discount t} (E_{p'_t} h_t - E_{p_t} h_t) dt,
        h_t(x) = E_{a ~ pi'}[ q - temperature log pi' ]; and its slope at pi' = pi is the policy
        gradient, with the entropy's share.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.4',
    wrongs=[
        OUTER_DISCOUNT,
        ENTROPY_SIGN,
        ENTROPY_DROPPED,
        DISCOUNT_IN_Q,
        SECOND_ORDER,
        TIME_SLOPE,
        RIGHT_END,
        wrong(
            "ratio upside down",
            "ctrl.policy_gradient.surrogate",
            "(new - old.detach())",
            "(old.detach() - new)",
        ),
        wrong(
            "ratio to first order",
            "ctrl.policy_gradient.surrogate",
            "(new - old.detach()).exp()",
            "1 + new - old.detach()",
        ),
        wrong(
            "ratio left out",
            "ctrl.policy_gradient.surrogate",
            "(new - old.detach()).exp()",
            "torch.ones_like(new)",
        ),
        wrong(
            "gradient through the old policy too",
            "ctrl.policy_gradient.surrogate",
            "old.detach()",
            "old",
        ),
        wrong(
            "entropy of the old policy",
            "ctrl.policy_gradient.surrogate",
            "_regularised_q(problem, value, new_policy, paths, probes)",
            "_regularised_q(problem, value, policy, paths, probes)",
        ),
        wrong(
            "states of the new policy",
            "verification.claims.performance_difference.paths_of_old",
            "parameters(setting, OLD), nodes",
            "parameters(setting, NEAR), nodes",
        ),
    ],
)
def surrogate_of_the_performance(setting: Setting) -> Iterator[Check]:
    """Value, gap and slope of the surrogate."""
    stated, value = problem(P), value_of_old(setting)
    theta = parameters(setting, OLD)
    old, near = policy(*theta), policy(*parameters(setting, NEAR))
    with torch.no_grad():
        paths = paths_of_old(setting, SHORT, rule=9)
        linearised = mean(pg.surrogate(stated, value, old, near, paths), paths)
        there = drawn_paths(setting, P, parameters(setting, NEAR), SHORT)
        whole = mean(pg.performance_difference(stated, value, near, there), there)
    here = lq_chain.q_rate_sum(P, SHORT, valued=OLD, visiting=OLD, acting=NEAR)
    both_changed = lq_chain.q_rate_sum(P, SHORT, valued=OLD, visiting=NEAR, acting=NEAR)
    yield expectation("surrogate, against the old states' moments", linearised, here)
    yield expectation(
        "what it misses: the change of the state law", whole - linearised, both_changed - here
    )
    paths = paths_of_old(setting, NODES)
    slope = torch.autograd.grad(mean(pg.surrogate(stated, value, old, old, paths), paths), theta)
    series = lq_chain.value_series(P, OLD)
    along = np.array([lq_chain.series_at(series, HORIZON - t) for t in NODES])
    gradient = lq_chain.q_rate_gradient(P, OLD, NODES, along)
    yield expectation("slope at the old policy: the policy gradient", torch.stack(slope), gradient)
