"""Expectations without random numbers, through production code.

In place of a generator, ``ctrl.simulate`` is given the nodes of a product of Gauss-Hermite rules,
one for every normal variable of a path, the start included. Weighted means over these paths are the
expectations of the discrete scheme itself: exact for polynomials in the noise, and for analytic
functions converging faster than any power of the number of nodes.
"""

import torch
from torch import Tensor

import ctrl
from verification.closed_form.vp_gaussian import Transition


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


def degree_five(
    grid: ctrl.TimeGrid, mean: float, std: float, *, draws: bool
) -> tuple[Tensor, ctrl.Noise, Tensor]:
    """As ``gaussian_start``, with 2 n^2 + 1 paths for n normals: exact for polynomials of degree 5.

    Stroud's rule for n independent normals: the origin with mass 2 / (n + 2), sqrt(n + 2) times
    plus or minus a unit vector with (4 - n) / (2 (n + 2)^2), and sqrt(n / 2 + 1) times a sum or
    difference of two of them with (n + 2)^-2. Masses may be negative (``ctrl.Noise`` refuses them,
    so they go into the ``Paths``), and add up to at most 3 in absolute value.

    Args:
        grid: of the paths.
        mean: of the start.
        std: of the start.
        draws: whether the policy draws its actions, of one coordinate.

    Returns:
        Start states [paths, 1], noise, and the masses of the paths.
    """
    steps = len(grid.steps)
    n = 1 + steps * (2 if draws else 1)
    unit = torch.eye(n).to(grid.nodes)
    i, j = torch.triu_indices(n, n, 1, device=unit.device)
    one = (n + 2) ** 0.5 * torch.cat([unit, -unit])
    pairs = [a * unit[i] + b * unit[j] for a in (1, -1) for b in (1, -1)]
    two = (n / 2 + 1) ** 0.5 * torch.cat(pairs)
    points = torch.cat([torch.zeros_like(unit[:1]), one, two])
    masses = torch.cat(
        [
            unit.new_full((1,), 2 / (n + 2)),
            unit.new_full((2 * n,), (4 - n) / (2 * (n + 2) ** 2)),
            unit.new_full((len(two),), 1 / (n + 2) ** 2),
        ]
    )
    brownian = points[:, 1 : steps + 1, None] * grid.steps.sqrt()[:, None]
    drawn = points[:, steps + 1 :, None] if draws else None
    return mean + std * points[:, :1], ctrl.Noise(brownian, drawn), masses


def mean(values: Tensor, paths: ctrl.Paths) -> Tensor:
    """The exact expectation of what has one value per path: a weighted sum over the first axis."""
    assert paths.weights is not None
    return torch.tensordot(paths.weights, values, dims=([0], [0]))


def point_start(noise: ctrl.Noise, state: list[float]) -> Tensor:
    """The same start [paths, dim] for all paths of this noise."""
    assert noise.increments is not None
    one = noise.increments.new_tensor(state)
    return one.expand(len(noise.increments), -1).contiguous()


def affine_end(
    problem: ctrl.ControlProblem,
    policy: ctrl.Policy,
    grid: ctrl.TimeGrid,
    like: Tensor,
    solver: ctrl.Solver | None = None,
) -> Transition:
    """What a linear scheme does from the first node to the last: X_end = F x + f + N(0, C).

    Read off ``ctrl.simulate_end``: a path from 0, one from every basis state, and one for every
    normal variable of a path, those of drawn actions included. Exact only if the scheme is linear.

    Args:
        problem: whose sde is simulated, with one Brownian motion for each coordinate.
        policy: linear in the state.
        grid: the nodes.
        like: a state, [dim].
        solver: of the scheme.
    """
    dim, steps = len(like), len(grid.steps)
    noises = steps * dim
    start = like.new_zeros(1 + dim + noises * (1 + policy.is_random), dim)
    start[1 : 1 + dim] = torch.eye(dim).to(like)
    normals = like.new_zeros(len(start), noises)
    normals[1 + dim : 1 + dim + noises] = torch.eye(noises).to(like)
    increments = normals.view(-1, steps, dim) * grid.steps.sqrt().to(like)[:, None]
    drawn = normals.roll(noises, 0).view(-1, steps, dim) if policy.is_random else None
    end = ctrl.simulate_end(
        problem, policy, start, grid, solver, noise=ctrl.Noise(increments, drawn)
    )
    moved = (end[1:] - end[:1]).double().cpu().numpy()
    F, spread = moved[:dim].T, moved[dim:].T
    return Transition(F, end[0].double().cpu().numpy(), spread @ spread.T)
