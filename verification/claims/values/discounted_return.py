"""The discounted return on a grid, and in the limit.

The return of a path on a grid is sum_k e^{-discount (t_k - t_0)} r_k h_k
+ e^{-discount (T - t_0)} r(X_T), rewards at the left end of their own step; its mean is the
value of the recursion V_k = r h_k + e^{-discount h_k} E V_{k+1}, exactly on any grid, and
tends to E int e^{-discount t} r dt like the step. (e^{-discount h} and 1 - discount h share
the limit, not the value on a grid.)
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import ctrl
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import dynkin as exact
from verification.closed_form import exploratory_chain as chain
from verification.closed_form.policy_evaluation import Evaluation
from verification.cubature import mean
from verification.problems import NODES
from verification.problems import policy_evaluation as evaluation
from verification.problems.martingale import POLICY, C, earned, gaussian, problem, sampled

SOURCE = "Jia & Zhou 2022a, JMLR 23, section 2; Sutton & Barto 3.3 in continuous time"

SQUARES = Evaluation(discount=0.8)
GRIDS = (4, 8, 16, 32)


def checks(setting: Setting) -> Iterator[Check]:
    """Against sums written out, the recursion of values, and the integral in the limit."""
    paths, policy, times = sampled(setting), gaussian(POLICY), np.array(NODES)
    returns = ctrl.returns_to_go(problem(), paths, policy)
    yield pathwise("return of a path, written out", returns[:, 0], earned(paths))
    known = [
        float(chain.expected(v, *law))
        for v, law in zip(
            chain.values(C, POLICY, times), chain.state_laws(C, POLICY, times), strict=True
        )
    ]
    yield expectation("mean return to go at every node", mean(returns, paths), known)
    late = replace(paths, grid=ctrl.TimeGrid(paths.grid.nodes + 0.3))
    factors = ctrl.value.discount_factors(problem(), late)
    yield pathwise("discount factors of a late grid", factors, np.exp(-C.discount * times[:-1]))
    sums = []
    for steps in GRIDS:
        even = setting.tensor(np.linspace(0, SQUARES.horizon, steps + 1))
        paths = evaluation.sampled(SQUARES, even)
        sums.append(
            float(mean(ctrl.returns_to_go(evaluation.problem(SQUARES), paths)[:, 0], paths))
        )
    s = SQUARES
    integral = exact.discounted_square(s.pull, s.noise, s.mean, s.variance, s.discount, s.horizon)
    powers = np.vander(1 / np.array(GRIDS, dtype=float), increasing=True)
    yield limit("limit of small steps", np.linalg.solve(powers, np.array(sums))[0], integral)
    order = np.log2((sums[-2] - integral) / (sums[-1] - integral))
    yield limit("order 1", order, 1.0)


MISTAKES = """
ctrl.returns.returns_to_go
    1 - discount h for exp(-discount h) | keep = torch.exp(-discount * as_like(paths.grid.steps, rewards))
        => keep = 1 - discount * as_like(paths.grid.steps, rewards)
    discount missing | -discount * as_like( => -0.0 * as_like(
    discount per step | as_like(paths.grid.steps, rewards)) => as_like(paths.grid.steps, rewards) ** 0)
    rewards discounted over their own step | rewards[:, k] + keep[..., k] * returns[-1]
        => keep[..., k] * (rewards[:, k] + returns[-1])
    uneven grid taken for an even one, in the discount | as_like(paths.grid.steps, rewards))
        => as_like(paths.grid.steps, rewards).mean().expand(rewards.shape[1]))
    rewards off by one step | rewards[:, k] + keep[..., k] => rewards[:, k - 1] + keep[..., k]
    discount off by one step | keep[..., k] * returns => keep[k - 1] * returns
    terminal reward of the state before the end | paths.states[:, -1]) => paths.states[:, -2])
ctrl.value.discount_factors
    discount counted from time 0 on a grid that begins later | (nodes - nodes[..., :1]) => nodes
    discount's sign | -discount * (nodes => discount * (nodes
shared
    uneven grid taken for an even one, in the reward
    states at the right end of a step
    sqrt(dt) for dt in the reward
    discount of test functions one step late
"""
