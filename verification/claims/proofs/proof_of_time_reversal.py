"""The Fokker-Planck equation of the generation SDE is solved by the noised laws.

Time reversal: with the exact score, dX = [beta x / 2 + (1 + eta^2) / 2 beta score] dt
+ eta sqrt(beta) dW has the noised laws N(alpha m, alpha^2 S + 1 - alpha^2) as marginals,
for every eta: eta = 1 is the reverse SDE, eta = 0 the probability-flow ODE.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Anderson 1982; Song et al. 2021, section 4; Zhang & Chen 2022, 2204.13902"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """The Fokker-Planck equation of the generation SDE is solved by the noised laws."""
    rate, eta = sp.symbols("beta eta", positive=True)
    density = f.noised(sp.exp(-rate * (f.T - f.t) / 2))  # constant beta, noising time T - t
    score = sp.diff(sp.log(density), f.x)
    drift = f.generation_drift(score, rate, eta)
    left = f.fokker_planck(density, drift, eta**2 * rate) / density
    yield proof("Fokker-Planck residual, every eta", f.remainder(left))
    flow = f.fokker_planck(density, f.generation_drift(score, rate, sp.Integer(0)), sp.Integer(0))
    yield proof("continuity equation of the ODE", f.remainder(flow / density))


MISTAKES = """
verification.symbolic.generation_drift
    score weight 1 for (1 + eta^2) / 2 | `(1 + eta**2) / 2 * ` => ``
    probability-flow factor 1/2 dropped | (1 + eta**2) / 2 => (1 + eta**2)
    sign of the score | + (1 + => - (1 +
    sign of the drift | return rate => return -rate
verification.symbolic.noised
    alpha for alpha^2 in the variance | signal**2 * S => signal * S
verification.symbolic.fokker_planck
    diffusion term not halved | - variance / 2 => - variance
"""
