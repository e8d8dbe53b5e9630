"""Recorded episodes of another policy, each on its own times: the value of the target policy.

From episodes of a policy b, of different length and on times of their own, without the
dynamics: sum_k e^{-discount t_k} rho_k r_k + rho_end r_end, rho_k the ratio of the action
probabilities up to k, has the mean of the target policy's return on the same times,
exactly; the root of E int (phi, psi) dM = 0 is linear, needs no ratio, and tends to the
target's V and q in continuous time as the steps vanish.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.off_policy import evaluate, importance_sampled_returns
from ctrl.recorded import Episode, episodes_of, paths_of
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import off_policy as exact
from verification.cubature import mean

SOURCE = "Jia & Zhou 2023, JMLR 24, Theorem 7; Precup, Sutton & Singh 2000, section 3"

STEPS = 0.02, 0.01, 0.005, 0.0025


def policy(gain_and_std: tuple[float, float]) -> ctrl.GaussianPolicy:
    """a ~ N(k x, s^2)."""
    gain, std = gain_and_std
    return ctrl.GaussianPolicy(lambda t, x: gain * x, std)


def problem(horizon: float, *, known: bool) -> ctrl.ControlProblem:
    """With its dynamics, to make data; or without, to learn from them."""
    sde = ctrl.ControlledSDE(lambda t, x, a: exact.A * x + exact.B * a, lambda t, x: exact.S)
    ends = math.isfinite(horizon)
    return ctrl.ControlProblem(
        sde if known else None,
        horizon,
        running_reward=lambda t, x, a: -(exact.M * x[:, 0] ** 2 + exact.N * a[:, 0] ** 2),
        terminal_reward=(lambda x: -exact.END * x[:, 0] ** 2) if ends else None,
        discount=exact.DISCOUNT,
        temperature=exact.LAM,
    )


def recorded(setting: Setting, nodes: np.ndarray) -> tuple[list[Episode], Tensor]:
    """All quadrature paths of the behaviour policy on one grid, and their weights."""
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    steps = len(nodes) - 1
    # the last increment enters a square alone, the others the ratios too
    counts = [*[5] * (steps - 1), 3, *[9] * steps]
    rules = [np.polynomial.hermite_e.hermegauss(count) for count in counts]
    normals = setting.tensor(list(itertools.product(*[points for points, _ in rules])))
    weights = setting.tensor(list(itertools.product(*[masses for _, masses in rules]))).prod(1)
    brownian = normals[:, :steps, None] * grid.steps.sqrt()[:, None]
    noise = ctrl.Noise(brownian, normals[:, steps:, None])
    start = torch.full_like(brownian[:, 0], exact.START)
    stated = problem(float(nodes[-1]), known=True)
    paths = ctrl.simulate(stated, policy(exact.BEHAVIOUR), start, grid, noise=noise)
    over = torch.ones(len(start), dtype=torch.bool)
    paths = replace(paths, ends=torch.full((len(start),), steps), terminated=over)
    return episodes_of(paths), weights / weights.sum()


def transitions(setting: Setting, h: float) -> ctrl.Paths:
    """Steps of length h from many states with many actions, at different times."""
    rule = ctrl.noise.gauss_hermite(setting.tensor([h]), nodes=3)
    assert rule.increments is not None
    assert rule.weights is not None
    episodes, weights = [], []
    for i, x in enumerate((-1.1, -0.4, 0.3, 0.8, 1.5)):
        for a in (-0.9, -0.2, 0.5, 1.3):
            for w, dw in zip(rule.weights, rule.increments[:, 0, 0], strict=True):
                after = x + h * (exact.A * x + exact.B * a) + exact.S * dw
                times = setting.tensor([0.1 * i, 0.1 * i + h])
                states = torch.stack([setting.tensor(x), after])[:, None]
                episodes.append(Episode(times, states, setting.tensor([[a]]), terminated=False))
                weights.append(w / 20)
    return replace(paths_of(episodes), weights=torch.stack(weights))


def alone(paths: ctrl.Paths, one: Episode, i: int) -> tuple[Tensor, Tensor]:
    """The continuous TD(0) loss of an episode among all others, and by itself."""

    def value(t: Tensor, x: Tensor) -> Tensor:
        return torch.exp(-t) * x[:, 0].square()

    endless, pi = problem(math.inf, known=False), policy(exact.BEHAVIOUR)
    pooled = ctrl.martingale.ctd0(value, endless, paths, pi)[i]
    return pooled, ctrl.martingale.ctd0(value, endless, paths_of([one]), pi)[0]


def checks(setting: Setting) -> Iterator[Check]:
    """A limit for continuous time; exact expectations on quadrature paths."""
    target, behaviour = policy(exact.TARGET), policy(exact.BEHAVIOUR)
    endless, roots = problem(math.inf, known=False), list[Tensor]()
    for h in STEPS:
        solved = evaluate(
            endless,
            target,
            transitions(setting, h),
            lambda t, x: torch.cat([x**2, torch.ones_like(x)], 1),
            lambda t, x, a: torch.cat([a**2, x * a], 1),
        )
        roots.append(solved.coefficients)
    errors = [float(root[0]) - exact.without_end()[0] for root in roots]
    for order in (1, 2, 3):
        roots = [(2**order * b - a) / (2**order - 1) for a, b in itertools.pairwise(roots)]
    curve = list(zip(STEPS, errors, strict=True))
    yield limit("V and q of the target as steps vanish", roots[0], exact.without_end(), curve=curve)

    pools = [recorded(setting, nodes) for nodes in exact.GRIDS]
    episodes = [one for pool, _ in pools for one in pool]
    weights = torch.cat([0.5 * weight for _, weight in pools])
    paths = replace(paths_of(episodes), weights=weights / weights.sum())
    stated = problem(float(exact.GRIDS[0][-1]), known=False)
    each = importance_sampled_returns(stated, target, behaviour, paths)
    want = float(np.mean([exact.on_grid(nodes) for nodes in exact.GRIDS]))
    yield expectation("return of the target, by ratios", mean(each, paths), want)
    again = importance_sampled_returns(stated, behaviour, behaviour, paths)
    own = ctrl.returns_to_go(stated, paths, behaviour)[:, 0]
    yield pathwise("ratios are 1 on-policy: the return itself", again, own)
    ends = len(pools[0][0]), len(episodes) - 1
    few = paths_of([episodes[i] for i in (0, *ends)])
    got, by_itself = zip(
        *[alone(few, episodes[i], j) for j, i in enumerate((0, *ends))], strict=True
    )
    yield pathwise("episodes count as alone", torch.stack(got), torch.stack(by_itself))


MISTAKES = """
ctrl.off_policy.log_ratios
    ratio of each step's own action alone | (taken - recorded).cumsum(1) => (taken - recorded)
    ratio upside down | (taken - recorded).cumsum(1) => (recorded - taken).cumsum(1)
ctrl.off_policy.importance_sampled_returns
    entropy of the policy that was recorded | regularised_rewards(problem, paths, target)
        => regularised_rewards(problem, paths, behaviour)
    what is paid at the end not reweighted | to_end * ratios[:, -1] * end => to_end * end
ctrl.recorded.paths_of
    times of the longest episode for all | else OwnTimes(nodes) => else TimeGrid(nodes[int(ends.argmax())])
    an episode that breaks off counted as over | [one.terminated for one => [True for one
ctrl.paths._along_own_times
    the clock of the first path for all | (times.reshape(-1), *flat) => (times[:1].expand_as(times).reshape(-1), *flat)
ctrl.off_policy.evaluate
    q not centred at the target policy | action_features(t, x, a) - average => action_features(t, x, a) - 0 * average
    q without its share of the entropy | problem.temperature * log_density * h => 0 * log_density * h
    q over a step without its length | -each * h => -each
"""
