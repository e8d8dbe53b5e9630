"""Off-policy evaluation from recorded episodes: intervals, gradients, what is refused.

Its exact expectations are verified in verification's claim ``recorded-data``.
"""

import math

import numpy as np
import pytest
import torch

import ctrl
from ctrl.off_policy import evaluate, importance_sampled_returns, log_ratios
from ctrl.recorded import Episode, Replay, episodes_of, paths_of

A, B, S, M, N, LAM, DISCOUNT = -0.3, 0.8, 0.6, 1.1, 0.5, 0.2, 0.7
TARGET = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.4)
BEHAVIOUR = ctrl.GaussianPolicy(lambda t, x: -0.2 * x, 0.6)
SDE = ctrl.ControlledSDE(lambda t, x, a: A * x + B * a, lambda t, x: S)


def reward(t, x, a):
    return -(M * x[:, 0] ** 2 + N * a[:, 0] ** 2)


ENDLESS = ctrl.ControlProblem(None, math.inf, reward, None, DISCOUNT, LAM)


def records(grids, count, generator, *, over):
    """Episodes of the behaviour policy on each of these grids."""
    episodes = []
    for nodes in grids:
        grid = ctrl.TimeGrid(torch.as_tensor(nodes))
        start = 0.7 + torch.zeros(count, 1, dtype=torch.float64)
        if not over:
            start = torch.randn(count, 1, dtype=torch.float64, generator=generator)
        problem = ctrl.ControlProblem(SDE, 9.0)
        paths = ctrl.simulate(problem, BEHAVIOUR, start, grid, generator=generator)
        steps = torch.full((count,), len(nodes) - 1)
        paths = ctrl.paths.stop(paths, steps, torch.full((count,), over))
        episodes += episodes_of(paths)
    return episodes


def features(t, x):
    return torch.cat([x**2, torch.ones_like(x)], 1)


def action_features(t, x, a):
    return torch.cat([a**2, x * a], 1)


def value_on(nodes, k, s):
    """The Euler chain from 0.7, by its second moments: no line shared with ctrl."""
    second, total = 0.49, 0.0
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2)
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        paid = -(M + N * k**2) * second - N * s**2 + LAM * entropy
        total += math.exp(-DISCOUNT * (t - nodes[0])) * h * paid
        second = (1 + h * (A + B * k)) ** 2 * second + (h * B * s) ** 2 + S**2 * h
    return total


GRIDS = ([0.0, 0.1, 0.3, 0.45, 0.7], [0.2, 0.5, 0.6])


def test_ratios_give_the_target_s_value_on_everyone_s_own_times(generator):
    grids, target = ([0.0, 0.5, 1.3], [0.2, 1.0]), ctrl.GaussianPolicy(lambda t, x: -x, 0.4)
    paths = paths_of(records(grids, 4000, generator, over=True))
    each = importance_sampled_returns(ENDLESS, target, BEHAVIOUR, paths)
    exact, recorded = (
        np.mean([value_on(np.array(nodes), *law) for nodes in grids])
        for law in ((-1.0, 0.4), (-0.2, 0.6))
    )
    got = ctrl.Estimate.of(each)
    assert abs(got.mean - exact) < 4 * got.standard_error < 0.5 * abs(recorded - exact)
    logs = ctrl.paths.log_probs(BEHAVIOUR, paths)
    again = importance_sampled_returns(ENDLESS, target, logs, paths)
    torch.testing.assert_close(again, each, rtol=1e-13, atol=0)


def test_intervals_cover_the_value_in_continuous_time(generator):
    """Steps of 0.01: biased by 1 %, which the interval of 4 % hides."""
    uneven = 0.01 + 0.004 * np.sin(np.arange(70))
    grids = [np.concatenate([[0.0], uneven[:n]]).cumsum() for n in (40, 70)]
    paths = paths_of(records(grids, 700, generator, over=False))
    evaluation = evaluate(ENDLESS, TARGET, paths, features, action_features, nodes=2)
    p = -(M + N * 0.36) / (DISCOUNT - 2 * (A - 0.6 * B))
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.16)
    r = (-N * 0.16 + LAM * entropy + S**2 * p) / DISCOUNT
    exact = torch.tensor([p, r, -N, 2 * B * p], dtype=torch.float64)
    errors = evaluation.covariance.diagonal().sqrt()
    assert bool(((evaluation.coefficients - exact).abs() < 4.5 * errors).all())
    assert bool((errors < 0.3 * exact.abs()).all())
    t, x = torch.zeros((), dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    assert float(evaluation.value_error(t, x)) < 0.08 * abs(p + r)
    improved = ctrl.q_learning.improved_policy(evaluation.advantage, LAM, 1)
    squared, crossed = evaluation.q.tolist()
    assert float(improved.mean(t, x)) == pytest.approx(-crossed / (2 * squared), rel=1e-6)
    scale = float(improved.scale_at(t, x, x)[0, 0, 0])
    assert scale == pytest.approx(math.sqrt(-LAM / (2 * squared)), rel=1e-6)


def test_the_root_is_where_q_learning_from_replay_stands_still(generator):
    """The semi-gradient of q-learning over the same data is 0 there, and not beside it."""
    replay = Replay(100)
    replay.add(records(GRIDS, 40, generator, over=False))
    paths = replay.sample_steps(400, generator)
    root = evaluate(ENDLESS, TARGET, paths, features, action_features).coefficients

    def gradient(coefficients):
        theta = coefficients.clone().requires_grad_()
        q = ctrl.q_learning.ConsistentQ(
            lambda t, x, a: action_features(t, x, a) @ theta[2:], TARGET, LAM
        )
        loss = ctrl.q_learning.orthogonality_loss(
            lambda t, x: features(t, x) @ theta[:2], q, ENDLESS, paths
        )
        return torch.autograd.grad(loss.mean(), theta)[0]

    scale = gradient(root + 0.1).abs().max()
    assert float(gradient(root).abs().max()) < 1e-10 * float(scale)


def test_bad_evaluations_are_refused(generator):
    episodes = records(GRIDS, 3, generator, over=False)
    paths = paths_of(episodes)
    with pytest.raises(ValueError, match="break off before"):
        importance_sampled_returns(ENDLESS, TARGET, BEHAVIOUR, paths)
    with pytest.raises((ValueError, TypeError), match="behaviour"):
        log_ratios(TARGET, torch.zeros(6, 3, dtype=torch.float64), paths)
    impossible = torch.full((6, 4), -math.inf, dtype=torch.float64)
    with pytest.raises(ValueError, match="behaviour policy must be finite"):
        log_ratios(TARGET, impossible, paths)
    with pytest.raises(ValueError, match="features do not determine the coefficients"):
        evaluate(ENDLESS, TARGET, paths, lambda t, x: torch.cat([x, x], 1), action_features)
    still = [Episode(e.times, e.states, 0 * e.actions, terminated=False) for e in episodes]
    with pytest.raises(ValueError, match="the actions vary too little"):
        evaluate(ENDLESS, TARGET, paths_of(still), features, lambda t, x, a: x * a)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ctrl.q_learning.improved_policy(lambda t, x, a: -(a[:, 0] ** 2), 0.0, 1)
    convex = ctrl.q_learning.improved_policy(lambda t, x, a: a[:, 0] ** 2, 0.3, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="not concave"):
        convex.act(one, one[0, 0], one, one)
