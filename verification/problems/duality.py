"""Entropy-regularised duality: the optimum is the maximum, and by how much others fall short.

J(a) = E[r(X_T)] - b KL(P_a || P_pre) = J* - b KL(P_a || P*) for every policy a: nothing beats J*,
the loss is of second order, and its constant is known. On a chain the same holds exactly.
"""

import numpy as np
from torch import Tensor

from diffusion_envs.exact import linear_policy
from verification.claim import Setting
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import SHORT
from verification.problems.gaussian_diffusion import DATA, START, normal, quadratic, schedule

GAIN = np.array([[-0.3, 0.15], [0.05, 0.2]])
SHIFT = np.array([0.25, -0.1])
NOISING_TIMES = [1.0, 0.72, 0.37, 0.0]


def performance(
    setting: Setting, gain: Tensor, shift: Tensor, weight: float = KL_WEIGHT, eta: float = 1.0
) -> Tensor:
    """J of score + gain x + shift, in continuous time: extrapolated, the method has order 4."""
    by_steps = [
        linear_policy.continuous_value(
            normal(setting, DATA),
            schedule(SHORT),
            normal(setting, START),
            1.0,
            0.0,
            gain,
            shift,
            quadratic(setting, REWARD),
            weight,
            eta,
            substeps,
        )
        for substeps in (30, 60)
    ]
    return (16 * by_steps[1] - by_steps[0]) / 15


def weight() -> float:
    """b: reward per nat of path KL."""
    return 2.0
