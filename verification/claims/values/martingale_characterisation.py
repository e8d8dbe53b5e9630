"""Propositions 1 and 2: the martingale characterisation of a policy's value.

J is the value of the policy if and only if E int e^{-discount t} xi dM = 0 for all adapted
xi, dM = e^{-discount h} J(t + h, X') - J(t, X) + (r - temperature log pi) h, with J(T, .)
the terminal reward. Of 1, x, x^2, x eps, eps^2 - 1 (eps: the noise of the action before)
the last sees only what changes J's curvature in x: neither an offset nor any mistake about
the entropy; the others see all. A zero is no scale: a discount of the test functions that
is missing is seen by none, so the moments of a wrong J are checked for their size too. It
is false that any xi will do: X(t + h) gives -0.028 for the true value here, 24 % of it, and
the step's own action gives what the policy gradient is made of.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ctrl import martingale as mg
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import exploratory_chain as exact
from verification.cubature import mean
from verification.problems import NODES
from verification.problems.martingale import (
    ERROR,
    POLICY,
    C,
    basis,
    discounts,
    earned,
    exact_value,
    gaussian,
    is_refused,
    problem,
    sampled,
)

SOURCE = "Jia & Zhou 2022a, JMLR 23, Propositions 1 and 2"

NAMES = ("1", "x", "x^2", "x eps", "eps^2 - 1")


def checks(setting: Setting) -> Iterator[Check]:
    """Propositions 1 and 2: zero for the true value, known sizes for a wrong one."""
    paths, value, policy = sampled(setting), exact_value(setting), gaussian(POLICY)
    nodes, size = np.array(NODES), abs(exact.values(C, POLICY, np.array(NODES))[0](C.mean))
    moments = mean(mg.orthogonality(basis, value, problem(), paths, policy), paths)
    for name, moment in zip(NAMES, moments, strict=True):
        yield expectation(f"E int xi dM = 0, xi = {name}", moment, 0.0, size)
    state = mg.features_along(lambda t, x: torch.cat([x**0, x, x**2], dim=1))
    again = mean(mg.orthogonality(state, value, problem(), paths, policy), paths)
    yield expectation("E int xi dM = 0, xi of (t, x) by features_along", again, [0.0] * 3, size)

    def off(t: Tensor, x: Tensor) -> Tensor:
        """The true value plus an error."""
        c = setting.tensor(ERROR.coef)
        return value(t, x) + c[0] + c[1] * x[:, 0] + c[2] * x[:, 0] ** 2

    orthogonality = mean(mg.orthogonality(basis, off, problem(), paths, policy), paths)
    known = exact.moments_of_a_wrong_value(C, POLICY, nodes, ERROR)
    yield expectation("E int xi dM of a wrong value has its known size", orthogonality, known)
    # whatever J is, M_T - M_0 is what was earned less J(0, X_0)
    dm = mg.increments(off, problem(), paths, policy)
    whole = mg.moments(state, dm, problem(), paths, sees_action=False)[:, 0]
    left = earned(paths) - off(paths.grid.nodes[0], paths.states[:, 0])
    yield pathwise("M_T - M_0, against what was earned, on every path", whole, left)
    # what is not adapted: refused, and for a reason
    ahead = mg.increments(value, problem(), paths, policy) * paths.states[:, 1:, 0]
    anticipating = mean((discounts(paths) * ahead).sum(1), paths)
    known = exact.look_ahead(C, POLICY, nodes)
    yield expectation("E int xi dM of the true value, xi = X(t + h), is not 0", anticipating, known)
    tries = [lambda p: p.states[:, 1:], lambda p: p.actions, lambda p: p.increments]
    answers = [
        is_refused(lambda xi=xi: mg.orthogonality(xi, value, problem(), paths, policy))
        for xi in [*tries, basis]
    ]
    yield expectation("what is not adapted is refused", answers, [1.0, 1.0, 1.0, 0.0])


MISTAKES = """
verification.problems.martingale.exact_value
    V off by 0.01 | return constant + => return 0.01 + constant +
ctrl.value.martingale_increments
    1 - discount h for exp(-discount h) | torch.exp(-discount * h) => 1 - discount * h
    reward discounted over its own step | + rewards - => + keep * rewards -
    uneven grid taken for an even one, in the discount | h = as_like(paths.grid.steps, along)
        => h = as_like(paths.grid.steps, along).mean().expand(along.shape[1] - 1)
ctrl.returns.regularised_rewards
    entropy missing | rewards - problem.temperature => rewards - 0 * problem.temperature
    entropy's dt missing | * log_prob * as_like(paths.grid.steps, rewards) => * log_prob
ctrl.returns.running_rewards
    reward of the next step | over_steps(rate, paths, kept_actions(paths))
        => over_steps(rate, paths, kept_actions(paths)).roll(-1, 1)
ctrl.value.values
    V not pinned to the terminal reward | if not ends_at_horizon(problem, paths.grid) => if True
    terminal reward of the state before the end | paths.states[:, -1]) => paths.states[:, -2])
verification.problems.martingale.sampled
    paths of another policy, with this policy's formula | problem(), gaussian(policy), start
        => problem(), gaussian(exact.Feedback(0.5, -0.3, 0.9)), start
ctrl.martingale.features_along
    test functions at the right end of a step [ValueError] | [:, :-1] => [:, 1:]
verification.problems.martingale.basis
    test functions see their own step's action [ValueError] | before = torch.cat([first, eps[:, :-1]], dim=1)
        => before = eps
ctrl.martingale.require_adapted
    whether test functions look ahead is not asked | if bool(changed.any()) => if False
ctrl.martingale.orthogonality
    the action of the step counts as its past | sees_action=False => sees_action=True
shared
    curvature of V + 1 %
    discount missing
    discount doubled
    entropy's sign
    sqrt(dt) for dt in the reward
    uneven grid taken for an even one, in the reward
    discount of test functions missing
    discount of test functions one step late
"""
