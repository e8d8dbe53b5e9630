"""The optimal pair of a scalar exploratory linear-quadratic problem without end.

    dX = (drift X + control a) dt + (noise_slope X + noise_push a + noise) dW
    reward rate -(state_cost x^2 / 2 + cross x a + action_cost a^2 / 2 + pull x + push a)
    discount, and temperature per nat of entropy

V = k2 x^2 / 2 + k1 x + k0 solves discount V = temperature log int exp(H / temperature) da, and
q = temperature log pi, pi normal (Wang, Zariphopoulou & Zhou 2020).
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Endless:
    """The numbers of the problem; no two equal, none 0 or 1."""

    drift: float = -0.7
    control: float = 0.9
    noise_slope: float = 0.35
    noise_push: float = -0.25
    noise: float = 0.55
    state_cost: float = 0.8
    cross: float = 0.15
    action_cost: float = 0.5
    pull: float = -0.2
    push: float = 0.12
    discount: float = 0.3
    temperature: float = 0.4


def value(e: Endless) -> tuple[float, float, float]:
    """(k2, k1, k0): the concave solution, whose policy keeps the state in place."""
    with_control = e.control + e.noise_slope * e.noise_push
    # (k2 w - R)^2 + (k2 g - M) (N - k2 D^2) = 0, g = 2 A + C^2 - discount
    g = 2 * e.drift + e.noise_slope**2 - e.discount
    square = with_control**2 - g * e.noise_push**2
    linear = g * e.action_cost + e.state_cost * e.noise_push**2 - 2 * with_control * e.cross
    constant = e.cross**2 - e.state_cost * e.action_cost
    k2 = min(np.roots([square, linear, constant]).real)
    gain, strength = gain_of(e, k2), e.action_cost - k2 * e.noise_push**2
    pushed = k2 * e.noise_push * e.noise - e.push
    k1 = pushed * gain - e.pull + k2 * e.noise_slope * e.noise
    k1 /= e.discount - e.control * gain - e.drift
    noise_term = k2 * e.noise**2 / 2 + (k1 * e.control + pushed) ** 2 / (2 * strength)
    entropy = e.temperature / 2 * math.log(2 * math.pi * e.temperature / strength)
    return float(k2), float(k1), float((noise_term + entropy) / e.discount)


def gain_of(e: Endless, k2: float) -> float:
    """Slope in x of the best action against a value of this curvature."""
    strength = e.action_cost - k2 * e.noise_push**2
    return (k2 * (e.control + e.noise_slope * e.noise_push) - e.cross) / strength


def gibbs(e: Endless, k2: float, k1: float) -> tuple[float, float, float]:
    """(gain, offset, std) of exp(q / temperature) for V = k2 x^2 / 2 + k1 x, optimal or not."""
    strength = e.action_cost - k2 * e.noise_push**2
    offset = (k1 * e.control - e.push + k2 * e.noise_push * e.noise) / strength
    return gain_of(e, k2), offset, math.sqrt(e.temperature / strength)


def rate(e: Endless, value: np.ndarray, slope: np.ndarray, x: np.ndarray, a: np.ndarray):
    """q(t, x, a) of J(t, x) = value . (1, x, x^2), d_t J = slope . (1, x, x^2)."""
    in_time = slope[0] + slope[1] * x + slope[2] * x**2
    gradient, sigma = value[1] + 2 * value[2] * x, e.noise_slope * x + e.noise_push * a + e.noise
    generator = in_time + (e.drift * x + e.control * a) * gradient + sigma**2 * value[2]
    cost = e.state_cost * x**2 / 2 + e.cross * x * a + e.action_cost * a**2 / 2
    here = value[0] + value[1] * x + value[2] * x**2
    return generator - cost - e.pull * x - e.push * a - e.discount * here
