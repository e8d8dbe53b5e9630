"""Advantages by a rate of forgetting: what they are on every path, and what they estimate.

A_k = sum_l e^{-(discount + rate) (t_l - t_k)} delta_l, with a rate of forgetting in place
of a fixed lambda, so that it means the same on every grid. Rate 0: the return less V, on
every path (the differences telescope). Infinite rate: one difference, delta_k. In the mean,
given state and action, the part that depends on the action is q h for every rate. But A/h
is no estimate of q: with V of the continuous-time problem it has a part besides that does
not depend on the action and does not vanish with h, unless the rate is infinite. With the
grid's own V there is none, and all rates have one mean.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.advantages import continuous_gae, temporal_differences
from ctrl.returns import discount_rates, regularised_rewards, returns_to_go
from ctrl.value import Value, values
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import lq_chain
from verification.closed_form.lq_chain import THETA, LQChain
from verification.cubature import mean, point_start
from verification.problems import exploratory_lq as lq

SOURCE = (
    'Schulman et al. 2016, generalised advantage estimation, in continuous time; "Score as '
    'Action", arXiv 2502.01819, Theorem 4.1'
)

P = LQChain()
RATE = 1.3


def paths_after(setting: Setting, nodes: np.ndarray, z: float | None) -> ctrl.Paths:
    """Quadrature paths; the first action is the mean plus z standard deviations, if z is given."""
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3, action=(1,))
    assert noise.actions is not None
    if z is not None:
        noise.actions[:, 0] = z
    theta = [setting.tensor(float(value)) for value in THETA]
    start = point_start(noise, [P.start])
    return ctrl.simulate(lq.problem(P), lq.policy(*theta), start, grid, noise=noise)


def advantages(setting: Setting, value: Value, paths: ctrl.Paths, rate: float) -> Tensor:
    """A of every step, as ``temporal_difference_gradient`` makes it."""
    stated, policy = lq.problem(P), lq.policy(*[setting.tensor(float(v)) for v in THETA])
    along, rewards = values(value, stated, paths), regularised_rewards(stated, paths, policy)
    return continuous_gae(along, rewards, paths.grid.steps, rate, P.discount)


def by_definition(
    along: np.ndarray, rewards: np.ndarray, h: np.ndarray, rate: float, discounts: np.ndarray
) -> np.ndarray:
    """sum_{l >= k} e^{-int_k^l (discount + rate) dt} delta_l, all double sums written out."""
    sums = np.zeros_like(rewards)
    for k in range(len(h)):
        for step in range(k, len(h)):
            later = np.exp(-discounts[:, step] * h[step]) * along[:, step + 1]
            delta = later - along[:, step] + rewards[:, step]
            sums[:, k] += np.exp(-(discounts + rate)[:, k:step] @ h[k:step]) * delta
    return sums


def killing(t: Tensor, x: Tensor) -> Tensor:
    """A discount that depends on state and time."""
    return 0.3 + 0.5 * x[:, 0].square() + 0.4 * t


def checks(setting: Setting) -> Iterator[Check]:
    """The definition, its ends, and conditional means."""
    nodes = lq.NODES
    chain, smooth = lq.chain_value(setting, P, THETA, nodes), lq.continuous_value(setting, P, THETA)
    paths = paths_after(setting, nodes, None)
    stated, policy = lq.problem(P), lq.policy(*[setting.tensor(float(v)) for v in THETA])
    along, rewards = values(smooth, stated, paths), regularised_rewards(stated, paths, policy)
    v, r, steps = (each.double().cpu().numpy() for each in (along, rewards, paths.grid.steps))
    exact = by_definition(v, r, steps, RATE, np.full_like(r, P.discount))
    yield pathwise("the defining sum", advantages(setting, smooth, paths, RATE), exact)
    killed, h = replace(stated, discount=killing), paths.grid.steps
    moments = zip(paths.grid.nodes, paths.states[:, :-1].unbind(1), strict=False)
    discounts = torch.stack([killing(t, x) for t, x in moments], 1).double().cpu().numpy()
    rates = discount_rates(killed, paths)
    slow, whole = (continuous_gae(along, rewards, h, rate, rates) for rate in (RATE, 0.0))
    exact = by_definition(v, r, steps, RATE, discounts)
    yield pathwise("the defining sum, discount of state and time", slow, exact)
    exact = returns_to_go(killed, paths, policy)[:, :-1] - along[:, :-1]
    yield pathwise("rate 0, discount of state and time: the return less V", whole, exact)
    whole = returns_to_go(stated, paths, policy)[:, :-1] - along[:, :-1]
    yield pathwise("rate 0: the return less V", advantages(setting, smooth, paths, 0.0), whole)
    single = advantages(setting, smooth, paths, math.inf)
    deltas = temporal_differences(along, rewards, paths.grid.steps, P.discount)
    yield pathwise("infinite rate: one difference", single, deltas)

    def conditional_mean(z: float, nodes: np.ndarray, value: Value, rate: float) -> Tensor:
        after = paths_after(setting, nodes, z)
        return mean(advantages(setting, value, after, rate)[:, 0], after)

    actions = {z: THETA[0] * P.start + THETA[1] + z * np.exp(THETA[2]) for z in (-0.8, 0.6)}
    series, own = lq_chain.value_series(P, THETA), lq_chain.chain_value(P, THETA, nodes)
    true = np.array([lq_chain.series_at(series, lq.HORIZON - t) for t in nodes])
    for rate in (0.0, RATE, math.inf):
        means = torch.stack([conditional_mean(z, nodes, smooth, rate) for z in actions])
        wanted = [
            lq_chain.expected_advantage(P, THETA, nodes, true, rate, a) for a in actions.values()
        ]
        yield expectation(f"mean given the action, rate {rate:g}", means, wanted)
    means_by_rate = torch.stack(
        [conditional_mean(-0.8, nodes, chain, rate) for rate in (0.0, RATE, math.inf)]
    )
    wanted = lq_chain.expected_advantage(P, THETA, nodes, own, math.inf, actions[-0.8])
    yield expectation("the grid's own V: one mean for all rates", means_by_rate, np.full(3, wanted))
    grids = [np.linspace(0, lq.HORIZON, steps + 1) for steps in (1, 2, 3)]
    gaps = [
        (conditional_mean(0.6, n, smooth, RATE) - conditional_mean(-0.8, n, smooth, RATE)) / n[1]
        for n in grids
    ]
    slope = lq_chain.q_difference(P, THETA, true[0], actions[0.6], actions[-0.8])
    yield limit("by h, steps to 0: q of one action less q of another", lq.to_zero(*gaps), slope)
    for rate in (0.0, RATE):
        parts = []
        for n in grids:
            drawn = paths_after(setting, n, None)
            parts.append(mean(advantages(setting, smooth, drawn, rate)[:, 0], drawn) / n[1])
        there = lq_chain.baseline_rate(P, THETA, lq.HORIZON, rate)
        name = f"by h, steps to 0: what does not depend on the action, rate {rate:g}"
        yield limit(name, lq.to_zero(*parts), there)


MISTAKES = """
ctrl.advantages.continuous_gae
    forgetting without the discount | torch.exp(-(discount + rate) * step_sizes) => torch.exp(-rate * step_sizes)
    discount without the forgetting | torch.exp(-(discount + rate) * step_sizes) => torch.exp(-discount * step_sizes)
    one lambda for all steps | (discount + rate) * step_sizes
        => (discount + rate) * step_sizes.mean().expand_as(step_sizes)
    forgetting of the next step | keep[..., k] * => keep[k + 1] *
    1 - (discount + rate) h for the exponential | torch.exp(-(discount + rate) * step_sizes)
        => 1 - (discount + rate) * step_sizes
    steps in the order of time | torch.stack(advantages[::-1], dim=1) => torch.stack(advantages, dim=1)
ctrl.returns.discount_rates
    discount of the first state for all steps | return over_steps(rate, paths)
        => return over_steps(rate, paths)[:, :1].expand(-1, paths.grid.steps.shape[-1])
ctrl.advantages.temporal_differences
    V of the step itself discounted | torch.exp(-discount * step_sizes) * values[:, 1:] - values[:, :-1]
        => values[:, 1:] - torch.exp(-discount * step_sizes) * values[:, :-1]
    a rate, not an amount | values[:, :-1] + rewards => values[:, :-1] + rewards / step_sizes
shared
    infinite rate taken for 0
    discount inside the temporal difference missing
    entropy's sign
"""
