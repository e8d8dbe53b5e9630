"""Lyapunov equations: against scipy and Kronecker products; and what decays only by round-off."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctrl.linear.lyapunov import SMALL, growth, kron, lyapunov
from ctrl.linear.margin import cholesky, margin, require_positive_definite, solve

EPS = torch.finfo(torch.float64).eps


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stable(seed: int, dim: int, rate: float) -> Tensor:
    """Random, its slowest direction decaying at ``rate``."""
    matrix = draw(seed, dim, dim)
    fastest = float(torch.linalg.eigvals(matrix).real.max())
    return matrix - (fastest + rate) * torch.eye(dim, dtype=torch.float64)


def symmetric(seed: int, dim: int) -> Tensor:
    matrix = draw(seed, dim, dim)
    return matrix + matrix.T


def none(dim: int) -> Tensor:
    return torch.zeros(0, dim, dim, dtype=torch.float64)


@given(st.integers(0, 2**31), st.sampled_from([1, 3, SMALL, SMALL + 1, 25, 60]), st.floats(-5, 1))
def test_the_solution_leaves_nothing_but_round_off(seed, dim, rate):
    A, Q = stable(seed, dim, 10**rate), symmetric(seed + 1, dim)
    S = lyapunov(A, none(dim), Q)
    left = torch.linalg.matrix_norm(A.T @ S + S @ A - Q)
    size = torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(S) + torch.linalg.matrix_norm(Q)
    assert float(left) <= 4 * dim * EPS * float(size)
    expected = scipy.linalg.solve_continuous_lyapunov(A.T.numpy(), Q.numpy())
    # either has an error of the residual over the operator's least singular value
    if dim <= 25:
        one, turned = torch.eye(dim, dtype=torch.float64), A.T.contiguous()
        least = float(torch.linalg.svdvals(torch.kron(turned, one) + torch.kron(one, turned))[-1])
        error = np.linalg.norm(S.numpy() - expected)
        assert error <= 16 * dim * EPS * float(size) / least


def test_small_and_large_problems_are_solved_alike():
    # two problems side by side are one of twice the size
    dim = SMALL // 2 + 1
    first, second = stable(0, dim, 0.3), stable(1, dim, 1.2)
    Q = symmetric(2, dim)
    whole = lyapunov(torch.block_diag(first, second), none(2 * dim), torch.block_diag(Q, Q))
    for part, A in ((whole[:dim, :dim], first), (whole[dim:, dim:], second)):
        torch.testing.assert_close(part, lyapunov(A, none(dim), Q), rtol=1e-12, atol=1e-13)
    assert float(whole[:dim, dim:].abs().max()) < 1e-12


@pytest.mark.parametrize("dim", [2, SMALL + 2])
def test_noise_in_proportion_to_the_state_counts(dim):
    A, C, Q = stable(0, dim, 2.0), 0.3 / dim**0.5 * draw(1, 2, dim, dim), symmetric(2, dim)
    S = lyapunov(A, C, Q)
    left = A.T @ S + S @ A + sum(each.T @ S @ each for each in C) - Q
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-12 * float(S.norm()))


@pytest.mark.parametrize("dim", [3, SMALL + 1])
def test_derivatives_to_the_second(dim):
    base, Q = stable(0, dim, 0.5), symmetric(2, dim)
    shift, turn = draw(3, dim, dim), draw(4, dim, dim)

    def solved(a: Tensor, q: Tensor) -> Tensor:
        S = lyapunov(base + a * shift, none(dim), q * Q)
        return (turn @ S).trace()

    leaves = (tensor(0.01).requires_grad_(), tensor(1.3).requires_grad_())
    assert torch.autograd.gradcheck(solved, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solved, leaves)


@pytest.mark.parametrize("dim", [3, SMALL + 3])
def test_a_batch_is_its_members(dim):
    A = torch.stack([stable(k, dim, 10.0**-k) for k in range(4)])
    Q = torch.stack([symmetric(k, dim) for k in range(4)])
    solution = lyapunov(A[None], torch.zeros(1, 4, 0, dim, dim, dtype=torch.float64), Q[None])[0]
    for k in range(4):
        alone = lyapunov(A[k], none(dim), Q[k])
        scale = float(alone.abs().max()) * 10**k
        torch.testing.assert_close(solution[k], alone, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("dim", [2, SMALL + 4])
def test_what_does_not_decay_has_no_solution(dim):
    A = stable(0, dim, 1.0)
    for shift in (1.0 + 1e-3, 2.0, 1e9):
        grows = A + shift * torch.eye(dim, dtype=torch.float64)
        rate, nearby = growth(grows, none(dim))
        assert not bool(rate < -nearby)
        if dim > SMALL:  # a smaller one has a solution, which belongs to no second moments
            with pytest.raises(ValueError, match="must decay"):
                lyapunov(grows, none(dim), symmetric(1, dim))
    still = torch.zeros(dim, dim, dtype=torch.float64)
    with pytest.raises(ValueError, match="must decay"):
        lyapunov(still, none(dim), symmetric(1, dim))


@given(st.integers(0, 2**31), st.integers(2, 30), st.floats(-9, 9))
def test_an_eigenvalue_zero_is_not_stable_whatever_its_round_off(seed, dim, size):
    weights = draw(seed, dim, dim).abs()
    weights = weights + weights.T
    laplacian = torch.diag(weights.sum(-1)) - weights  # its rows sum to 0
    turn = torch.linalg.qr(draw(seed + 1, dim, dim)).Q
    for A in (-laplacian, -turn @ laplacian @ turn.T):
        rate, nearby = growth(10**size * A, none(dim))
        assert not bool(rate < -nearby)
        assert bool(growth(10**size * (A - 1e-9 * torch.eye(dim).double()), none(dim))[0] < 0)


def test_the_growth_is_that_of_the_second_moments():
    A, C = draw(0, 3, 3), 0.4 * draw(1, 2, 3, 3)
    one, turned = torch.eye(3, dtype=torch.float64), A.T.contiguous()
    moments = torch.kron(turned, one) + torch.kron(one, turned)
    moments = moments + sum(torch.kron(each.T.contiguous(), each.T.contiguous()) for each in C)
    # antisymmetric matrices grow no faster
    eigenvalues = np.linalg.eigvals(moments.numpy())
    assert float(growth(A, C)[0]) == pytest.approx(eigenvalues.real.max(), rel=1e-12)
    rate = float(torch.linalg.eigvals(A).real.max())
    assert float(growth(A, none(3))[0]) == pytest.approx(2 * rate, rel=1e-12)
    assert float(growth(A * math.inf, none(3))[0]) == math.inf


def test_kronecker_products_of_a_batch():
    left, right = draw(0, 2, 2, 2), draw(1, 2, 3, 3)
    for k in range(2):
        torch.testing.assert_close(kron(left, right)[k], torch.kron(left[k], right[k]))


# ---- margins


@given(st.integers(0, 2**31), st.integers(2, 20), st.floats(-9, 9))
def test_a_singular_matrix_is_not_positive_definite_whatever_its_round_off(seed, dim, size):
    root = draw(seed, dim, dim - 1)
    singular = 10**size * root @ root.T
    assert bool(torch.isnan(cholesky(singular)).all())
    with pytest.raises(ValueError, match="covariance must be positive definite beyond round-off"):
        require_positive_definite("covariance", singular, "or so")


def test_coordinates_of_very_different_size_are_as_definite_as_others():
    scale = tensor([1e-30, 1.0, 1e30]).diag()
    matrix = tensor([[2.0, 0.3, -0.4], [0.3, 1.0, 0.2], [-0.4, 0.2, 0.5]])
    root = cholesky(scale @ matrix @ scale)
    torch.testing.assert_close(root, scale @ torch.linalg.cholesky(matrix), rtol=1e-13, atol=0)
    both = cholesky(torch.stack([matrix, -matrix]))
    assert bool(torch.isfinite(both[0]).all())
    assert bool(torch.isnan(both[1]).all())


def test_what_was_added_up_decides_what_is_round_off():
    difference = tensor([[1e-14]])
    assert bool(torch.isfinite(cholesky(difference)).all())
    assert bool(torch.isnan(cholesky(difference, tensor([10.0]))).all())  # 10 - (10 - 1e-14)
    assert float(margin(3, tensor(2.0))) == pytest.approx(96 * EPS)


def test_a_singular_system_is_refused_in_the_callers_words():
    for right in (tensor([[1.0], [1.0]]), tensor([[1.0], [2.0]])):
        with pytest.raises(ValueError, match="no such thing"):
            solve(tensor([[1.0, 1.0], [1.0, 1.0]]), right, "no such thing")
    both = torch.stack([torch.eye(1), torch.zeros(1, 1)]).double()
    with pytest.raises(ValueError, match="no such thing"):
        solve(both, both, "no such thing")
