"""Gibbs policies, the soft maximum, and the HJB equation of exploratory LQ.

Soft maximum: gam log int exp(H / gam) da = max_a H + gam / 2 log(2 pi gam / N) for
H concave in a; pi* = N(u V_x / N, gam / N) attains it. V = -p x^2 / 2 + c solves the HJB
equation if and only if p and c solve
p' = -2 y p + u^2 p^2 / N - s and c' = g^2 p / 2 - gam / 2 log(2 pi gam / N).
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Wang, Zariphopoulou & Zhou 2020, sections 3, 4; Jia & Zhou 2022b"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """Gibbs policies, the soft maximum, and the HJB equation of exploratory LQ."""
    slope, curvature, p = sp.symbols("slope curvature p", real=True)
    soft = f.soft_maximum(slope, curvature)
    left = soft - f.soft_maximum_by_integration(slope, curvature)
    yield proof("soft maximum - the Gaussian integral", f.remainder(left))
    mean, variance = f.gibbs(slope)
    averaged = f.mean_of(f.hamiltonian(slope, curvature, f.a), f.a, mean, variance)
    entropy = sp.log(2 * sp.pi * sp.E * variance) / 2
    left = averaged + f.gam * entropy - soft
    yield proof("E_pi*[H - gam log pi*] - soft maximum", f.remainder(left))
    hessian = sp.Symbol("V_xx", real=True)
    by_hand = f.y * f.x * slope + f.u * f.a * slope + f.g**2 * hessian / 2
    by_hand -= (f.s * f.x**2 + f.N * f.a**2) / 2
    left = f.hamiltonian(slope, hessian, f.a) - by_hand
    yield proof("the Hamiltonian, written out", f.remainder(left))
    yield proof("HJB residual of the quadratic value", f.remainder(sp.expand(f.hjb_of_lq(p))))


MISTAKES = """
verification.symbolic.soft_maximum
    an e too many: log(2 pi e gam / N) | 2 * sp.pi * gam / N => 2 * sp.pi * sp.E * gam / N
    soft minimum | best) + => best) -
verification.symbolic.gibbs
    N / gam for gam / N | gam / N => N / gam
    mean halved | u * slope / N => u * slope / (2 * N)
verification.symbolic.hamiltonian
    second-order term not halved | g**2 / 2 => g**2
    diffusion not squared | g**2 / 2 => g / 2
verification.symbolic.riccati
    Riccati: A for 2 A | -2 * y * p => -y * p
    Riccati: sign of the state cost | / N - s => / N + s
verification.symbolic.lq_constant_rate
    log-partition left out | - gam / 2 * sp.log(2 * sp.pi * gam / N) => ``
"""
