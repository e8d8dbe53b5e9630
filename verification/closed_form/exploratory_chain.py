"""A scalar exploratory linear-quadratic problem on a grid: values, q-rates, and their mistakes.

    X' = X + h (drift X + control a) + noise dW,    a ~ N(gain X + offset, std^2) held over a step
    reward   -(state_cost X^2 + action_cost a^2) / 2 - temperature log pi  per unit of time,
             terminal_slope X - terminal_cost X^2 / 2 at the end;  discounted continuously
    start    N(mean, std^2)

Everything is a polynomial of normals, so expectations follow from three rules:
    E p(X') given X     = p(m) + v/2 p''(m), m and v its mean and variance, for p of degree 3
    E[eps f(eps)]       = E f'(eps)                (Stein), eps a standard normal
    E[(eps^2 - 1) f]    = E f''(eps)
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

from verification.answers import remembered


@dataclass(frozen=True)
class Feedback:
    """A Gaussian policy N(gain x + offset, std^2)."""

    gain: float = -0.6
    offset: float = 0.25
    std: float = 0.67

    def mean(self) -> Polynomial:
        """Its mean, of x."""
        return Polynomial([self.offset, self.gain])

    def entropy(self) -> float:
        """Differential, nats."""
        return 0.5 * math.log(2 * math.pi * math.e * self.std**2)


@dataclass(frozen=True)
class ExploratoryChain:
    """The numbers of the problem; no two equal, none 0 or 1."""

    drift: float = -0.7
    control: float = 0.9
    noise: float = 0.55
    state_cost: float = 0.8
    action_cost: float = 0.5
    terminal_slope: float = 0.4
    terminal_cost: float = 1.3
    discount: float = 0.3
    temperature: float = 0.2
    mean: float = 0.7
    std: float = 0.45

    def after(self, policy: Feedback, h: float) -> tuple[Polynomial, float]:
        """Mean of X' as a polynomial of X, and its variance."""
        mean = Polynomial([0, 1 + h * self.drift]) + h * self.control * policy.mean()
        return mean, self.noise**2 * h + (h * self.control * policy.std) ** 2


def expected(p: Polynomial, mean: Polynomial | float, variance: float) -> Any:
    """E p(Y) of Y ~ N(mean, variance), p of degree 5 at most: a polynomial if the mean is one."""
    return p(mean) + variance / 2 * p.deriv(2)(mean) + variance**2 / 8 * p.deriv(4)(mean)


def reward(c: ExploratoryChain, policy: Feedback) -> Polynomial:
    """Mean running reward with the entropy's share, of x, reward/time."""
    square = policy.mean() ** 2 + policy.std**2
    cost = c.state_cost * Polynomial([0, 0, 1]) + c.action_cost * square
    return c.temperature * policy.entropy() - cost / 2


@remembered
def values(c: ExploratoryChain, policy: Feedback, nodes: np.ndarray) -> list[Polynomial]:
    """V of every node by backward recursion."""
    backward = [Polynomial([0, c.terminal_slope, -c.terminal_cost / 2])]
    for h in np.diff(nodes)[::-1]:
        later = expected(backward[-1], *c.after(policy, h))
        backward.append(np.exp(-c.discount * h) * later + h * reward(c, policy))
    return backward[::-1]


def stationary(
    c: ExploratoryChain, policy: Feedback, h: float, discount: float
) -> tuple[Polynomial, float]:
    """V = keep E V(X') + (reward - average) h for equal steps without end, V(0) = 0 if ergodic.

    Returns:
        V, and the average reward (0 where there is a discount).
    """
    keep, gain = np.exp(-discount * h), reward(c, policy).coef
    mean, variance = c.after(policy, h)
    b, f = mean.coef
    curved = h * gain[2] / (1 - keep * f**2)
    sloped = (h * gain[1] + keep * 2 * curved * f * b) / (1 - keep * f)
    constant = h * gain[0] + keep * (curved * (b**2 + variance) + sloped * b)
    if discount:
        return Polynomial([constant / (1 - keep), sloped, curved]), 0.0
    return Polynomial([0, sloped, curved]), float(constant / h)


def state_laws(
    c: ExploratoryChain, policy: Feedback, nodes: np.ndarray
) -> list[tuple[float, float]]:
    """Mean and variance of X at every node."""
    laws = [(c.mean, c.std**2)]
    for h in np.diff(nodes):
        mean, variance = c.after(policy, h)
        m, v = laws[-1]
        laws.append((float(mean(m)), float(mean.coef[1] ** 2 * v + variance)))
    return laws


@remembered
def rates(c: ExploratoryChain, policy: Feedback, nodes: np.ndarray) -> np.ndarray:
    """q of every step, (E[e^{-discount h} V' | x, a] - V) / h + r, without the entropy.

    Returns:
        Its coefficients [steps, 6] of 1, x, x^2, a, a x, a^2.
    """
    by_step, along = [], values(c, policy, nodes)
    for k, h in enumerate(np.diff(nodes)):
        constant, slope, curvature = np.exp(-c.discount * h) * along[k + 1].coef
        f, b = 1 + h * c.drift, h * c.control  # X' = f x + b a + noise dW
        later = [
            constant + curvature * c.noise**2 * h,
            slope * f,
            curvature * f**2,
            slope * b,
            curvature * 2 * f * b,
            curvature * b**2,
        ]
        here = [*along[k].coef, 0, 0, 0]
        paid = [0, 0, -c.state_cost / 2, 0, 0, -c.action_cost / 2]
        by_step.append((np.array(later) - np.array(here)) / h + np.array(paid))
    return np.array(by_step)


def moments_of_a_wrong_value(
    c: ExploratoryChain, policy: Feedback, nodes: np.ndarray, error: Polynomial
) -> np.ndarray:
    """E int e^{-discount t} xi dM for J = V + error before the end, and J = V at the end.

    Returns:
        For xi = 1, x, x^2, x eps, eps^2 - 1, where eps is the noise of the action of the step
        before (at the first step the last two are 0).
    """
    laws, steps, x = state_laws(c, policy, nodes), np.diff(nodes), Polynomial([0, 1])
    total = np.zeros(5)
    for k, h in enumerate(steps):
        gap = -error
        if k < len(steps) - 1:
            gap = gap + np.exp(-c.discount * h) * expected(error, *c.after(policy, h))
        moments = [expected(p * gap, *laws[k]) for p in (x**0, x, x**2)]
        pushed = steps[k - 1] * c.control * policy.std if k else 0.0  # d x_k / d eps
        moments.append(pushed * expected((x * gap).deriv(), *laws[k]))
        moments.append(pushed**2 * expected(gap.deriv(2), *laws[k]))
        total += np.exp(-c.discount * (nodes[k] - nodes[0])) * np.array(moments)
    return total


def look_ahead(c: ExploratoryChain, policy: Feedback, nodes: np.ndarray) -> float:
    """sum_k e^{-discount t_k} E[X_{k+1} dM_k] of the true value: what not being adapted gives."""
    laws, along, total = state_laws(c, policy, nodes), values(c, policy, nodes), 0.0
    for k, h in enumerate(np.diff(nodes)):
        mean, variance = c.after(policy, h)
        # Cov(X', V(X')) = variance E V'(X');  Cov(X', -cost a^2 / 2) = -b std^2 cost E a
        with_value = variance * np.exp(-c.discount * h) * along[k + 1].deriv()(mean(laws[k][0]))
        pushed = h * c.control * policy.std**2
        with_reward = -h * c.action_cost * pushed * policy.mean()(laws[k][0])
        total += np.exp(-c.discount * (nodes[k] - nodes[0])) * (with_value + with_reward)
    return float(total)


def entropy_rate(c: ExploratoryChain, policy: Feedback) -> np.ndarray:
    """temperature log pi, as coefficients of 1, x, x^2, a, a x, a^2."""
    g, o, half = policy.gain, policy.offset, 0.5 / policy.std**2
    square = half * np.array(
        [o**2, 2 * o * g, g**2, -2 * o, -2 * g, 1]
    )  # (a - g x - o)^2 / 2 std^2
    log_norm = np.log(policy.std * np.sqrt(2 * np.pi))
    return -c.temperature * (square + log_norm * np.eye(6)[0])


def in_noise(rate: np.ndarray, behaviour: Feedback) -> list[Polynomial]:
    """A rate at a = its mean + std eps, as polynomials of x that go with 1, eps, eps^2."""
    m, s, x = behaviour.mean(), behaviour.std, Polynomial([0, 1])
    still = Polynomial(rate[:3]) + (rate[3] + rate[4] * x) * m + rate[5] * m**2
    return [still, s * (rate[3] + rate[4] * x + 2 * rate[5] * m), s**2 * rate[5] * x**0]


@remembered
def moments_of_a_wrong_pair(
    c: ExploratoryChain,
    behaviour: Feedback,
    nodes: np.ndarray,
    error: Polynomial,
    rate_error: np.ndarray,
) -> np.ndarray:
    """E int e^{-discount t} xi dM for V + error before the end and q + rate_error.

    Args:
        c: the problem.
        behaviour: whose actions the paths took; the pair may be any policy's.
        nodes: times.
        error: of V, quadratic.
        rate_error: of q, [steps, 6].

    Returns:
        For xi = 1, x, x^2, x eps, eps^2 - 1, eps the noise of the step's own action.
    """
    laws, steps, x = state_laws(c, behaviour, nodes), np.diff(nodes), Polynomial([0, 1])
    total = np.zeros(5)
    for k, h in enumerate(steps):
        keep = np.exp(-c.discount * h) if k < len(steps) - 1 else 0.0
        ahead, _ = c.after(behaviour, h)
        pushed = h * c.control * behaviour.std  # X' = ahead + pushed eps + noise dW
        off = in_noise(rate_error[k], behaviour)
        still = keep * expected(error, ahead, c.noise**2 * h) - error - h * off[0]
        sloped = keep * pushed * error.deriv()(ahead) - h * off[1]
        curved = keep * pushed**2 * error.deriv(2)(ahead) / 2 - h * off[2]
        moments = [expected(p * (still + curved), *laws[k]) for p in (x**0, x, x**2)]
        moments += [expected(x * sloped, *laws[k]), expected(2 * curved, *laws[k])]
        total += np.exp(-c.discount * (nodes[k] - nodes[0])) * np.array(moments)
    return total


def slope_of_the_martingale_loss(
    c: ExploratoryChain, policy: Feedback, behaviour: Feedback, nodes: np.ndarray, rate: np.ndarray
) -> float:
    """d/dpsi E sum_k h_k (M_T - M_k)^2 at the true pair, q changed by psi rate, along behaviour.

    d(M_T - M_k)/dpsi = -sum_{l >= k} e^{-discount t_l} rate(x_l, a_l) h_l, and dM_j is correlated
    with rate(x_l, a_l) for j < l only, through the mean of the rate given x_l. If that is 0, as it
    is on-policy for q with a constraint, so is the slope.
    """
    along, laws, steps = values(c, policy, nodes), state_laws(c, behaviour, nodes), np.diff(nodes)
    off = in_noise(rate, behaviour)
    action_mean = off[0] + off[2]
    factors = np.exp(-c.discount * (nodes[:-1] - nodes[0]))
    total, ahead = 0.0, Polynomial([0.0])  # sum_{l > j} e^{-discount t_l} h_l E[rate_l | x_{j + 1}]
    for j in range(len(steps) - 2, -1, -1):
        if j < len(steps) - 2:
            ahead = expected(ahead, *c.after(behaviour, steps[j + 1]))
        ahead = ahead + factors[j + 1] * steps[j + 1] * action_mean
        mean, variance = c.after(behaviour, steps[j])
        v, value = c.noise**2 * steps[j], np.exp(-c.discount * steps[j]) * along[j + 1]
        # Cov(V(X'), ahead(X') | x, a) at X' ~ N(y, v), then over y ~ N(mean(x), variance - v)
        both = v * value.deriv() * ahead.deriv() + v**2 / 2 * value.deriv(2) * ahead.deriv(2)
        m, state_variance = laws[j]
        where = (float(mean(m)), float(mean.coef[1] ** 2 * state_variance + variance - v))
        total -= 2 * factors[j] * (nodes[j + 1] - nodes[0]) * float(expected(both, *where))
    return total


def slope_of_squares(
    c: ExploratoryChain,
    policy: Feedback,
    behaviour: Feedback,
    nodes: np.ndarray,
    direction: Polynomial,
) -> float:
    """d/dtheta E sum_k dM_k^2 at the true pair, V changed by theta direction before the end.

    2 E dM_k e^{-discount h} direction(X') = 2 e^{-2 discount h} E Cov(V(X'), direction(X') | x, a):
    what is random in V' is squared, and does not average out.
    """
    along, laws, steps = values(c, policy, nodes), state_laws(c, behaviour, nodes), np.diff(nodes)
    total = 0.0
    for k, h in enumerate(steps[:-1]):
        mean, variance = c.after(behaviour, h)
        v, value, (m, state_variance) = c.noise**2 * h, along[k + 1], laws[k]
        both = v * value.deriv() * direction.deriv() + v**2 / 2 * value.deriv(2) * direction.deriv(
            2
        )
        where = (float(mean(m)), float(mean.coef[1] ** 2 * state_variance + variance - v))
        total += 2 * np.exp(-2 * c.discount * h) * float(expected(both, *where))
    return total
