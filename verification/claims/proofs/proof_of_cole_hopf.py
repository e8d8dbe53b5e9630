"""The value of KL-regularised control is a logarithmic expectation.

Cole-Hopf: V = b log E exp(r(X_T) / b) solves d_t V + g^2 / 2 V_xx + g^2 / (2 b) V_x^2 = 0,
here for r = -c x^2 / 2 and Brownian motion from X_t = x. Temperature b outside the
logarithm and 1 / b inside.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Fleming & Soner, chapter VI; Dai Pra 1991"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """The value of KL-regularised control is a logarithmic expectation."""
    curvature = sp.Symbol("c", positive=True)
    left = f.cole_hopf_residual(f.x, f.g**2 * (f.T - f.t), curvature)
    yield proof("HJB residual", f.remainder(left))
    ending = f.cole_hopf_value(f.x, sp.Integer(0), curvature) + curvature * f.x**2 / 2
    yield proof("V(T, x) - r(x)", f.remainder(ending))


MISTAKES = """
verification.symbolic.cole_hopf_value
    b for 1 / b | curvature / b => curvature * b
    outer b dropped | return b * ( => return (
    log-determinant left out | -sp.log(1 + variance * lam) / 2 - lam => -lam
verification.symbolic.cole_hopf_residual
    control term not halved | g**2 / (2 * b) => g**2 / b
    diffusion term not halved | g**2 / 2 * sp.diff(V, x, 2) => g**2 * sp.diff(V, x, 2)
"""
