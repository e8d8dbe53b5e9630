"""Roll-outs that draw a score at every node and hold it: Gaussian chains, and their KLs.

One coordinate, the schedule of ``score_chains``; a score is N(slope x + constant, STD^2).
"""

import numpy as np

from verification.closed_form.gaussian_law import Normal, chain, kl
from verification.closed_form.score_chains import beta

SCORE, REFERENCE = (-0.8, 0.35), (-1.2, -0.15)  # slope and constant
STD = 0.6
START = Normal(np.array([0.4]), np.array([[0.5]]))


def states(score: tuple[float, float], nodes: np.ndarray) -> Normal:
    """The joint law of the states at all nodes: a drawn score adds its variance to a step's."""
    slope, constant = score
    steps = []
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        b = beta(1 - t)
        variance = b * h + (b * h * STD) ** 2
        steps.append(
            (
                np.array([[1 + h * b * (0.5 + slope)]]),
                np.array([h * b * constant]),
                np.array([[variance]]),
            )
        )
    return chain(START, steps)


def states_kl(nodes: np.ndarray) -> float:
    """KL of the states' joint laws, nats."""
    return kl(states(SCORE, nodes), states(REFERENCE, nodes))


def shift_squares(nodes: np.ndarray) -> np.ndarray:
    """E (difference of mean scores)^2 at the left end of every step."""
    law = states(SCORE, nodes)
    slope, constant = SCORE[0] - REFERENCE[0], SCORE[1] - REFERENCE[1]
    means, variances = law.mean[:-1], np.diag(law.covariance)[:-1]
    return (slope * means + constant) ** 2 + slope**2 * variances
