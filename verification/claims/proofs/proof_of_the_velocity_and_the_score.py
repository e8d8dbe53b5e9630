"""Velocities and scores determine each other.

Flow matching, X_t = (1 - t) X_0 + t eps: score = -(x + (1 - t) v) / t with
v = E[eps - X_0 | X_t = x]; the velocity's shift is -(t / (1 - t)) times the score's shift.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = "Lipman et al. 2023, arXiv 2210.02747; arXiv 2605.10759 (0 is data, 1 is noise)"
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """Velocities and scores determine each other."""
    time = sp.Symbol("tau", positive=True)
    score = f.score_from_velocity(f.velocity(time), time)
    yield proof("from the velocity - from the density", f.remainder(score - f.flow_score(time)))
    other = f.flow_score(time).subs({f.m: f.k, f.S: f.P})
    shift = f.velocity(time).subs({f.m: f.k, f.S: f.P}) - f.velocity(time)
    left = shift + time / (1 - time) * (other - f.flow_score(time))
    yield proof("shift of v + t / (1 - t) shift of the score", f.remainder(left))


MISTAKES = """
verification.symbolic.score_from_velocity
    t for 1 - t | (1 - time) => time
    sign of the velocity | x + (1 => x - (1
    divided by t^2 | / time => / time**2
verification.symbolic.velocity
    covariance's sign | time - (1 - time) * S => time + (1 - time) * S
"""
