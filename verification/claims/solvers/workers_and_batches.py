"""The same bits for any number of workers, batches and places.

simulate(..., workers=n) gives the same bits for every n and every batch, whether rows are
drawn into the paths' memory ahead of time (batches of whole groups) or beside it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.counter_normals import key_of
from ctrl.noise import PathStreams
from verification.claim import Check, Setting, pathwise, stated
from verification.problems.counter_normals import drawn

SOURCE = "by construction: every number is a function of its index"

PATHS, STEPS = 768, 5  # of dimension 2: six groups of 256 numbers


def checks(setting: Setting) -> Iterator[Check]:
    """Batches of whole groups and not, one worker and two, in memory and beside it."""
    nodes = setting.tensor([0.0, 0.0625, 0.3125, 0.375, 0.4375, 1.4375])  # roots of steps are exact
    sde = ctrl.ControlledSDE(lambda t, x, a: a - 0.4 * x, lambda t, x: 0.7)
    problem, grid = ctrl.ControlProblem(sde, 1.4375), ctrl.TimeGrid(nodes)
    policy = ctrl.GaussianPolicy(lambda t, x: 0.1 * x, std=0.5)

    def rolled(split: tuple[int, ...], workers: int, differentiable: bool) -> tuple[Tensor, ...]:
        first, parts = 0, []
        for paths in split:
            streams = PathStreams(setting.seed, ("workers",), first)
            start = setting.tensor([[0.8, -0.3]]).repeat(paths, 1)
            parts.append(
                ctrl.simulate(
                    problem, policy, start, grid, generator=streams, workers=workers,
                    differentiable=differentiable,
                )
            )  # fmt: skip
            first += paths
        return tuple(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("states", "actions", "increments")
        )

    dtype, h = np.dtype(str(setting.dtype).removeprefix("torch.")), nodes.diff()[:, None]
    numbers = [
        torch.from_numpy(
            drawn(dtype, key_of(setting.seed, "workers", kind, str(setting.dtype)), STEPS, 6, 0, 0)
        ).view(STEPS, PATHS, 2)
        for kind in ("increments", "actions")
    ]
    increments, normals = (each.movedim(0, 1).to(setting.device) for each in numbers)
    increments = increments * h.sqrt()
    x, states, actions = setting.tensor([[0.8, -0.3]]).repeat(PATHS, 1), [], []
    for k in range(STEPS):
        states.append(x)
        actions.append(0.1 * x + 0.5 * normals[:, k])
        x = x + (actions[k] - 0.4 * x) * h[k] + 0.7 * increments[:, k]
    want = torch.stack([*states, x], dim=1), torch.stack(actions, dim=1), increments
    for split in ((PATHS,), (256, 512), (100, 157, 211, 300)):
        for workers, graph in ((1, False), (2, False), (1, True)):
            label = f"{len(split)} batches, {workers} workers{', graph' if graph else ''}"
            names = ("states", "actions", "increments")
            for name, part, right in zip(names, rolled(split, workers, graph), want, strict=True):
                yield stated(pathwise(f"{name}, {label}", part.detach(), right), units=4.0)


MISTAKES = """
ctrl.noise.PathStreams.drawn_into
    a batch's first group forgotten | group=group, => group=0,
    widths left out ahead of time | scales=widths, => ``
ctrl.drawn_ahead.rows
    rows taken in the order of their chunk's memory | enumerate(out) => enumerate(out[::-1])
ctrl.noise_sources.Streamed.__init__
    variance for width | math.sqrt(h) => h
shared
    numbers local to a batch
"""
