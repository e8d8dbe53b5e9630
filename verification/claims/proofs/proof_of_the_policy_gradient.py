"""The likelihood-ratio form and the pathwise form of the policy gradient are one.

Policy gradient with a terminal reward: q = g^2 V_x (a - mean) gives
E[d log pi / d mean q] = g^2 V_x, whatever the exploration's variance, and a baseline that
does not see the action adds nothing; the gradient in the variance is 0.
"""

from collections.abc import Iterator

from verification import symbolic as f
from verification.claim import Check, Setting, proof

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 4.1; Jia & Zhou 2022b, Theorem 2'
WHY_DOUBLE = "symbols have no precision"


def checks(setting: Setting) -> Iterator[Check]:
    """The likelihood-ratio form and the pathwise form are one."""
    variance = f.sa**2
    left = f.gradient_by_q(variance) - f.gradient_pathwise()
    yield proof("E[d log pi q] - g^2 V_x", f.remainder(left))
    score = ((f.a - f.m) ** 2 / variance - 1) / (2 * variance)  # d log pi / d variance
    scale = f.mean_of(score * f.q_rate(f.a), f.a, f.m, variance)
    yield proof("gradient in the variance", f.remainder(scale))
    baseline = f.mean_of(f.score_of_mean(f.a, f.m, variance) * f.v, f.a, f.m, variance)
    again = f.gradient_by_q(variance) - baseline - f.gradient_pathwise()
    yield proof("the same with a baseline", f.remainder(again))


MISTAKES = """
verification.symbolic.score_of_mean
    score over std for over variance | / variance => / sp.sqrt(variance)
    sign of the score | (action - mean) => (mean - action)
verification.symbolic.q_rate
    g for g^2 in q | g**2 => g
    q not centred | (action - m) => (action - m) ** 2
"""
