"""The matrix exponential: against mpmath, in every block, to any derivative."""

import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctrl.linear.exponential import exponential, unit
from ctrl.linear.reading import largest

EPS = torch.finfo(torch.float64).eps


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def to_fifty_digits(matrix: Tensor) -> Tensor:
    with mpmath.workdps(50):
        power = mpmath.expm(mpmath.matrix(matrix.tolist()))
    return tensor([[float(each) for each in row] for row in power.tolist()])


@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(-8, math.log10(50)))
def test_it_is_the_exponential_to_round_off(seed, dim, size):
    matrix = draw(seed, dim, dim)
    matrix = matrix * 10**size / float(matrix.abs().sum(-1).max())
    expected = to_fifty_digits(matrix)
    # what a perturbation of M by round-off does, dim products deep
    condition = 1 + scipy.linalg.expm_cond(matrix.numpy())
    error = torch.linalg.matrix_norm(exponential(matrix) - expected)
    assert float(error) <= 8 * dim * EPS * condition * float(torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("dim", [20, 60])
@pytest.mark.parametrize("size", [1e-6, 0.02, 0.7, 9.0])
def test_it_is_scipys_in_many_dimensions(dim, size):
    matrix = draw(dim, dim, dim)
    matrix = matrix * size / float(matrix.abs().sum(-1).max())
    expected = torch.from_numpy(scipy.linalg.expm(matrix.numpy()))
    scale = float(torch.linalg.matrix_norm(expected)) * (1 + size)
    torch.testing.assert_close(exponential(matrix), expected, rtol=0, atol=8 * EPS * scale)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("rate", [1e-9, 3e-3, 0.03, 0.4, 20.0])
def test_a_block_beside_the_diagonal_is_exact_of_its_own_size(rate, size):
    # int_0^1 e^{-rate s} size e^{rate (1 - s)} ds and the like: [[-a, c], [0, a]]
    power = exponential(tensor([[-rate, size], [0.0, rate]]))
    with mpmath.workdps(40):
        expected = float(mpmath.mpf(size) * mpmath.sinh(mpmath.mpf(rate)) / mpmath.mpf(rate))
    assert float(power[0, 1]) == pytest.approx(expected, rel=16 * EPS * (1 + 2 * rate))
    assert float(power[1, 0]) == 0


def test_derivatives_forward_and_backward_to_the_third():
    matrix, t = draw(3, 3, 3), tensor(0.37)
    leaf = matrix.clone().requires_grad_()
    assert torch.autograd.gradcheck(exponential, leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(exponential, leaf, check_fwd_over_rev=True)

    def forward(function):
        return lambda t: torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]

    for names in ("fff", "rrr", "frf", "rff", "ffr"):
        derivative = lambda t: exponential(t * matrix)
        for name in names:
            derivative = forward(derivative) if name == "f" else torch.func.jacrev(derivative)
        expected = torch.linalg.matrix_power(matrix, 3) @ exponential(t * matrix)
        scale = float(matrix.norm() ** 3 * math.exp(0.37 * matrix.norm()))
        torch.testing.assert_close(derivative(t), expected, rtol=0, atol=64 * EPS * scale)


def test_a_batch_of_all_sizes_is_its_members_vectorised_or_not():
    sizes = tensor([1e-8, 0.02, 1.3, 40.0])[:, None, None, None]
    many = sizes * draw(5, 4, 2, 3, 3)
    power, mapped = exponential(many), torch.func.vmap(torch.func.vmap(exponential))(many)
    for i in range(4):
        for j in range(2):
            alone = exponential(many[i, j])
            atol = 64 * EPS * float(alone.abs().max())  # squarings do not differ, products may
            torch.testing.assert_close(power[i, j], alone, rtol=0, atol=atol)
            torch.testing.assert_close(mapped[i, j], alone, rtol=0, atol=atol)
    slopes = torch.func.vmap(torch.func.jacrev(exponential))(many[:, 0])
    assert slopes.shape == (4, 3, 3, 3, 3)
    assert exponential(many[:0]).shape == (0, 2, 3, 3)


def test_the_unit_of_a_block_bounds_its_rows_and_that_of_zeros_is_one():
    blocks = torch.stack([3e-9 * draw(0, 2, 3), 0 * draw(0, 2, 3), 5e12 * draw(1, 2, 3)])
    units = unit(blocks)
    rows = (blocks / units).abs().sum(-1).amax(-1)
    torch.testing.assert_close(rows, tensor([1.0, 0.0, 1.0]), rtol=4 * EPS, atol=0)
    assert float(units[1]) == 1


def test_the_largest_number_is_that_of_a_vectorised_batch():
    numbers = tensor([[0.2, 7.0], [3.0, 1.0]])
    seen = list[float]()

    def look(row: Tensor) -> Tensor:
        seen.append(largest(row))
        return row.sum()

    torch.func.vmap(look)(numbers)
    torch.func.vmap(torch.func.vmap(look))(numbers[..., None])
    torch.func.jvp(look, (numbers[0],), (numbers[1],))
    torch.func.grad(look)(numbers[1])
    assert seen == [7.0, 7.0, 7.0, 3.0]  # copies, which nothing rounds
    assert largest(numbers[:0]) == 0
    assert np.isnan(largest(tensor([1.0, math.nan])))
