"""Jumps: Merton's series under the generator, and Girsanov's theorem for intensities."""

import numpy as np
import torch

import ctrl
from ctrl.jumps import Jumps
from verification.claim import Setting
from verification.closed_form.jumps import LinearIntensity, Merton, count_cells

M, L = Merton(), LinearIntensity()
NOWHERE = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))


def enumerated(setting: Setting, steps: int) -> tuple[ctrl.TimeGrid, ctrl.Noise]:
    """Every number of jumps of every step, with its probability under the chain of ``L``."""
    times = np.linspace(0, 0.8, steps + 1)
    tree = [(1.0, L.start, ())]  # probability, state, normals
    for h in np.diff(times):
        grown = []
        for weight, x, normals in tree:
            mass, middle = count_cells(h * (L.base + L.slope * x), 14 if steps < 4 else 6)
            after = x + h * L.pull * x
            grown += [
                (weight * p, after + n * L.size, (*normals, z))
                for n, (p, z) in enumerate(zip(mass, middle, strict=True))
            ]
        tree = grown
    jumps = setting.tensor([normals for _, _, normals in tree])[..., None]
    weight = setting.tensor([weight for weight, _, _ in tree])
    return ctrl.TimeGrid(setting.tensor(times)), ctrl.Noise(
        0 * jumps, weights=weight / weight.sum(), jumps=jumps
    )


def controlled(noise: float = 0.0) -> ctrl.ControlledSDE:
    """L's equation with noise, the action in its units, and added to the intensity."""
    jumps = Jumps(
        lambda t, x, a: L.base + L.slope * x[:, 0].clamp_min(0) + a[:, 0],
        lambda t, x, a, z: torch.full_like(x, L.size),
    )
    return ctrl.ControlledSDE(
        lambda t, x, a: L.pull * x + noise * a, lambda t, x: noise, jumps=jumps
    )


def rolled_out(setting: Setting, steps: int) -> ctrl.Paths:
    """L's chain with all its jumps."""
    grid, noise = enumerated(setting, steps)
    start = setting.tensor(L.start).expand(len(noise.increments), 1)
    return ctrl.simulate(ctrl.ControlProblem(controlled(), 1.0), NOWHERE, start, grid, noise=noise)
