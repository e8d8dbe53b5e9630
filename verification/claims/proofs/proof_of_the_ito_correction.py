"""The Ito correction is what Heun's predictor adds.

Ito to Stratonovich: dX = b dt + sigma dW is dX = (b - sigma sigma' / 2) dt + sigma o dW:
a Heun step with that drift has the mean b h of the Ito equation, to first order in h.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Kloeden & Platen, Numerical Solution of SDEs, 4.9"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """The correction is what Heun's predictor adds."""
    drift, diffusion = sp.Function("b_")(f.x), sp.Function("sigma")(f.x)
    sample = {drift: sp.sin(f.x) - f.y * f.x, diffusion: f.g + sp.cos(f.x) / 3}
    converted = drift + f.ito_correction(diffusion)
    left = (f.heun_mean(converted, diffusion) - drift * f.h).subs(sample).doit()
    yield proof("mean of a Heun step - b h", f.remainder(sp.expand(left)))


MISTAKES = """
verification.symbolic.ito_correction
    correction left out | return -diffusion => return 0 * diffusion
    sign of the correction | return -diffusion => return diffusion
    without 1/2 | ` / 2` => ` / 1`
    sigma' for sigma sigma' | -diffusion * sp => -sp
verification.symbolic.heun_mean
    predictor left out | diffusion + slope * diffusion * e => diffusion + 0 * e
"""
