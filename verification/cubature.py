"""Expectations without random numbers, through production code.

In place of a generator, ``ctrl.simulate`` is given the nodes of a product of Gauss-Hermite rules,
one for every normal variable of a path, the start included. Weighted means over these paths are the
expectations of the discrete scheme itself: exact for polynomials in the noise, and for analytic
functions converging faster than any power of the number of nodes.
"""

import torch
from torch import Tensor

import ctrl


def gaussian_start(
    grid: ctrl.TimeGrid, mean: float, std: float, nodes: int
) -> tuple[Tensor, ctrl.Noise]:
    """Start states [paths, 1] of N(mean, std^2), and the Brownian noise that goes with them."""
    steps = torch.cat([grid.steps.new_ones(1), grid.steps])
    both = ctrl.noise.gauss_hermite(steps, nodes=nodes)
    assert both.increments is not None
    assert both.weights is not None
    start = mean + std * both.increments[:, 0]
    return start, ctrl.Noise(both.increments[:, 1:], weights=both.weights)


def mean(values: Tensor, paths: ctrl.Paths) -> Tensor:
    """The exact expectation of what has one value per path: a weighted sum over the first axis."""
    assert paths.weights is not None
    return torch.tensordot(paths.weights, values, dims=([0], [0]))


def point_start(noise: ctrl.Noise, state: list[float]) -> Tensor:
    """The same start [paths, dim] for all paths of this noise."""
    assert noise.increments is not None
    one = noise.increments.new_tensor(state)
    return one.expand(len(noise.increments), -1).contiguous()
