"""Constants of the well-posedness theorem, by Minkowski's, Doob's and Gronwall's inequalities.

    dX = b(X, a) dt + sigma(X) dW,   |b(x, a) - b(y, a')| <= L |x - y| + K |a - a'|,
    |sigma(x) - sigma(y)| <= s |x - y|,   |b(0, a)| <= b0,   |sigma(0)| <= sigma0

on Euler's chain with steps h. Two solutions share the noise; D is their difference. The step is
D' = D + h db + dsigma dW, and the noise has mean 0 and variance h given the past: so

    E D'^2 = E (D + h db)^2 + h E dsigma^2                                   (no cross term)
    |D'|_2^2 <= ((1 + L h) |D|_2 + K h |da|_2)^2 + h s^2 |D|_2^2             (Minkowski)
    |max D|_2 <= |D_0| + sum h (L |max D|_2 + K |da|_2) + 2 (sum h s^2 |max D|_2^2)^(1/2)   (Doob)

and Gronwall's lemma is the statement that u = right side, step by step, is larger than the left.
X itself is the case Y = 0 with b0 and sigma0 for what 0 is driven by.
"""

import numpy as np


def flow(L: float, steps: np.ndarray) -> float:
    """prod (1 + L h): of |X - Y| where the noise is additive, on every path; tends to e^{L T}."""
    return float(np.prod(1 + L * steps))


def driven(L: float, push: float, steps: np.ndarray) -> float:
    """sum h push prod (1 + L h): what a constant push of the drift moves; push (e^{LT} - 1) / L."""
    displacement = 0.0
    for h in steps:
        displacement = (1 + L * h) * displacement + h * push
    return displacement


def mean_square(
    start: float, steps: np.ndarray, *, L: float, s: float, b0: float = 0.0, sigma0: float = 0.0
) -> float:
    """Bound of E |.|^2 at the last node; if b0 = sigma0 = 0 it tends to e^{(2 L + s^2) T} start^2.

    Args:
        start: its size at the first node.
        steps: of the grid.
        L: Lipschitz (or growth) constant of the drift.
        s: of the diffusion.
        b0: push of the drift.
        sigma0: level of the diffusion.
    """
    size = start
    for h in steps:
        size = np.sqrt(((1 + L * h) * size + h * b0) ** 2 + h * (s * size + sigma0) ** 2)
    return float(size**2)


def largest(
    start: float, steps: np.ndarray, *, L: float, s: float, b0: float = 0.0, sigma0: float = 0.0
) -> float:
    """Bound of E max |.|^2 over all nodes, by Doob's inequality; arguments as ``mean_square``."""
    doob = 2.0
    size, drifted, noise = start, 0.0, 0.0
    for h in steps:
        drifted += h * (L * size + b0)
        noise += h * (s * size + sigma0) ** 2
        size = start + drifted + doob * np.sqrt(noise)
    return float(size**2)


def exploding(start: float, time: float) -> float:
    """X of dX = X^2 dt: 1 / (1 / start - time), infinite from time 1 / start on."""
    return 1 / (1 / start - time)


def branching(start: float, time: float) -> float:
    """X of dX = sqrt(X) dt from start > 0: (sqrt(start) + time / 2)^2; from 0 it may stay there."""
    return float((np.sqrt(start) + time / 2) ** 2)
