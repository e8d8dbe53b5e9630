"""The closed forms of Ornstein-Uhlenbeck laws solve their own equations.

Ornstein-Uhlenbeck: m' = y - N m and P' = g^2 - 2 N P are solved by the closed forms, and
the path KL's closed form grows by E|u|^2 / 2 and starts at 0.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Karatzas & Shreve 5.6 (linear equations), 3.5 (Girsanov)"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """The closed forms of Ornstein-Uhlenbeck laws solve their own equations."""
    mean, variance = f.ou_mean(f.t), f.ou_variance(f.t)
    yield proof("m' - (y - N m)", f.remainder(sp.diff(mean, f.t) - (f.y - f.N * mean)))
    rate = f.g**2 - 2 * f.N * variance
    yield proof("P' - (g^2 - 2 N P)", f.remainder(sp.diff(variance, f.t) - rate))
    grown = sp.diff(f.ou_path_kl(f.t), f.t) - f.ou_kl_rate(f.t)
    yield proof("d KL / dt - E|u|^2 / 2", f.remainder(grown))
    yield proof("KL over no time", f.remainder(f.ou_path_kl(sp.Integer(0))))


MISTAKES = """
verification.symbolic.ou_mean
    mean decays twice as fast | exp(-N => exp(-2 * N
verification.symbolic.ou_variance
    variance decays like the mean | -2 * N => -N
    stationary variance g^2 / N | (2 * N) => N
verification.symbolic.ou_path_kl
    cross term once | - 2 * N * y * first => - N * y * first
    elapsed time off by one | y**2 * time) => y**2 * (time - 1))
    spread of the start left out | (P - limit) * e2 => -limit * e2
    factor 1/2 dropped | / (2 * g**2) => / g**2
verification.symbolic.ou_kl_rate
    diffusion not squared | 2 * g**2 => 2 * g
"""
