"""A scalar exploratory LQ problem: its Euler chain and its continuous-time value, by hand.

    dX = (drift_slope X + push a) dt + (noise + noise_slope X + noise_push a) dW
    a ~ N(gain X + offset, e^{2 log_std}), held over a step
    reward rate -(state_cost X^2 + action_cost a^2) / 2 - temperature log pi(a)
    terminal reward -terminal_cost X^2 / 2;  discount, a rate

Values are V = p x^2 / 2 + e x + c. Parameters are theta = (gain, offset, log_std). All recursions
are analytic in theta, so derivatives are complex steps: exact to round-off.
"""

from dataclasses import dataclass

import numpy as np

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
    terminal_cost: float = 1.3
    discount: float = 0.35
    temperature: float = 0.2
    start: float = 0.75


def chain_value(p: LQChain, theta: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """(p, e, c) of V at every node of the chain, [nodes, 3]: backward recursion."""
    backward = [np.array([-p.terminal_cost, 0.0, 0.0])]
    for h in np.diff(nodes)[::-1]:
        keep = np.exp(-p.discount * h)
        backward.append(
            keep * _expected_next(p, theta, h, backward[-1]) + _expected_reward(p, theta, h)
        )
    return np.array(backward[::-1])


def _expected_next(p: LQChain, theta: np.ndarray, h: float, row: np.ndarray) -> np.ndarray:
    """(p, e, c) of E[ f(X') | X = x ] from those of f."""
    (gain, offset, log_std), (square, linear, constant) = theta, row
    variance = np.exp(2 * log_std)
    sigma, slope = p.noise + p.noise_push * offset, p.noise_slope + p.noise_push * gain
    f, b = 1 + h * (p.drift_slope + p.push * gain), h * p.push * offset  # E X' = f x + b
    variance_next = h * sigma**2 + variance * (h * p.noise_push**2 + h**2 * p.push**2)
    return np.array(
        [
            square * (f**2 + h * slope**2),
            square * (f * b + h * slope * sigma) + linear * f,
            square * (b**2 + variance_next) / 2 + linear * b + constant,
        ]
    )


def _expected_reward(p: LQChain, theta: np.ndarray, h: float) -> np.ndarray:
    """(p, e, c) of what a step is paid, entropy included."""
    gain, offset, log_std = theta
    cost = p.action_cost * (offset**2 + np.exp(2 * log_std)) / 2
    return h * np.array(
        [
            -(p.state_cost + p.action_cost * gain**2),
            -p.action_cost * gain * offset,
            p.temperature * _entropy(log_std) - cost,
        ]
    )


def performance(p: LQChain, theta: np.ndarray, nodes: np.ndarray) -> float | complex:
    """V(0, start) of the chain, backward."""
    square, linear, constant = chain_value(p, theta, nodes)[0]
    return square * p.start**2 / 2 + linear * p.start + constant


def state_moments(p: LQChain, theta: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """(E X, E X^2) at every node of the chain, [nodes, 2]: forward recursion."""
    gain, offset, log_std = theta
    variance = np.exp(2 * log_std)
    sigma, slope = p.noise + p.noise_push * offset, p.noise_slope + p.noise_push * gain
    mean, square = p.start, p.start**2
    moments = [(mean, square)]
    for h in np.diff(nodes):
        f, b = 1 + h * (p.drift_slope + p.push * gain), h * p.push * offset
        mean_square = f**2 * square + 2 * f * b * mean + b**2 + variance * (h * p.push) ** 2
        noise_square = slope**2 * square + 2 * slope * sigma * mean + sigma**2
        mean, square = f * mean + b, mean_square + h * (noise_square + variance * p.noise_push**2)
        moments.append((mean, square))
    return np.array(moments)


def forward_performance(p: LQChain, theta: np.ndarray, nodes: np.ndarray) -> float | complex:
    """V(0, start) of the chain, from the moments of its states."""
    gain, offset, log_std = theta
    moments, total = state_moments(p, theta, nodes), 0.0
    for (mean, square), t, h in zip(moments, nodes, np.diff(nodes), strict=False):
        action = gain**2 * square + 2 * gain * offset * mean + offset**2 + np.exp(2 * log_std)
        paid = p.temperature * _entropy(log_std)
        paid = paid - (p.state_cost * square + p.action_cost * action) / 2
        total = total + np.exp(-p.discount * (t - nodes[0])) * h * paid
    end = np.exp(-p.discount * (nodes[-1] - nodes[0]))
    return total - end * p.terminal_cost * moments[-1, 1] / 2


def value_series(p: LQChain, theta: np.ndarray, terms: int = 20) -> np.ndarray:
    """(p, e, c) of V(t, x) in continuous time, in powers of the time that is left, [terms, 3].

    The backward equations are linear with constant coefficients, so the series converge always.
    """
    gain, offset, log_std = theta
    variance = np.exp(2 * log_std)
    sigma, slope = p.noise + p.noise_push * offset, p.noise_slope + p.noise_push * gain
    pull, shift = p.drift_slope + p.push * gain, p.push * offset
    paid = p.temperature * _entropy(log_std) - p.action_cost * (offset**2 + variance) / 2
    series = np.zeros((terms, 3), dtype=np.result_type(theta, float))
    series[0, 0] = -p.terminal_cost
    for j in range(terms - 1):
        first = float(j == 0)
        square, linear, constant = series[j]
        d_square = (2 * pull + slope**2 - p.discount) * square
        d_square -= first * (p.state_cost + p.action_cost * gain**2)
        d_linear = (pull - p.discount) * linear + (shift + slope * sigma) * square
        d_linear -= first * p.action_cost * gain * offset
        d_constant = -p.discount * constant + shift * linear
        d_constant += (sigma**2 + variance * p.noise_push**2) * square / 2 + first * paid
        series[j + 1] = np.array([d_square, d_linear, d_constant]) / (j + 1)
    return series


def series_at(series: np.ndarray, left: float) -> np.ndarray:
    """(p, e, c) with this much time left."""
    return np.asarray(np.polynomial.polynomial.polyval(left, series))


def continuous_performance(p: LQChain, theta: np.ndarray, horizon: float) -> float | complex:
    """V(0, start) in continuous time."""
    square, linear, constant = series_at(value_series(p, theta), horizon)
    return square * p.start**2 / 2 + linear * p.start + constant


def q_rate_gradient(
    p: LQChain, theta: np.ndarray, nodes: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """sum h_k e^{-discount t_k} E[ grad log pi (q - temperature log pi) ] along the chain, [3].

    By Stein's identity: E[(a - mu) f(a)] / s^2 = E f'(a), E[((a - mu)^2 / s^2 - 1) f] = s^2 E f''.

    Args:
        p: the problem.
        theta: of the policy.
        nodes: times of the chain.
        values: (p, e, c) of the value function that q is made of, at every node.
    """
    gain, offset, log_std = theta
    total = np.zeros(3)
    moments = state_moments(p, theta, nodes)
    for (mean, square), (curve, tilt, _), t, h in zip(
        moments, values, nodes, np.diff(nodes), strict=False
    ):
        bend = curve * p.noise_push**2 - p.action_cost  # q'' in the action
        # q' at the mean action is slope x + constant
        slope = curve * (p.push + p.noise_push * p.noise_slope) + bend * gain
        constant = p.push * tilt + curve * p.noise_push * p.noise + bend * offset
        each = (
            slope * square + constant * mean,
            slope * mean + constant,
            np.exp(2 * log_std) * bend + p.temperature,
        )
        total += np.exp(-p.discount * (t - nodes[0])) * h * np.array(each)
    return total


def regularised_q(
    p: LQChain, value: np.ndarray, decay: np.ndarray, theta: np.ndarray
) -> np.ndarray:
    """E_{a ~ theta}[ q - temperature log pi ] as a polynomial, coefficients of (x^2, x, 1), [3].

    Args:
        p: the problem.
        value: (p, e, c) of the value function that q is made of.
        decay: their derivatives in the time that is left.
        theta: of the policy that draws the actions.
    """
    (gain, offset, log_std), (square, linear, _) = theta, value
    variance = np.exp(2 * log_std)
    sigma, slope = p.noise + p.noise_push * offset, p.noise_slope + p.noise_push * gain
    pull, shift = p.drift_slope + p.push * gain, p.push * offset
    noise_term = square * (sigma**2 + p.noise_push**2 * variance) / 2
    cost = p.action_cost * (offset**2 + variance) / 2
    paid = p.temperature * _entropy(log_std)
    averages = np.array(
        [
            (2 * pull + slope**2) * square / 2 - (p.state_cost + p.action_cost * gain**2) / 2,
            pull * linear + shift * square + square * slope * sigma - p.action_cost * gain * offset,
            shift * linear + noise_term - cost + paid,
        ]
    )
    halves = np.array([0.5, 1.0, 1.0])
    return averages - halves * (decay + p.discount * value)


def q_rate_sum(
    p: LQChain,
    nodes: np.ndarray,
    valued: np.ndarray,
    visiting: np.ndarray,
    acting: np.ndarray,
) -> float:
    """sum h_k e^{-discount t_k} E[ q - temperature log pi ] along an Euler chain.

    Args:
        p: the problem.
        nodes: of the chain, the last one the horizon.
        valued: the policy whose value in continuous time q is made of.
        visiting: the policy whose chain's states count.
        acting: the policy that draws the actions at these states.
    """
    series, total = value_series(p, valued), 0.0
    decays = np.polynomial.polynomial.polyder(series)
    moments = state_moments(p, visiting, nodes)
    for (mean, square), t, h in zip(moments, nodes, np.diff(nodes), strict=False):
        left = nodes[-1] - t
        rates = regularised_q(p, series_at(series, left), series_at(decays, left), acting)
        paid = rates @ np.array([square, mean, 1.0])
        total += h * np.exp(-p.discount * (t - nodes[0])) * paid
    return total


def transition_gradient(
    p: LQChain, theta: np.ndarray, nodes: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """sum h_k e^{-discount t_k} E[ push V'(t_k, X_k) (X_k, 1) ] along the chain, [2]."""
    total, moments = np.zeros(2), state_moments(p, theta, nodes)
    for (mean, square), (curve, tilt, _), t, h in zip(
        moments, values, nodes, np.diff(nodes), strict=False
    ):
        slope = np.array([curve * square + tilt * mean, curve * mean + tilt])
        total = total + np.exp(-p.discount * (t - nodes[0])) * h * p.push * slope
    return total


def own_slope(p: LQChain, theta: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """d / d(gain, offset) of what the actions cost, the states held, [2]."""
    (gain, offset, _), moments = theta, state_moments(p, theta, nodes)
    total = np.zeros(2)
    for (mean, square), t, h in zip(moments, nodes, np.diff(nodes), strict=False):
        slope = np.array([gain * square + offset * mean, gain * mean + offset])
        total = total - np.exp(-p.discount * (t - nodes[0])) * h * p.action_cost * slope
    return total


def average_advantages(
    p: LQChain, theta: np.ndarray, nodes: np.ndarray, values: np.ndarray, rate: float
) -> np.ndarray:
    """(p, e, c) of E[ A_k | X_k = x ] at every step, A made of these values: [steps, 3].

    A_k = sum_l e^{-(discount + rate) (t_l - t_k)} delta_l, so backwards A = delta + keep E A'. It
    is 0 where the values are the chain's own.
    """
    ahead, backward = np.zeros(3), []
    for k in range(len(nodes) - 2, -1, -1):
        h = nodes[k + 1] - nodes[k]
        delta = np.exp(-p.discount * h) * _expected_next(p, theta, h, values[k + 1]) - values[k]
        delta = delta + _expected_reward(p, theta, h)
        ahead = delta + np.exp(-(p.discount + rate) * h) * _expected_next(p, theta, h, ahead)
        backward.append(ahead)
    return np.array(backward[::-1])


def baseline_rate(p: LQChain, theta: np.ndarray, horizon: float, rate: float) -> float:
    """E[ A_0 ] / h at the start as h -> 0, with V of the continuous-time problem; A as above.

    The recursion on 200 and 400 steps, extrapolated: errors of O(h^2).
    """
    series, advantages = value_series(p, theta), []
    for steps in (200, 400):
        nodes = np.linspace(0, horizon, steps + 1)
        values = np.array([series_at(series, horizon - t) for t in nodes])
        row = average_advantages(p, theta, nodes, values, rate)[0]
        advantages.append(row @ np.array([p.start**2 / 2, p.start, 1.0]) * steps / horizon)
    return float(2 * advantages[1] - advantages[0])


def expected_advantage(
    p: LQChain,
    theta: np.ndarray,
    nodes: np.ndarray,
    values: np.ndarray,
    rate: float,
    action: float,
) -> float:
    """E[ A_0 | X_0 = start, a_0 = action ], by the law of X_1."""
    x, h = p.start, nodes[1] - nodes[0]
    gain, offset, log_std = theta
    mean = x + h * (p.drift_slope * x + p.push * action)
    variance = h * (p.noise + p.noise_slope * x + p.noise_push * action) ** 2
    after = np.exp(-p.discount * h) * values[1]
    if len(nodes) > 2:
        later = average_advantages(p, theta, nodes, values, rate)[1]
        after = after + np.exp(-(p.discount + rate) * h) * later
    z = (action - gain * x - offset) / np.exp(log_std)
    log_prob = -0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)
    paid = -(p.state_cost * x**2 + p.action_cost * action**2) / 2 - p.temperature * log_prob
    ahead = after @ np.array([(mean**2 + variance) / 2, mean, 1.0])
    return float(ahead + h * paid - values[0] @ np.array([x**2 / 2, x, 1.0]))


def q_difference(
    p: LQChain, theta: np.ndarray, value: np.ndarray, action: float, other: float
) -> float:
    """q - temperature log pi of one action less that of another, at the start."""
    (gain, offset, log_std), (square, linear, _), x = theta, value, p.start
    slope = p.push * (square * x + linear) + square * p.noise_push * (p.noise + p.noise_slope * x)
    bend = square * p.noise_push**2 - p.action_cost
    mean, variance = gain * x + offset, np.exp(2 * log_std)
    farther = ((action - mean) ** 2 - (other - mean) ** 2) / (2 * variance)
    rate_gap = slope * (action - other) + bend * (action**2 - other**2) / 2
    return float(rate_gap + p.temperature * farther)


def held_action_slope(p: LQChain, theta: np.ndarray, horizon: float) -> float:
    """d V(0) / d log_std by the step size, to first order, for a terminal reward alone.

    Held over a step of size h an action's noise adds (push s h)^2 to the state's variance, so
    1/h times -terminal_cost E e^{-discount T} sum e^{2 pull (T - t)} (push s h)^2, as h -> 0.
    """
    gain, _, log_std = theta
    pull = p.drift_slope + p.push * gain
    grown = (np.exp(2 * pull * horizon) - 1) / (2 * pull)
    paid = -p.terminal_cost * np.exp(-p.discount * horizon)
    return float(paid * grown * p.push**2 * np.exp(2 * log_std))


def _entropy(log_std: float | complex) -> float | complex:
    return 0.5 * np.log(2 * np.pi * np.e) + log_std
