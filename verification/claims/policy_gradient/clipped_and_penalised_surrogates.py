"""Clipped and penalised surrogates, row by row: values and slopes.

The clipped surrogate is min(ratio A, clip(ratio) A) with the clip on the log-ratio: where
the advantage is positive the ratio is cut from above only, where it is negative from below
only, and where it is cut the gradient is 0. At equal policies it is A, and its
gradient that of log-ratio times A. The penalised surrogate is ratio A - penalty sqrt(KL),
the root taken state by state, with a finite slope at equal policies.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ctrl import trust_region as tr
from verification.claim import Check, Setting, pathwise

SOURCE = (
    "Schulman et al. 2017, proximal policy optimisation, equation 7; Zhao, Tang & Yao 2023, "
    "policy optimisation in continuous time, section 4"
)


def clipped(
    log_ratio: np.ndarray, advantage: np.ndarray, width: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The surrogate case by case, and its slope."""
    up, down = advantage > 0, advantage < 0
    cut = (up & (log_ratio > width)) | (down & (log_ratio < -width))
    edge = np.where(up, width, -width)
    value = np.exp(np.where(cut, edge, log_ratio)) * advantage
    return value, np.where(cut, 0.0, value)


def checks(setting: Setting) -> Iterator[Check]:
    """Values and slopes, row by row, on a table of ratios, advantages of both signs and widths."""
    table = np.array(
        [
            (ratio, advantage, width)
            for ratio in (-0.9, -0.23, -0.07, 0.0, 0.08, 0.27, 1.1)
            for advantage in (-1.7, -0.4, 0.6, 2.3)
            for width in (0.17, 0.31)
        ]
    )
    log_ratio, advantage, width = (setting.tensor(column) for column in table.T)
    log_ratio.requires_grad_()
    clipped_value = tr.clipped_surrogate(log_ratio, advantage, width)
    (slope,) = torch.autograd.grad(clipped_value.sum(), log_ratio)
    exact, exact_slope = clipped(*table.T)
    yield pathwise("clipped surrogate", clipped_value, exact)
    yield pathwise("its slope in the log-ratio", slope, exact_slope)
    kl = setting.tensor(0.01 + table[:, 2] ** 2 * table[:, 1] ** 2)
    penalised_value = tr.penalised_surrogate(log_ratio, advantage, kl, 0.65)
    exact = np.exp(table[:, 0]) * table[:, 1] - 0.65 * np.hypot(0.1, table[:, 2] * table[:, 1])
    yield pathwise("penalised surrogate", penalised_value, exact)
    equal = setting.tensor(np.zeros(len(table))).requires_grad_()
    at_equality = tr.penalised_surrogate(equal, advantage, equal.square(), 0.65)
    (slope,) = torch.autograd.grad(at_equality.sum(), equal)
    yield pathwise("slope of the penalised surrogate at equal policies", slope, table[:, 1])


MISTAKES = """
ctrl.trust_region.clipped_surrogate
    max for min | return torch.minimum( => return torch.maximum(
    clip sides swapped for negative advantage | return torch.minimum(ratio * advantage, trusted * advantage)
        => return torch.minimum(ratio, half_width.exp()) * advantage
    ratio clipped instead of its logarithm | torch.minimum(torch.maximum(log_ratio, -half_width), half_width).exp()
        => torch.minimum(torch.maximum(ratio, 1 - half_width), 1 + half_width)
    one width for all rows | -half_width), half_width) => -half_width), half_width.mean())
ctrl.trust_region.penalised_surrogate
    divergence for its root | kl.clamp_min(tiny).sqrt() => kl
    root of the mean divergence | kl.clamp_min(tiny).sqrt() => kl.mean().clamp_min(tiny).sqrt()
    penalty's sign | advantage - penalty => advantage + penalty
    infinite slope at equal policies | kl.clamp_min(tiny).sqrt() => kl.sqrt()
shared
    clipped always
    lower end of the range missing
    ratio to first order
"""
