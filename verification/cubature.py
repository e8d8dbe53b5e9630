"""Expectations without random numbers, through production code.

In place of a generator, ``ctrl.simulate`` is given the nodes of a product of Gauss-Hermite rules,
one for every normal variable of a path, the start included. Weighted means over these paths are the
expectations of the discrete scheme itself: exact for polynomials in the noise, and for analytic
functions converging faster than any power of the number of nodes.
"""

import torch
from torch import Tensor

import ctrl
from verification.closed_form.gaussian_law import Transition


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
) -> tuple[Tensor, ctrl.Noise]:
    """Quadrature like ``gaussian_start``, with fewer paths: exact for polynomials of degree 5.

    For n independent normals: a times plus or minus each unit vector, and b times vectors of signs,
    with s = (n - 2) / (n + 2), a^2 = 2 / (1 - s), b^2 = 1 / s and the masses (1 - s)^2 / 4 each and
    s^2 together. They are positive, and 1 in all; E z_i^2 = 2 (1 - s)^2 a^2 / 4 + s^2 b^2 = 1,
    E z_i^4 = 2 (1 - s)^2 a^4 / 4 + s^2 b^4 = 3, E z_i^2 z_j^2 = s^2 b^4 = 1.

    Args:
        grid: of the paths.
        mean: of the start.
        std: of the start.
        draws: whether the policy draws its actions, of one coordinate.
    """
    steps = len(grid.steps)
    n = 1 + steps * (2 if draws else 1)
    unit = torch.eye(n).to(grid.nodes)
    signs = _signs(n).to(unit)
    s = (n - 2) / (n + 2)
    points = torch.cat([(2 / (1 - s)) ** 0.5 * torch.cat([unit, -unit]), s**-0.5 * signs])
    masses = torch.cat(
        [unit.new_full((2 * n,), (1 - s) ** 2 / 4), unit.new_full((len(signs),), s**2 / len(signs))]
    )
    brownian = points[:, 1 : steps + 1, None] * grid.steps.sqrt()[:, None]
    drawn = points[:, steps + 1 :, None] if draws else None
    return mean + std * points[:, :1], ctrl.Noise(brownian, drawn, masses)


_PRIMITIVE = {3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011, 7: 0b10000011}


def _signs(n: int) -> Tensor:
    """Vectors of n signs, any five of which are independent (an orthogonal array of strength 5).

    The dual of the extended BCH code of distance 6: sign j of row r is the parity of the bits that
    r shares with (1, alpha^j, alpha^{3j}), alpha a primitive element of a field of 2^m > n.
    """
    m = max(3, n.bit_length())
    order, powers = 2**m - 1, [1]
    for _ in range(order - 1):
        doubled = powers[-1] << 1
        powers.append(doubled ^ _PRIMITIVE[m] if doubled > order else doubled)
    columns = [1 | powers[j] << 1 | powers[3 * j % order] << (1 + m) for j in range(n)]
    bit = torch.arange(2 * m + 1)
    rows = torch.arange(2 ** (2 * m + 1))[:, None] >> bit & 1
    shared = rows.double() @ (torch.tensor(columns)[:, None] >> bit & 1).double().T
    return 1 - 2 * (shared % 2)


def mean(values: Tensor, paths: ctrl.Paths) -> Tensor:
    """The exact expectation of what has one value per path: a weighted sum over the first axis."""
    assert paths.weights is not None
    return torch.tensordot(paths.weights, values, dims=1)


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
    """Transition of a linear scheme from the first node to the last: X_end = F x + f + N(0, C).

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
    differences = (end[1:] - end[:1]).double().cpu().numpy()
    F, noise_matrix = differences[:dim].T, differences[dim:].T
    return Transition(F, end[0].double().cpu().numpy(), noise_matrix @ noise_matrix.T)
