"""Theorem 4.4 for bounded rewards: the total-variation bound.

For bounded h_t: |V' - L(pi')| <= int (sup h_t - inf h_t) sqrt(K_t / 2) dt (Pinsker), here
for a reward cos(w x). It is of second order. Half of it is less than the gap of a steep
cosine. The oscillation counts, up to twice sup |h|; for a shift c of the score and
|grad V| <= G it makes |gap| <= 4/3 G sqrt(B) K_T with B = int g^2 dt, the form
"performance >= surrogate - C KL" of trust region methods. For a quadratic reward h is
unbounded and the bound says nothing.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import trust_region as tr
from verification.claim import Check, Setting, bound, expectation, limit
from verification.closed_form import drift_shift
from verification.closed_form.drift_shift import DriftShift
from verification.problems.trust_region import FREE, FREQUENCY, HORIZON, NODES, PULLED, gap_and_kl

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 4.4'

# ... and here h is steepest at the mean
STEEP = replace(FREE, mean=np.pi / FREQUENCY - FREE.action * HORIZON)


def cosine(m: Tensor, variance: Tensor) -> Tensor:
    """Expectation of cos(frequency x) under N(m, variance)."""
    return torch.cos(FREQUENCY * m) * torch.exp(-(FREQUENCY**2) * variance / 2)


def checks(setting: Setting) -> Iterator[Check]:
    """A cosine reward."""
    grid = ctrl.TimeGrid(setting.tensor(NODES))

    def both(p: DriftShift, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        gap, kl = gap_and_kl(setting, p, cosine, shift, rule=10 if p.std else 8)
        size = drift_shift.cosine_oscillation(p, FREQUENCY, shift, NODES)
        return gap, kl, tr.bounded(setting.tensor(size), kl, grid)

    gap, kl, most = both(PULLED, 0.4)
    exact = drift_shift.cosine_gap(PULLED, FREQUENCY, 0.4, NODES)
    yield expectation("gap of a cosine, against its closed form", gap, exact)
    exact_kl = drift_shift.path_kl(PULLED, 0.4, NODES)
    yield expectation("K_t, against its closed form", kl, exact_kl)
    yield expectation(
        "the bound, against its closed form",
        most,
        drift_shift.pinsker(PULLED, FREQUENCY, 0.4, NODES),
    )
    steep, _, nearly = both(STEEP, 0.1)
    gaps, bounds = torch.stack([gap, steep]), torch.stack([most, nearly])
    yield bound("a cosine, pulled back, and where it is steepest", gaps.abs() / bounds, [1.0, 1.0])
    yield expectation("twice the shift, four times the bound", both(STEEP, 0.2)[2], 4 * nearly)
    # h = +-G g^2 c at worst, g = 0.6, on finer and finer grids
    gain, size, shift = 0.75, 0.6**2, 0.4
    levels = []
    for steps in (512, 1024):
        fine = ctrl.uniform_grid(HORIZON, steps, dtype=setting.dtype, device=setting.device)
        kl = shift**2 * size * fine.nodes[:-1] / 2
        levels.append(tr.bounded(torch.full_like(kl, 2 * gain * size * shift), kl, fine))
    B = size * HORIZON
    constant = 4 / 3 * gain * np.sqrt(B) * (shift**2 * B / 2)
    yield limit("4/3 G sqrt(B) K_T", 2 * levels[1] - levels[0], constant)


MISTAKES = """
ctrl.trust_region.bounded
    bound halved | (oscillation * ( => (0.5 * oscillation * (
    2 for 1/2 in Pinsker's inequality | path_kl / 2 => path_kl * 2
    1/2 inside for 1/2 outside the root | (path_kl / 2).sqrt() => path_kl.sqrt() / 2
    divergence for its root | (path_kl / 2).sqrt() => path_kl / 2
verification.closed_form.drift_shift.cosine_oscillation
    sup /h/ for the oscillation | `return 2 * ` => `return `
verification.problems.trust_region.gap_and_kl
    K_t of the whole horizon | rates.cumsum(0) - rates => rates.sum(0).expand_as(rates)
shared
    states at the right end of a step
    derivative of V in time missing
    control not in units of the noise
    mean over time for the integral
    uneven grid taken for an even one
"""
