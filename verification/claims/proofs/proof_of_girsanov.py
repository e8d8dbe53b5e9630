"""Girsanov's density of one step, by symbols.

One Euler step: log of the ratio of the two Gaussian transition densities
= u dW + u^2 h / 2 with u = (b - b_ref) / g, for every dW; its mean under P is u^2 h / 2.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = 'Karatzas & Shreve 3.5; "Score as Action", arXiv 2502.01819, Theorem 3.1'
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """Girsanov's density, step by step."""
    increment, drift, reference = sp.symbols("dW drift reference", real=True)
    ratio = f.log_ratio((drift - reference) / f.g, increment, f.h)
    densities = f.transition_log_ratio(drift, reference, increment)
    yield proof("log-ratio - difference of the log-densities", f.remainder(ratio - densities))
    average = f.mean_of(ratio, increment, sp.Integer(0), f.h)
    energy = ((drift - reference) / f.g) ** 2 * f.h / 2
    yield proof("its mean - u^2 h / 2", f.remainder(average - energy))


MISTAKES = """
verification.symbolic.log_ratio
    factor 1/2 dropped | step / 2 => step
    sign of the quadratic term | increment + => increment -
    sign of the stochastic integral | return control => return -control
verification.symbolic.transition_log_ratio
    diffusion not squared | g**2 * h => g * h
"""
