"""Mean-field linear-quadratic control: two Riccati equations, and the particles behind them.

The optimum of dX = (A X + A_mean m + B a + f) dt + sigma dW with quadratic costs of X, a
and m = E X is a = K (x - m) + K_mean m + k, of two Riccati equations, and Gaussian. n
particles with their average for m have the same gains; E V_n = V + constant / n.

Two and three particles of two coordinates are compared with the problem of all four and six
coordinates at once, the limit of many particles with what these tend to.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import mean_field, q_learning
from ctrl.linear import Gaussian, LinearQuadratic
from verification.claim import Check, Setting, limit, pathwise
from verification.closed_form import mean_field as exact

SOURCE = "Yong 2013, SIAM J. Control Optim. 51; Basei & Pham 2019, JOTA 181"
WHY_DOUBLE = "the answers are float64, integrated to the twelfth digit"
PRECISION = torch.float64

COUNT = 3
STATES = [[[0.4, -0.8], [1.1, 0.3], [-0.6, 0.9]], [[-0.2, 0.5], [0.7, -1.2], [0.3, 0.1]]]
ACTIONS = [[[0.3, 0.2], [-0.9, 0.4], [0.1, -0.7]], [[0.8, -0.1], [0.2, 0.6], [-0.4, 0.5]]]


def double(value: object) -> Tensor:
    """The exact answers' precision."""
    return torch.as_tensor(value, dtype=torch.float64)


def problem() -> mean_field.MeanFieldLQ:
    """The problem of the closed form."""
    lq = LinearQuadratic(
        double(exact.A),
        double(exact.B),
        double(np.diag(exact.SIGMA)),
        double(exact.M),
        double(np.diag(exact.N)),
        R=double(exact.R),
        p=double(exact.P),
        l=double(exact.L),
        H=double(exact.H),
        h=double(exact.LAST),
        f=double(exact.DRIFT),
        discount=exact.DISCOUNT,
        temperature=exact.TEMPERATURE,
    )
    means = (double(each) for each in (exact.A_MEAN, exact.M_MEAN, exact.H_MEAN))
    return mean_field.MeanFieldLQ(lq, *means)


def earned(solution: mean_field.MeanFieldSolution) -> float:
    """Expected discounted reward along the optimal laws, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    inner = 0.5 * exact.HORIZON * (nodes + 1)
    times = double([0.0, *inner, exact.HORIZON])
    solution = mean_field.solve(solution.problem, times)
    laws = solution.laws(Gaussian(double(exact.MEAN), double(exact.COVARIANCE)))
    heat = exact.TEMPERATURE
    entropy = 0.5 * heat * np.log(2 * np.pi * heat / exact.N).sum()  # less the cost of variance
    total = 0.0
    for i, (t, weight) in enumerate(zip(inner, weights, strict=True), start=1):
        m, C = laws.mean[i].numpy(), laws.covariance[i].numpy()
        K = solution.deviation.law_at(times[i]).gain.numpy()
        a = solution.actions(times[i], laws.mean[i], laws.mean[i]).numpy()
        means = m @ (exact.M + exact.M_MEAN) @ m + a @ (exact.N * a)
        means = 0.5 * means + a @ exact.R @ m + exact.P @ m + exact.L @ a
        apart = exact.M + K.T @ (exact.N[:, None] * K) + 2 * K.T @ exact.R
        rate = entropy - means - 0.5 * np.trace(apart @ C)
        total += 0.5 * exact.HORIZON * weight * np.exp(-exact.DISCOUNT * t) * rate
    m, C = laws.mean[-1].numpy(), laws.covariance[-1].numpy()
    end = 0.5 * (m @ (exact.H + exact.H_MEAN) @ m + np.trace(exact.H @ C)) + exact.LAST @ m
    return float(total - np.exp(-exact.DISCOUNT * exact.HORIZON) * end)


def checks(setting: Setting) -> Iterator[Check]:
    """Pathwise for particles; what their laws earn; and the limit of many."""
    times, t = double([0.0, exact.HORIZON]), double(0.0)
    x, a = double(STATES), double(ACTIONS)
    best, several = exact.joint(COUNT), mean_field.solve(problem(), times, COUNT)
    flat = x.flatten(1).numpy()
    value = 0.5 * ((flat @ best.S) * flat).sum(1) + flat @ best.e + best.c
    yield limit("value of three particles, as one problem", several.value(t, x), value)
    policy = several.policy()
    action = policy.mean(t, x).flatten(1)
    yield limit("their actions", action, flat @ best.K.T + best.k)

    system = problem().particles(COUNT, exact.HORIZON)
    drift = system.dynamics.drift_at(t, x, a).flatten(1)
    pushed = a.flatten(1).numpy() @ np.kron(np.eye(COUNT), exact.B).T
    moved = flat @ exact.drift(COUNT).T + pushed + np.kron(np.ones(COUNT), exact.DRIFT)
    yield pathwise("drift of three particles", drift, moved)
    assert system.terminal_reward is not None
    H = exact.cost(COUNT, exact.H, exact.H_MEAN)
    last = np.kron(np.ones(COUNT), exact.LAST) / COUNT
    end = -0.5 * ((flat @ H) * flat).sum(1) - flat @ last
    yield pathwise("terminal reward of three particles", system.terminal_reward(x), end)
    assert isinstance(policy, ctrl.RandomPolicy)
    now = double(0.4)
    q = q_learning.q_rate(system, several.value, now, x, a)
    yield pathwise("their q-rate", q, system.temperature * policy.log_prob(now, x, a))

    limiting = mean_field.solve(problem(), times)
    law = Gaussian(double(exact.MEAN), double(exact.COVARIANCE))
    of_law = limiting.value_of(t, law)
    yield limit("value of a law, from two and three particles", of_law, exact.many())
    yield limit("what the optimal laws earn", earned(limiting), of_law)


MISTAKES = """
ctrl.mean_field.solve
    mean without its drift | lq.A + problem.A_mean => lq.A
    mean without its cost | lq.M + problem.M_mean => lq.M
    mean without its terminal cost | lq.H + problem.H_mean => lq.H
    linear costs paid twice | p=zero(lq.p) => p=lq.p
    deviations of n particles have all of the noise | math.sqrt(1 - share) => 1.0
    noise of the average 1/n for 1/sqrt(n) | math.sqrt(share) => share
    entropy paid twice | temperature=zero(lq.rates[1]) => temperature=lq.rates[1]
ctrl.mean_field.MeanFieldSolution.actions
    gain of the deviation on the whole state | states - mean => states
    gain of the deviation for the mean | together.mean(mean) => apart.mean(mean)
ctrl.mean_field.MeanFieldSolution.value
    value of the sum of particles | .mean(1) + self => .sum(1) + self
ctrl.mean_field.MeanFieldSolution.value_of
    value of a law without 1/2 | 0.5 * (apart => (apart
ctrl.mean_field.MeanFieldSolution.laws
    covariance moves with the mean's gain | lq.B @ apart.gain => lq.B @ together.gain
    mean moves without A_mean | lq.A + self.problem.A_mean => lq.A
ctrl.mean_field.MeanFieldLQ.particles
    temperature of one particle for all | float(lq.rates[1]) / count => float(lq.rates[1])
    average over systems, not over particles | x.mean(1, keepdim=True) @ => x.mean(0, keepdim=True) @
ctrl.mean_field._cost
    cost of the mean without 1/2 | `0.5 * ` => ``
"""
