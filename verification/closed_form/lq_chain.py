"""A scalar exploratory LQ problem, whose noise is moved by state and action: values and advantages.

    dX = (drift_slope X + push a) dt + (noise + noise_slope X + noise_push a) dW
    a ~ N(gain X + offset, e^{2 log_std}), held over a step
    reward rate -(state_cost X^2 + action_cost a^2) / 2 - temperature log pi(a)
    terminal reward terminal_slope X - terminal_cost X^2 / 2;  discount, a rate
    start N(mean, std^2), at a point if not said otherwise

Parameters are theta = (gain, offset, log_std); rows and pairs are those of ``lq_policies``.
"""

from dataclasses import dataclass

import numpy as np

from verification.closed_form.lq_policies import (
    Law,
    Linear,
    ahead,
    continuous_value,
    log_density,
    motion,
    paid,
    pairs,
    q_rate,
    reward,
)

THETA = np.array([0.4, 0.25, -0.4])


@dataclass(frozen=True)
class LQChain:
    """The numbers of the problem; no two of them equal, none 0 or 1."""

    drift_slope: float = -0.7
    push: float = 0.9
    noise: float = 0.6
    noise_slope: float = 0.25
    noise_push: float = -0.45
    state_cost: float = 0.8
    action_cost: float = 0.5
    terminal_slope: float = 0.0
    terminal_cost: float = 1.3
    discount: float = 0.35
    temperature: float = 0.2
    mean: float = 0.75
    std: float = 0.0

    def at(self, t: float) -> Linear:
        """The same at all times."""
        return Linear(
            A=np.array([[0, 0], [0, self.drift_slope]]),
            B=np.array([[0], [self.push]]),
            C=np.array([[[0, 0], [self.noise, self.noise_slope]]]),
            D=np.array([[[0], [self.noise_push]]]),
            M=np.diag([0, self.state_cost]),
            N=np.array([[self.action_cost]]),
            R=np.zeros((1, 2)),
            discount=self.discount,
            temperature=self.temperature,
        )

    @property
    def first(self) -> np.ndarray:
        """E z at the start."""
        return np.array([1, self.mean, self.mean, self.mean**2 + self.std**2])

    @property
    def last(self) -> np.ndarray:
        """The terminal reward."""
        return np.array([0, self.terminal_slope, self.terminal_slope, -self.terminal_cost]) / 2

    def law(self, theta: np.ndarray) -> Law:
        """Of gain, offset and log-std."""
        gain, offset, log_std = theta
        return Law(np.array([[gain]]), np.array([offset]), np.array([[np.exp(2 * log_std)]]))


def average_advantages(
    p: LQChain, theta: np.ndarray, nodes: np.ndarray, values: np.ndarray, rate: float
) -> np.ndarray:
    """E[A_k | X_k = x] at every step, A made of these values: rows.

    A_k = sum_l e^{-(discount + rate) (t_l - t_k)} delta_l, so backwards A = delta + keep E A'. It
    is 0 where the values are the chain's own.
    """
    at, law = p.at(0.0), p.law(theta)
    (L, H), pay, later, backward = motion(at, law), paid(at, law), 0 * values[0], []
    for k, h in reversed(list(enumerate(np.diff(nodes)))):
        step = np.eye(len(L)) + h * L + h**2 * H
        keep, remember = np.exp(-p.discount * h), np.exp(-(p.discount + rate) * h)
        later = (keep * values[k + 1] + remember * later) @ step + h * pay - values[k]
        backward.append(later)
    return np.array(backward[::-1])


def baseline_rate(p: LQChain, theta: np.ndarray, horizon: float, rate: float) -> float:
    """E[ A_0 ] / h at the start as h -> 0, with V of the continuous-time problem; A as above.

    The recursion on 200 and 400 steps, extrapolated: errors of O(h^2).
    """
    value, advantages = continuous_value(p, theta, horizon), []
    for steps in (200, 400):
        nodes = np.linspace(0, horizon, steps + 1)
        first = average_advantages(p, theta, nodes, value(nodes)[0].T, rate)[0]
        advantages.append(first @ p.first * steps / horizon)
    return float(2 * advantages[1] - advantages[0])


def expected_advantage(
    p: LQChain, theta: np.ndarray, nodes: np.ndarray, values: np.ndarray, rate: float, action: float
) -> float:
    """E[ A_0 | X_0 = start, a_0 = action ], by the law of X_1."""
    at, x, a, h = p.at(0.0), np.array([[p.mean]]), np.array([[action]]), nodes[1] - nodes[0]
    after = np.exp(-p.discount * h) * values[1]
    if len(nodes) > 2:
        later = average_advantages(p, theta, nodes, values, rate)[1]
        after = after + np.exp(-(p.discount + rate) * h) * later
    earned = reward(at, x, a) - p.temperature * log_density(p, theta, x, a)
    return (ahead(at, h, after, x, a) + h * earned - pairs(x) @ values[0]).item()


def q_difference(
    p: LQChain, theta: np.ndarray, value: np.ndarray, action: float, other: float
) -> float:
    """q - temperature log pi of one action less that of another, at the start."""
    x, a = np.full((2, 1), p.mean), np.array([[action], [other]])
    log_prob = log_density(p, theta, x, a)
    rate, other_rate = q_rate(p.at(0.0), value, 0 * value, x, a) - p.temperature * log_prob
    return float(rate - other_rate)


def held_action_slope(p: LQChain, theta: np.ndarray, horizon: float) -> float:
    """d V(0) / d log_std by the step size, to first order, for a terminal reward alone.

    Held over a step of size h an action's noise adds (push s h)^2 to the state's variance, so
    1/h times -terminal_cost E e^{-discount T} sum e^{2 pull (T - t)} (push s h)^2, as h -> 0.
    """
    gain, _, log_std = theta
    pull = p.drift_slope + p.push * gain
    grown = (np.exp(2 * pull * horizon) - 1) / (2 * pull)
    worth = -p.terminal_cost * np.exp(-p.discount * horizon)
    return float(worth * grown * p.push**2 * np.exp(2 * log_std))
