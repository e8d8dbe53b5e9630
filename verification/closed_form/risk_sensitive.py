"""Certainty equivalents of a linear-quadratic chain in one dimension, from their definition.

    X' = X + (PULL X + PUSH a + DRIFT) h + NOISE sqrt(h) z
    paid per step: h times -(STATE x^2 + ACTION a^2)/2 - TILT x; at the end -(END x^2)/2 - LAST x

Backwards, V_k(x) = best_a [ paid + 1/risk log E exp(risk V_{k+1}(X')) ], a Gaussian integral: no
differential equation appears. The values of the diffusion are limits h -> 0, extrapolated.
"""

import math

import numpy as np

from verification.answers import remembered
from verification.closed_form.extrapolation import extrapolated

PULL, PUSH, DRIFT, NOISE = -0.4, 1.2, 0.3, 0.6
STATE, ACTION, TILT = 0.9, 0.7, 0.25
END, LAST = 1.1, -0.5
HORIZON, TEMPERATURE = 0.8, 0.15
STEPS = tuple(32 * 2**k for k in range(6))  # of the chains that are extrapolated

Coefficients = tuple[float, float, float]
"""S, e, c of S x^2 / 2 + e x + c."""


def equivalent(after: Coefficients, variance: float, risk: float) -> Coefficients:
    """1/risk log E exp(risk V(m + N(0, variance))), a quadratic of m."""
    S, e, c = after
    shrink = 1 - risk * S * variance
    constant = c + 0.5 * risk * e**2 * variance / shrink - math.log(shrink) / (2 * risk)
    return S / shrink, e / shrink, constant


def of_affine(value: Coefficients, slope: float, shift: float) -> Coefficients:
    """Coefficients of x -> V(slope x + shift)."""
    S, e, c = value
    return S * slope**2, S * slope * shift + e * slope, 0.5 * S * shift**2 + e * shift + c


def backward(steps: int, risk: float, law: tuple[float, float] | None) -> np.ndarray:
    """S, e, c at time 0: of the policy N(gain x + offset, .) or, without one, the optimum.

    What a Gaussian policy adds by its variance is left to ``drawn``.
    """
    h = HORIZON / steps
    value = (-END, -LAST, 0.0)
    for _ in range(steps):
        S, e, c = equivalent(value, NOISE**2 * h, risk)
        if law is None:  # maximise -ACTION a^2 h / 2 + V(x + (PULL x + PUSH a + DRIFT) h)
            weight = ACTION - S * PUSH**2 * h
            gain = PUSH * S * (1 + PULL * h) / weight
            offset = PUSH * (S * DRIFT * h + e) / weight
        else:
            gain, offset = law
        slope, shift = 1 + (PULL + PUSH * gain) * h, (PUSH * offset + DRIFT) * h
        S, e, c = of_affine((S, e, c), slope, shift)
        value = (
            S - h * (STATE + ACTION * gain**2),
            e - h * (TILT + ACTION * gain * offset),
            c - h * ACTION * offset**2 / 2,
        )
    return np.array(value)


def drawn(std: float) -> float:
    """What drawing actions N(., std^2) adds to the value: entropy, less the cost of variance."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    return HORIZON * (TEMPERATURE * entropy - 0.5 * ACTION * std**2)


@remembered
def optimal(risk: float) -> np.ndarray:
    """S, e, c of the best value at time 0, entropy included."""
    value = extrapolated([backward(steps, risk, None) for steps in STEPS])
    return value + np.array([0.0, 0.0, drawn(math.sqrt(TEMPERATURE / ACTION))])


@remembered
def evaluated(risk: float, gain: float, offset: float, std: float) -> np.ndarray:
    """S, e, c of a policy's value at time 0."""
    value = extrapolated([backward(steps, risk, (gain, offset)) for steps in STEPS])
    return value + np.array([0.0, 0.0, drawn(std)])


def slope_in_gain(risk: float, gain: float, offset: float, x: float) -> float:
    """Derivative of V(0, x) in the gain, by differences of order 6."""
    total = 0.0
    for k, weight in ((1, 45 / 60), (2, -9 / 60), (3, 1 / 60)):
        up, down = (evaluated(risk, gain + s * k * 0.01, offset, 1.0) for s in (1, -1))
        total += weight * float((up - down) @ [x**2 / 2, x, 1.0]) / 0.01
    return total
