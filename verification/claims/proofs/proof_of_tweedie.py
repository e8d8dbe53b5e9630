"""Tweedie's formula against Bayes' rule.

Tweedie: E[Y_0 | Y_s = x] = (x + sigma_s^2 score(x)) / alpha_s, which for data N(m, S) is
m + alpha S / (alpha^2 S + sigma^2) (x - alpha m); and its derivative in x is
Var(Y_0 | x) alpha / sigma^2, with Var(Y_0 | x) = sigma^2 S / (alpha^2 S + sigma^2).
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Robbins 1956; Efron 2011; Bayes' rule for Gaussians"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """Tweedie's formula against Bayes' rule."""
    alpha = sp.Symbol("alpha", positive=True)
    formula = f.tweedie(alpha)
    yield proof("Tweedie - Bayes", f.remainder(formula - f.posterior_mean(alpha)))
    noise = 1 - alpha**2
    posterior_variance = noise * f.S / (alpha**2 * f.S + noise)
    left = sp.diff(formula, f.x) - posterior_variance * alpha / noise
    yield proof("its derivative - Var alpha / sigma^2", f.remainder(left))


MISTAKES = """
verification.symbolic.tweedie
    sigma for sigma^2 | (1 - signal**2) * score => sp.sqrt(1 - signal**2) * score
    alpha^2 for alpha | / signal => / signal**2
    sign of the score | `(x + ` => `(x - `
verification.symbolic.posterior_mean
    gain S / variance | signal * S / => S /
    mean not scaled | (x - signal * m) => (x - m)
"""
