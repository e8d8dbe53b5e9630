"""Expectations through a production step over many steps, without random numbers.

For a scalar equation with coefficients of period 2 pi. A function of the state is its values on an
even grid, and the trigonometric polynomial through them; the normal variable of a step is a
Gauss-Hermite rule. Backwards over the steps,
    u_k(x) = E u_{k+1}(step(x, dW)),
which converges faster than any power of the number of points: the scheme's own expectation, to
round-off, of which orders and limits can be read off.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

import ctrl
from verification.closed_form.extrapolation import extrapolated


def points(count: int, like: Tensor) -> Tensor:
    """An even grid of the circle, [count]."""
    return 2 * math.pi * torch.arange(count).to(like) / count


def backwards(
    after: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    values: Tensor,
    nodes: Tensor,
    draws: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """E of a function of the last state given the first, on the grid's points.

    Args:
        after: (t0, t1, x [n, 1], noise [n, *any]) -> next states [n, 1].
        values: of the function at ``points(len(values))``.
        nodes: of time.
        draws: step sizes [1] -> quadrature nodes of a step's noise [m, *any] and weights [m].
    """
    count = len(values)
    x = points(count, values)
    waves = torch.fft.fftfreq(count, 1 / count, dtype=values.dtype, device=values.device)
    rules: dict[float, tuple[Tensor, Tensor]] = {}  # of steps that differ by more than round-off
    for t0, t1 in reversed(list(pairwise(nodes))):
        size = round(float(t1 - t0), 14)
        if size not in rules:
            rules[size] = draws((t1 - t0).reshape(1))
        noise, weights = rules[size]
        where = x.repeat_interleave(len(weights))[:, None]
        next_states = after(t0, t1, where, noise.repeat(count, *[1] * (noise.ndim - 1))).detach()
        shifted = torch.exp(1j * (next_states - where).view(count, -1, 1) * waves)
        step_transform = (shifted * weights[:, None]).sum(1) * torch.exp(1j * x[:, None] * waves)
        values = (step_transform @ (torch.fft.fft(values) / count)).real
    return values


def expectation(
    solver: ctrl.Solver,
    sde: ctrl.ControlledSDE,
    policy: ctrl.DeterministicPolicy,
    values: Tensor,
    nodes: Tensor,
    rule: int = 10,
) -> Tensor:
    """``backwards`` through ``solver.step``, on the normals that ``gauss_hermite`` gives."""

    def after(t0: Tensor, t1: Tensor, x: Tensor, increment: Tensor) -> Tensor:
        return solver.step(sde, t0, t1, x, policy.mean(t0, x), increment)

    def draws(step: Tensor) -> tuple[Tensor, Tensor]:
        noise = ctrl.noise.gauss_hermite(step, nodes=rule)
        assert noise.weights is not None
        return noise.increments[:, 0], noise.weights

    return backwards(after, values, nodes, draws)


def local_order(values: list[float], limit: float) -> float:
    """The order of errors at steps h, h / 2, h / 4, ...: of pairs, extrapolated to h = 0.

    Around a wrong limit errors do not go to 0, and their order does.
    """
    errors = [abs(value - limit) for value in values]
    return extrapolated([math.log2(coarse / fine) for coarse, fine in pairwise(errors)])
