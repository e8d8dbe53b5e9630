"""Linear SDEs, Gaussian laws and KL control: against scipy's integrators and quadrature."""

import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ctrl import linear
from ctrl.linear import Affine, Gaussian
from verification.closed_form.ornstein_uhlenbeck import OrnsteinUhlenbeck, path_kl

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # of scipy's integrator at its tightest, 1e-13


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(seed: int, dim: int, condition: float = 10.0) -> Tensor:
    """Symmetric, with eigenvalues from 1 down to 1 / condition."""
    basis = torch.linalg.qr(draw(seed, dim, dim)).Q
    eigenvalues = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return 0.5 * (matrix + matrix.T)


def integrated(A: Tensor, b: Tensor, G: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
    """F' = A F, f' = A f + b, C' = A C + C A' + G G', by scipy."""
    n, A, b, Q = len(b), A.numpy(), b.numpy(), (G @ G.T).numpy()

    def rate(t, y):
        F, f, C = y[: n * n].reshape(n, n), y[n * n : n * n + n], y[n * n + n :].reshape(n, n)
        return np.concatenate([(A @ F).ravel(), A @ f + b, (A @ C + C @ A.T + Q).ravel()])

    start = np.concatenate([np.eye(n).ravel(), np.zeros(n + n * n)])
    y = scipy.integrate.solve_ivp(
        rate, (0, time), start, method="DOP853", rtol=1e-13, atol=1e-13
    ).y[:, -1]
    parts = y[: n * n].reshape(n, n), y[n * n : n * n + n], y[n * n + n :].reshape(n, n)
    return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)


EPS = torch.finfo(torch.float64).eps
SEEDS, DIMS = st.integers(0, 2**31), st.integers(1, 4)


@given(SEEDS, DIMS, st.floats(0.05, 3))
def test_transition_solves_the_moment_equations(seed, dim, time):
    A, b, G = draw(seed, dim, dim), draw(seed + 1, dim), draw(seed + 2, dim, 2)
    transition = linear.transition(A, b, G, time)
    for one, other in zip(
        (transition.F, transition.f, transition.C), integrated(A, b, G, time), strict=True
    ):
        scale = float(other.abs().max()) + 1  # unstable A: entries of hundreds
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * scale)


def test_transition_of_brownian_motion_with_drift():
    b, G = tensor([0.3, -1.2]), tensor([[0.5], [2.0]])
    transition = linear.transition(torch.zeros(2, 2, dtype=torch.float64), b, G, 1.7)
    torch.testing.assert_close(transition.F, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(transition.f, 1.7 * b, rtol=1e-14, atol=0)
    torch.testing.assert_close(transition.C, 1.7 * G @ G.T, rtol=1e-14, atol=0)


def test_stiff_transition_is_the_stationary_law():
    # 1e4 relaxation times of the fastest direction: e^{-A t} alone would overflow
    A = -tensor([[1000.0, 300.0], [0.0, 2.0]])
    b, G = tensor([1.0, 2.0]), tensor([[0.7, 0.0], [0.2, 1.0]])
    transition = linear.transition(A, b, G, 20.0)
    stationary = scipy.linalg.solve_continuous_lyapunov(A.numpy(), -(G @ G.T).numpy())
    torch.testing.assert_close(transition.C, torch.from_numpy(stationary), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(transition.f, -torch.linalg.solve(A, b), rtol=1e-11, atol=1e-14)


@given(SEEDS, DIMS)
def test_transitions_in_a_row_are_one(seed, dim):
    A, b, G = draw(seed, dim, dim), draw(seed + 1, dim), draw(seed + 2, dim, dim)
    whole = linear.transition(A, b, G, 1.0)
    both = linear.transition(A, b, G, 0.3).then(linear.transition(A, b, G, 0.7))
    for name in ("F", "f", "C"):
        one, other = getattr(both, name), getattr(whole, name)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(1 + other.abs().max()))


@given(st.floats(-6, 1.5), st.floats(-9, 3), st.floats(-9, 3))
def test_slow_and_weak_transitions_keep_all_their_digits(rate, noise, shift):
    k, g, b = 10**rate, 10**noise, 10**shift
    for pull in (k, -min(k, 3.0)):
        transition = linear.transition(tensor([[-pull]]), tensor([b]), tensor([[g]]), 1.0)
        with mpmath.workdps(40):
            a = mpmath.mpf(-pull)
            f, C = b * mpmath.expm1(a) / a, mpmath.mpf(g) ** 2 * mpmath.expm1(2 * a) / (2 * a)
            expected = [float(each) for each in (mpmath.exp(a), f, C)]
        for one, other in zip((transition.F, transition.f, transition.C), expected, strict=True):
            # a doubling doubles what round-off there is
            assert float(one) == pytest.approx(other, rel=64 * EPS * (1 + 2 * abs(pull)))


@given(SEEDS, st.floats(-4, -1))
def test_the_covariance_of_a_short_time_is_exact_of_its_own_size(seed, size):
    A, b, G = draw(seed, 3, 3), draw(seed + 1, 3), 10 ** (2 * size) * draw(seed + 2, 3, 2)
    time = 10**size
    C = linear.transition(A, b, G, time).C
    Q, total, term = G @ G.T, 0 * A, time * G @ G.T
    for k in range(1, 25):  # sum_k t^k / k! of the Lie derivatives
        total = total + term
        term = (A @ term + term @ A.T) * time / (k + 1)
    torch.testing.assert_close(C, total, rtol=0, atol=64 * EPS * float(time * Q.abs().max()))


@given(st.floats(-4, 0.5), st.floats(-0.4, 0.4), st.floats(0, 3))
def test_terminal_kl_of_slow_laws_is_the_closed_form(rate, difference, variance):
    k1 = 10**rate
    k0, c1, c0, g, m, T = k1 * (1 + difference), 0.003, -0.002, 0.04, 0.3, 0.9
    numbers = (k1, c1, k0, c0, g, m, variance, T)
    divergence = linear.ornstein_uhlenbeck_terminal_kl(*[tensor(each) for each in numbers])
    with mpmath.workdps(40):

        def law(pull, shift):
            pull, keep = mpmath.mpf(pull), mpmath.exp(-mpmath.mpf(pull) * T)
            mean = keep * m + shift * (1 - keep) / pull
            return mean, keep**2 * variance + mpmath.mpf(g) ** 2 * (1 - keep**2) / (2 * pull)

        (m1, S1), (m0, S0) = law(k1, c1), law(k0, c0)
        expected = float((S1 / S0 - 1 - mpmath.log(S1 / S0) + (m1 - m0) ** 2 / S0) / 2)
        # what round-off of the laws moves: the means' against their gap, and the variances'
        lever = float(abs(m1 - m0) * abs(m) / S0 + abs(S1 / S0 - 1))
    assert float(divergence) == pytest.approx(expected, rel=1e-14, abs=256 * EPS * lever)


def test_no_time_moves_nothing():
    transition = linear.transition(draw(0, 3, 3), draw(1, 3), draw(2, 3, 2), 0.0)
    assert torch.equal(transition.F, torch.eye(3, dtype=torch.float64))
    assert not bool(transition.f.any())
    assert not bool(transition.C.any())


def test_a_batch_is_its_members():
    A, b, G = draw(0, 2, 5, 3, 3), draw(1, 5, 3), draw(2, 3, 2)
    time = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    start = Gaussian(draw(3, 3), positive(4, 3))
    law = linear.gaussian_moments(A, b, G, start, time)
    reference = Affine(0.5 * A[0, 0], -b[1])
    G_full = draw(5, 3, 3)
    kl = linear.linear_path_kl(Affine(A, b), reference, G_full, start, time)
    for i in range(2):
        for j in range(5):
            one = linear.gaussian_moments(A[i, j], b[j], G, start, float(time[j]))
            torch.testing.assert_close(law.mean[i, j], one.mean, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(law.covariance[i, j], one.covariance, rtol=1e-11, atol=1e-11)
            alone = linear.linear_path_kl(
                Affine(A[i, j], b[j]), reference, G_full, start, float(time[j])
            )
            torch.testing.assert_close(kl[i, j], alone, rtol=1e-10, atol=1e-12)


def test_moments_are_those_of_the_transition():
    A, b, G = draw(0, 3, 3), draw(1, 3), draw(2, 3, 1)
    m, P = draw(3, 3), positive(4, 3)
    F, f, C = integrated(A, b, G, 0.8)
    law = linear.gaussian_moments(A, b, G, Gaussian(m, P), 0.8)
    torch.testing.assert_close(law.mean, F @ m + f, **CLOSE)
    torch.testing.assert_close(law.covariance, F @ P @ F.T + C, **CLOSE)


# ---- divergences


PULLS, SHIFTS = st.floats(0.2, 3), st.floats(-2, 2)


LAWS = (SHIFTS, PULLS, SHIFTS, st.floats(0.3, 2), SHIFTS, st.floats(0, 1), st.floats(0.1, 3))


@given(st.tuples(PULLS, *LAWS))
def test_ornstein_uhlenbeck_path_kl_is_the_closed_form(numbers):
    divergence = linear.ornstein_uhlenbeck_path_kl(*[tensor(number) for number in numbers])
    k1, c1, k0, c0, noise, mean, variance, time = numbers
    laws = OrnsteinUhlenbeck(k1, c1, k0, c0, noise, mean, math.sqrt(variance))
    expected = path_kl(laws, time)
    assert float(divergence) == pytest.approx(expected, rel=1e-10, abs=1e-11)


@given(st.tuples(st.floats(-1, 3), *LAWS))
def test_terminal_kl_is_at_most_the_path_kl(numbers):
    tensors = [tensor(number) for number in numbers]
    terminal = linear.ornstein_uhlenbeck_terminal_kl(*tensors)
    path = linear.ornstein_uhlenbeck_path_kl(*tensors)
    assert 0 <= float(terminal) <= float(path) + 1e-12 * (1 + float(path))


def test_known_divergences_of_two_ornstein_uhlenbeck_laws():
    # k 1.3 -> 0 by the limit of small k, from the closed form at 1e-3 and its expansion
    tensors = [tensor(each) for each in (0.0, 0.35, 0.4, 0.1, 0.7, 0.6, 0.09, 0.9)]
    divergence = linear.ornstein_uhlenbeck_path_kl(*tensors)
    # E X_s = .6 + .35 s, Var X_s = .09 + .49 s; u = (.4 X + .25) / .7
    expected = scipy.integrate.quad(
        lambda s: ((0.4 * (0.6 + 0.35 * s) + 0.25) ** 2 + 0.16 * (0.09 + 0.49 * s)) / (2 * 0.49),
        0,
        0.9,
    )[0]
    assert float(divergence) == pytest.approx(expected, rel=1e-13)


@given(SEEDS, DIMS)
def test_path_kl_is_the_integral_of_the_energy(seed, dim):
    A1, A0 = draw(seed, dim, dim) - torch.eye(dim), draw(seed + 1, dim, dim)
    b1, b0, G = draw(seed + 2, dim), draw(seed + 3, dim), positive(seed + 4, dim, 5.0)
    m, P = draw(seed + 5, dim), positive(seed + 6, dim)
    A, b, Q = A1.numpy(), b1.numpy(), (G @ G.T).numpy()
    u = np.linalg.solve(G.numpy(), np.column_stack([(A1 - A0).numpy(), (b1 - b0).numpy()]))

    def rate(t, y):
        mean, cov = y[:dim], y[dim:-1].reshape(dim, dim)
        energy = np.trace(u[:, :-1] @ cov @ u[:, :-1].T) + np.sum(
            (u[:, :-1] @ mean + u[:, -1]) ** 2
        )
        return np.concatenate([A @ mean + b, (A @ cov + cov @ A.T + Q).ravel(), [energy / 2]])

    start = np.concatenate([m.numpy(), P.numpy().ravel(), [0.0]])
    expected = scipy.integrate.solve_ivp(
        rate, (0, 0.9), start, method="DOP853", rtol=1e-13, atol=1e-13
    ).y[-1, -1]
    divergence = linear.linear_path_kl(Affine(A1, b1), Affine(A0, b0), G, Gaussian(m, P), 0.9)
    assert float(divergence) == pytest.approx(float(expected), rel=1e-9)


def test_path_kl_counts_only_directions_with_noise():
    # a position driven by a noisy speed: the drifts differ in the speed alone
    G = tensor([[0.0], [0.5]])
    A1, A0 = tensor([[0.0, 1.0], [-2.0, -0.3]]), tensor([[0.0, 1.0], [0.0, -0.3]])
    zero, start = torch.zeros(2, dtype=torch.float64), Gaussian(tensor([1.0, 0.0]), positive(0, 2))
    divergence = linear.linear_path_kl(Affine(A1, zero), Affine(A0, zero), G, start, 1e-6)
    rate = 0.5 * 4 * (1 + float(start.covariance[0, 0])) / 0.25
    assert float(divergence) == pytest.approx(1e-6 * rate, rel=1e-5)  # first order in the duration
    with pytest.raises(ValueError, match="infinite"):
        linear.linear_path_kl(
            Affine(A1, zero), Affine(A0 + tensor([[0.0, 0.1], [0, 0]]), zero), G, start, 1.0
        )


@given(SEEDS, DIMS)
def test_gaussian_kl_is_that_of_torch(seed, dim):
    one = Gaussian(draw(seed, dim), positive(seed + 1, dim, 100.0))
    other = Gaussian(draw(seed + 2, dim), positive(seed + 3, dim, 100.0))
    expected = kl_divergence(
        MultivariateNormal(one.mean, one.covariance),
        MultivariateNormal(other.mean, other.covariance),
    )
    torch.testing.assert_close(linear.gaussian_kl(one, other), expected, rtol=1e-10, atol=1e-10)
    assert float(linear.gaussian_kl(one, one)) == 0


@pytest.mark.parametrize("ratio", [1e-30, 1e-17, 1e-9, 0.3, 0.6, 1e9, 1e30])
def test_gaussian_kl_of_laws_of_very_different_size(ratio):
    size = tensor([0.7 * ratio, 2.0]).diag()
    turn = tensor([[0.8, -0.6], [0.6, 0.8]])
    for basis in (
        (torch.eye(2).double(), turn) if ratio > 1e-9 and ratio < 1e9 else (turn @ turn.T,)
    ):
        law = Gaussian(ZERO2, basis @ size @ basis.T)
        reference = Gaussian(ZERO2, basis @ tensor([0.7, 2.0]).diag() @ basis.T)
        expected = 0.5 * (ratio - 1 - math.log(ratio))
        assert float(linear.gaussian_kl(law, reference)) == pytest.approx(expected, rel=1e-12)


@given(SEEDS, st.integers(2, 6), st.floats(-9, 9))
def test_gaussian_kl_of_a_singular_law_is_refused_whatever_its_round_off(seed, dim, size):
    root = draw(seed, dim, dim - 1)
    flat = Gaussian(draw(seed + 1, dim), 10**size * root @ root.T)
    full = Gaussian(flat.mean, 10**size * positive(seed, dim))
    with pytest.raises(ValueError, match=r"^covariance must be positive definite"):
        linear.gaussian_kl(flat, full)
    with pytest.raises(ValueError, match=r"^reference_covariance must be positive definite"):
        linear.gaussian_kl(full, flat)


@given(SEEDS, st.integers(2, 5), st.floats(-9, 9))
def test_a_direction_without_noise_is_one_whatever_its_round_off(seed, dim, size):
    left = torch.linalg.qr(draw(seed, dim, dim)).Q
    right = torch.linalg.qr(draw(seed + 1, dim, dim)).Q
    strengths = torch.linspace(1, 0, dim, dtype=torch.float64)
    G, start = 10**size * left @ strengths.diag() @ right, Gaussian(draw(2, dim), positive(3, dim))
    zero = torch.zeros(dim, dtype=torch.float64)
    reference = Affine(draw(seed + 2, dim, dim), zero)
    inside = G @ draw(seed + 3, dim)
    kl = linear.linear_path_kl(Affine(reference.matrix, inside), reference, G, start, 1.0)
    control = torch.linalg.lstsq(
        strengths[:-1, None] * right[:-1], left[:, :-1].T @ inside
    ).solution
    expected = 0.5 * float(control.square().sum()) / 10 ** (2 * size)
    assert float(kl) == pytest.approx(expected, rel=1e-9 * dim / float(strengths[-2]))
    outside = float(inside.abs().max() + 10**size) * left[:, -1]
    with pytest.raises(ValueError, match="infinite"):
        linear.linear_path_kl(Affine(reference.matrix, outside), reference, G, start, 1.0)


def test_gaussian_kl_keeps_its_digits_between_close_laws():
    small = 1e-7
    one = Gaussian(tensor([0.3]), tensor([[1 + small]]))
    other = Gaussian(tensor([0.3]), tensor([[1.0]]))
    # small^2 / 4 to first order; the usual formula, tr - d - logdet, has no digit of it
    assert float(linear.gaussian_kl(one, other)) == pytest.approx(small**2 / 4, rel=1e-6)


# ---- KL control


def quadrature_tilt(m: float, s: float, Q: float, slope: float, b: float, c: float):
    """log Z, mean and variance of exp(r / b) N(m, s), by numerical integration."""

    def weight(x: float, power: int) -> float:
        density = math.exp(-((x - m) ** 2) / (2 * s)) / math.sqrt(2 * math.pi * s)
        return x**power * density * math.exp((-Q * x**2 / 2 + slope * x + c) / b)

    # the exact centre, so that the integrator sees the peak
    v = 1 / (1 / s + Q / b)
    centre, width = v * (m / s + slope / b), 12 * math.sqrt(v)
    z, first, second = (
        scipy.integrate.quad(
            weight, centre - width, centre + width, (k,), epsabs=0, epsrel=1e-12, limit=200,
            points=[centre],
        )[0]
        for k in range(3)
    )  # fmt: skip
    return math.log(z), first / z, second / z - (first / z) ** 2


@pytest.mark.parametrize("Q", [0.7, 0.0, -0.5])
def test_tilt_is_the_reweighted_law(Q):
    law = Gaussian(tensor([0.4]), tensor([[0.6]]))
    tilted = linear.tilt(law, tensor([[Q]]), tensor([0.9]), 0.8, 0.25)
    log_z, mean, variance = quadrature_tilt(0.4, 0.6, Q, 0.9, 0.8, 0.25)
    assert float(tilted.log_normaliser) == pytest.approx(log_z, rel=1e-9)
    assert float(tilted.law.mean) == pytest.approx(mean, rel=1e-9)
    assert float(tilted.law.covariance) == pytest.approx(variance, rel=1e-8)


@given(SEEDS, DIMS, st.floats(1, 1e4), st.floats(0.2, 3))
def test_tilt_completes_the_square(seed, dim, condition, b):
    m, S = draw(seed, dim), positive(seed + 1, dim, condition)
    Q, slope = 0.2 * draw(seed + 2, dim, dim), draw(seed + 3, dim)
    Q = Q @ Q.T
    tilted = linear.tilt(Gaussian(m, S), Q, slope, b)
    precision = np.linalg.inv(S.numpy()) + Q.numpy() / b
    covariance = np.linalg.inv(precision)
    mean = covariance @ (np.linalg.solve(S.numpy(), m.numpy()) + slope.numpy() / b)
    bound = 1e-13 * condition  # what inverting S loses
    torch.testing.assert_close(
        tilted.law.covariance, torch.from_numpy(covariance), rtol=10 * bound, atol=10 * bound
    )
    torch.testing.assert_close(
        tilted.law.mean, torch.from_numpy(mean), rtol=100 * bound, atol=100 * bound
    )


@given(SEEDS, DIMS, st.floats(0.2, 3))
def test_log_normaliser_is_the_best_reward_less_kl(seed, dim, b):
    law = Gaussian(draw(seed, dim), positive(seed + 1, dim))
    Q, slope = positive(seed + 2, dim), draw(seed + 3, dim)
    tilted = linear.tilt(law, Q, slope, b, -0.4)

    def objective(candidate: Gaussian) -> float:
        m, S = candidate.mean, candidate.covariance
        reward = -0.5 * (m @ Q @ m + (Q * S).sum()) + slope @ m - 0.4
        return float(reward - b * linear.gaussian_kl(candidate, law))

    best = objective(tilted.law)
    assert best == pytest.approx(b * float(tilted.log_normaliser), rel=1e-11, abs=1e-11)
    assert objective(Gaussian(tilted.law.mean + 0.01, tilted.law.covariance)) < best
    assert objective(Gaussian(tilted.law.mean, 1.01 * tilted.law.covariance)) < best


def test_a_direction_without_variance_is_not_tilted():
    law = Gaussian(tensor([0.4, -0.2]), tensor([[0.6, 0.0], [0.0, 0.0]]))
    Q = tensor([[0.7, 0.3], [0.3, -50.0]])
    tilted = linear.tilt(law, Q, tensor([0.9, 5.0]), 0.8)
    # given x_2 = -.2 the reward of x_1 has the slope .9 - .3 (-.2)
    log_z, mean, variance = quadrature_tilt(0.4, 0.6, 0.7, 0.96, 0.8, 25 * 0.04 + 5 * -0.2)
    assert float(tilted.log_normaliser) == pytest.approx(log_z, rel=1e-9)
    torch.testing.assert_close(tilted.law.mean, tensor([mean, -0.2]), rtol=1e-9, atol=0)
    expected = tensor([[variance, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(tilted.law.covariance, expected, rtol=1e-8, atol=1e-15)


@given(SEEDS, st.integers(1, 5), st.floats(-9, 9), st.floats(0.01, 30), st.integers(-3, 3))
def test_a_tilt_at_its_edge_is_refused_whatever_its_round_off(seed, dim, size, weight, ulps):
    S = 10**size * positive(seed, dim)
    direction = draw(seed + 1, dim)
    # 1 + S Q / b has the eigenvalue 0 along S v for Q = -b v v' / (v'S v)
    edge = -weight * torch.outer(direction, direction) / (direction @ S @ direction)
    law, slope = Gaussian(draw(seed + 2, dim), S), torch.zeros(dim, dtype=torch.float64)
    with pytest.raises(ValueError, match="beyond round-off"):
        linear.tilt(law, edge * (1 + ulps * EPS), slope, weight)
    linear.tilt(law, edge * (1 - 1e-9), slope, weight)


def test_tilts_without_a_normaliser_are_refused():
    law = Gaussian(tensor([0.4]), tensor([[0.5]]))
    edge = -0.8 / 0.5  # S^{-1} + Q / b = 0
    linear.tilt(law, tensor([[edge + 1e-6]]), tensor([0.0]), 0.8)
    for Q in (edge, edge - 1):
        with pytest.raises(ValueError, match="larger kl_weight"):
            linear.tilt(law, tensor([[Q]]), tensor([0.0]), 0.8)


@given(SEEDS, DIMS, st.floats(0.3, 3))
def test_kl_optimal_value_solves_its_hamilton_jacobi_bellman_equation(seed, dim, b):
    A, shift, G = 0.5 * draw(seed, dim, dim), draw(seed + 1, dim), draw(seed + 2, dim, dim)
    Q, slope, x = positive(seed + 3, dim), draw(seed + 4, dim), draw(seed + 5, 3, dim)

    def value(t: Tensor) -> linear.Quadratic:
        return linear.kl_optimal_value(linear.transition(A, shift, G, 1 - t), Q, slope, b, 0.3)

    t = tensor(0.4)
    now, rate = torch.func.jvp(lambda t: value(t)(x), (t,), (torch.ones_like(t),))
    V = value(t)
    gradient, drift = V.gradient(x), linear.kl_optimal_drift(V, G, b)
    covariance_rate = G @ G.T
    residual = (
        rate
        + (gradient * (x @ A.T + shift)).sum(-1)
        + 0.5 * (covariance_rate * V.hessian).sum()
        + ((gradient @ covariance_rate) * gradient).sum(-1) / (2 * b)
    )
    scale = float(now.abs().max() + gradient.square().max() * (1 + covariance_rate.abs().max()) + 1)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(
        drift(x), gradient @ covariance_rate / b, rtol=1e-12, atol=1e-12 * scale
    )
    end = value(tensor(1.0))(x)
    reward = -0.5 * ((x @ Q) * x).sum(-1) + x @ slope + 0.3
    torch.testing.assert_close(end, reward, rtol=1e-13, atol=1e-13)


def test_expected_value_at_the_start_is_the_tilts_log_normaliser():
    # of a base law that forgets its start the terminal law is the tilt, and V is constant
    forgetful = linear.Transition(
        torch.zeros(2, 2, dtype=torch.float64), draw(0, 2), positive(1, 2)
    )
    Q, slope = positive(2, 2), draw(3, 2)
    value = linear.kl_optimal_value(forgetful, Q, slope, 0.7)
    tilted = linear.tilt(Gaussian(forgetful.f, forgetful.C), Q, slope, 0.7)
    assert not bool(value.hessian.any())
    # sums of terms of order one
    torch.testing.assert_close(value.constant, 0.7 * tilted.log_normaliser, rtol=0, atol=1e-13)


# ---- derivatives


def sym(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def spd(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT + 0.3 * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


@pytest.mark.parametrize("dim", [1, 3])
def test_derivatives_in_every_argument(dim):
    A, A0, G, L, L0 = (draw(k, dim, dim).requires_grad_() for k in range(5))
    b, b0, m, m0, slope = (draw(k, dim).requires_grad_() for k in range(5, 10))
    time, weight = tensor(0.7).requires_grad_(), tensor(1.3).requires_grad_()

    def moments(A, b, G, m, L, time):
        law = linear.gaussian_moments(A, b, G, Gaussian(m, spd(L)), time)
        return law.mean, law.covariance

    def path(A, b, A0, b0, G, m, L, time):
        start = Gaussian(m, spd(L))
        return linear.linear_path_kl(Affine(A, b), Affine(A0, b0), spd(G), start, time)

    def between(m, L, m0, L0):
        return linear.gaussian_kl(Gaussian(m, spd(L)), Gaussian(m0, spd(L0)))

    def tilted(m, L, L0, slope, weight):
        tilted_law = linear.tilt(Gaussian(m, spd(L)), 0.1 * sym(L0), slope, 3 + weight, weight)
        return tilted_law.law.mean, tilted_law.law.covariance, tilted_law.log_normaliser

    gradcheck = torch.autograd.gradcheck
    assert gradcheck(moments, (A, b, G, m, L, time))
    assert gradcheck(path, (A, b, A0, b0, G, m, L, time))
    assert gradcheck(between, (m, L, m0, L0))
    assert gradcheck(tilted, (m, L, L0, slope, weight))


def test_derivatives_at_a_pull_of_zero_and_at_equal_laws():
    numbers = [tensor([each]).requires_grad_() for each in (0.0, 0.3, 0.5, 0.1, 0.7, 0.6, 0.2, 0.9)]
    assert torch.autograd.gradcheck(linear.ornstein_uhlenbeck_path_kl, numbers)
    assert torch.autograd.gradcheck(linear.ornstein_uhlenbeck_terminal_kl, numbers)
    m = draw(0, 2).requires_grad_()
    same = Gaussian(m, torch.eye(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(linear.gaussian_kl(same, Gaussian(0 * m, same.covariance)), m)
    torch.testing.assert_close(gradient, m.detach())


# ---- what is refused

EYE, ZERO2 = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
GOOD = {"A": -EYE, "b": ZERO2, "G": EYE, "time": 1.0}


@pytest.mark.parametrize(
    "bad",
    [
        {"A": torch.eye(3, dtype=torch.float64)},
        {"A": torch.ones(2, 3, dtype=torch.float64)},
        {"A": EYE.float()},
        {"A": torch.eye(2, dtype=torch.int64)},
        {"A": EYE * math.nan},
        {"b": torch.zeros(3, dtype=torch.float64)},
        {"b": torch.zeros((), dtype=torch.float64)},
        {"G": torch.ones(2, dtype=torch.float64)},
        {"G": torch.zeros((), dtype=torch.float64)},
        {"G": EYE * math.inf},
        {"time": -0.1},
        {"time": math.nan},
        {"A": torch.zeros(4, 2, 2, dtype=torch.float64), "b": torch.zeros(3, 2).double()},
    ],
    ids=str,
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_linear_sdes_are_refused(bad):
    arguments = GOOD | bad
    with pytest.raises((ValueError, TypeError)):
        linear.transition(**arguments)
    time = arguments.pop("time")
    with pytest.raises((ValueError, TypeError)):
        linear.gaussian_moments(**arguments, start=Gaussian(ZERO2, EYE), time=time)


def test_bad_laws_and_weights_are_refused():
    good = Gaussian(ZERO2, EYE)
    lopsided = Gaussian(ZERO2, tensor([[1.0, 0.5], [0.0, 1.0]]))
    flat = Gaussian(ZERO2, torch.zeros(2, 2, dtype=torch.float64))
    negative = Gaussian(ZERO2, -EYE)
    for bad in (lopsided, flat, negative):
        with pytest.raises(ValueError, match="covariance"):
            linear.gaussian_kl(bad, good)
        with pytest.raises(ValueError, match="covariance"):
            linear.gaussian_kl(good, bad)
    for bad in (lopsided, negative):
        with pytest.raises(ValueError, match="covariance"):
            linear.tilt(bad, EYE, ZERO2, 1.0)
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="kl_weight"):
            linear.tilt(good, EYE, ZERO2, weight)
    with pytest.raises(ValueError, match="Q"):
        linear.tilt(good, lopsided.covariance, ZERO2, 1.0)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("number", [0.0, 0.7])
def test_a_number_stands_for_no_vector_and_no_matrix(number):
    bad, good, still = tensor(number), Gaussian(ZERO2, EYE), linear.Affine(0 * EYE, ZERO2)
    base = linear.transition(-EYE, ZERO2, EYE, 1.0)
    for name in ("A", "b", "G"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            linear.transition(**GOOD | {name: bad})
    for law, name in ((Gaussian(bad, EYE), "mean"), (Gaussian(ZERO2, bad), "covariance")):
        for refused in (
            lambda law=law: linear.gaussian_kl(law, good),
            lambda law=law: linear.tilt(law, EYE, ZERO2, 1.0),
            lambda law=law: linear.linear_path_kl(still, still, EYE, law, 1.0),
            lambda law=law: linear.gaussian_moments(-EYE, ZERO2, EYE, law, 1.0),
        ):
            with pytest.raises(ValueError, match=f"{name} must be"):
                refused()
    for Q, slope, name in ((bad, ZERO2, "Q"), (EYE, bad, "l")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            linear.kl_optimal_value(base, Q, slope, 1.0)
    with pytest.raises(ValueError, match="G must be"):
        linear.linear_path_kl(still, still, bad, good, 1.0)


def test_an_empty_batch_stays_empty():
    none = torch.zeros(0, 2, 2, dtype=torch.float64)
    assert linear.transition(none, ZERO2, EYE, 1.0).C.shape == (0, 2, 2)


def test_expanded_and_transposed_tensors_are_as_good():
    A = draw(0, 2, 2)
    plain = linear.transition(A.T.contiguous().expand(3, 2, 2).contiguous(), ZERO2, EYE, 1.0)
    odd = linear.transition(A.T.expand(3, 2, 2), ZERO2, EYE, 1.0)
    torch.testing.assert_close(plain.C, odd.C, rtol=0, atol=64 * EPS * float(odd.C.abs().max()))


# ---- batches, sizes, and one bad member among good ones


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_drifts_that_differ_without_noise_are_found_at_any_size_in_any_member(size):
    G = tensor([[0.0], [0.5]])
    good, bad = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[1.0, 0.0], [0.0, 0.0]])
    start = Gaussian(ZERO2, EYE)

    def divergence(*shifts):
        law = Affine(size * torch.stack(shifts), ZERO2)
        return linear.linear_path_kl(law, Affine(0 * EYE, ZERO2), G, start, 1e-30)

    assert divergence(good, 1e13 * good).shape == (2,)
    for members in ((good, bad), (bad, good), (1e13 * good, bad)):
        with pytest.raises(ValueError, match="infinite"):
            divergence(*members)


def test_drifts_that_differ_in_some_entries_only_are_covered_up_to_round_off():
    G, start = positive(0, 3) + draw(1, 3, 3), Gaussian(draw(2, 3), positive(3, 3))
    shift = tensor([[0.0, 0.3, 0.0], [0.0, 0.0, -1.7], [0.0, 0.0, 0.0]])
    zero = torch.zeros(3, dtype=torch.float64)
    divergence = linear.linear_path_kl(Affine(shift, zero), Affine(0 * shift, zero), G, start, 1e-7)
    u = torch.linalg.solve(G, shift)
    second = start.covariance + torch.outer(start.mean, start.mean)
    assert float(divergence) == pytest.approx(0.5e-7 * float((u.T @ u * second).sum()), rel=1e-5)


def test_a_batch_of_tilts_is_its_members():
    laws = Gaussian(draw(0, 4, 2), torch.stack([positive(k, 2) for k in range(4)]))
    Q, slope = torch.stack([0.3 * positive(k, 2) for k in range(4, 8)]), draw(1, 4, 2)
    weight, constant = tensor([0.5, 0.8, 1.3, 2.1]), tensor([0.1, -0.4, 0.7, 0.0])
    G = draw(2, 2, 3)
    tilted = linear.tilt(laws, Q, slope, weight, constant)
    base = linear.transition(-EYE, draw(4, 4, 2), G, weight)
    value = linear.kl_optimal_value(base, Q, slope, weight, constant)
    drift = linear.kl_optimal_drift(value, G, weight)
    x = draw(3, 2)
    for k in range(4):
        b, c = float(weight[k]), float(constant[k])
        law = Gaussian(laws.mean[k], laws.covariance[k])
        one = linear.tilt(law, Q[k], slope[k], b, c)
        torch.testing.assert_close(tilted.law.mean[k], one.law.mean)
        torch.testing.assert_close(tilted.law.covariance[k], one.law.covariance)
        torch.testing.assert_close(tilted.log_normaliser[k], one.log_normaliser)
        here = linear.Transition(base.F[k], base.f[k], base.C[k])
        alone = linear.kl_optimal_value(here, Q[k], slope[k], b, c)
        for name in ("hessian", "slope", "constant"):
            torch.testing.assert_close(getattr(value, name)[k], getattr(alone, name))
        pushed = linear.kl_optimal_drift(alone, G, b)
        torch.testing.assert_close(Affine(drift.matrix[k], drift.vector[k])(x), pushed(x))
        plain = linear.tilt(law, Q[k], slope[k], b)  # without a constant
        torch.testing.assert_close(one.log_normaliser - plain.log_normaliser, tensor(c / b))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_one_bad_member_of_a_batch_of_tilts_is_refused(size):
    slope, weights = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    good = size * torch.diag(tensor([1.0, 0.3]))

    def tilt(covariances, costs, weights=weights):
        return linear.tilt(Gaussian(slope, torch.stack(covariances)), costs, slope, weights)

    costs = EYE.expand(2, 2, 2) / size
    tilt([good, good], costs)
    tilt([good, size * torch.diag(tensor([1.0, -1e-14]))], costs)  # round-off of a singular one
    tilt([good, torch.zeros_like(good)], costs)  # no spread at all
    for bad in (torch.diag(tensor([1.0, -1e-6])), torch.diag(tensor([-1e-6, 1.0]))):
        for members in ([good, size * bad], [size * bad, good], [1e9 * good, size * bad]):
            with pytest.raises(ValueError, match="covariance must not be negative"):
                tilt(members, costs)
    for sign in (tensor([1.0, -1.0]), tensor([-1.0, 1.0]), tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="kl_weight must be positive"):
            tilt([good, good], costs, sign)
    edge = torch.diag(tensor([-1.0, 1.0])) / size  # 1 + S Q / b = 0 in one direction
    for members in ([edge, EYE / size], [EYE / size, edge]):
        with pytest.raises(ValueError, match="larger kl_weight"):
            tilt([good, good], torch.stack(members))
        tilt([good, good], 0.999 * torch.stack(members))


def test_one_lopsided_member_of_a_batch_is_refused():
    lopsided = EYE + tensor([[0.0, 1e-3], [0.0, 0.0]])
    good = Gaussian(ZERO2, EYE)
    pair = torch.stack([EYE, lopsided])
    with pytest.raises(ValueError, match="covariance"):
        linear.gaussian_kl(Gaussian(ZERO2, pair), good)
    with pytest.raises(ValueError, match="covariance"):
        linear.gaussian_kl(Gaussian(ZERO2, torch.stack([EYE, 0 * EYE])), good)
    for start in (Gaussian(ZERO2, pair), Gaussian(torch.zeros(3).double(), torch.eye(3).double())):
        with pytest.raises((ValueError, TypeError)):
            linear.gaussian_moments(-EYE, ZERO2, EYE, start, 1.0)
        with pytest.raises((ValueError, TypeError)):
            linear.linear_path_kl(Affine(-EYE, ZERO2), Affine(EYE, ZERO2), EYE, start, 1.0)
    with pytest.raises(ValueError, match="time must not be negative"):
        linear.transition(-EYE, ZERO2, EYE, tensor([1.0, -0.1]))
    with pytest.raises(ValueError, match="time must not be negative"):
        linear.linear_path_kl(
            Affine(-EYE, ZERO2), Affine(EYE, ZERO2), EYE, good, tensor([1.0, -0.1])
        )
    base = linear.transition(-EYE, ZERO2, EYE, 1.0)
    with pytest.raises(ValueError, match="Q"):
        linear.kl_optimal_value(base, pair, ZERO2, 1.0)
    with pytest.raises(ValueError, match="C"):
        linear.kl_optimal_value(linear.Transition(base.F, base.f, lopsided), EYE, ZERO2, 1.0)


def test_a_batch_of_divergences_is_its_members_and_the_bad_law_is_named():
    one = Gaussian(draw(0, 3, 2), torch.stack([positive(k, 2) for k in range(3)]))
    other = Gaussian(draw(1, 3, 2), torch.stack([positive(k, 2) for k in range(3, 6)]))
    divergence = linear.gaussian_kl(one, other)
    for k in range(3):
        alone = linear.gaussian_kl(
            Gaussian(one.mean[k], one.covariance[k]), Gaussian(other.mean[k], other.covariance[k])
        )
        torch.testing.assert_close(divergence[k], alone)
    flat = Gaussian(ZERO2, 0 * EYE)
    with pytest.raises(ValueError, match=r"^covariance must"):
        linear.gaussian_kl(flat, Gaussian(ZERO2, EYE))
    with pytest.raises(ValueError, match=r"^reference_covariance must"):
        linear.gaussian_kl(Gaussian(ZERO2, EYE), flat)


def test_tilts_of_two_batch_dimensions_are_as_good_as_of_one():
    laws = Gaussian(draw(0, 4, 2), torch.stack([positive(k, 2) for k in range(4)]))
    Q, slope = torch.stack([0.3 * positive(k, 2) for k in range(4, 8)]), draw(1, 4, 2)
    flat = linear.tilt(laws, Q, slope, 0.8)
    nested = linear.tilt(Gaussian(laws.mean[None], laws.covariance[None]), Q[None], slope, 0.8)
    torch.testing.assert_close(nested.law.mean[0], flat.law.mean)
    torch.testing.assert_close(nested.log_normaliser[0], flat.log_normaliser)


def test_a_stiff_member_or_direction_does_not_overflow_beside_a_tame_one():
    A = torch.stack([torch.diag(tensor([-1e5, -0.01])), torch.diag(tensor([-0.02, -0.03]))])
    transition = linear.transition(A, ZERO2, EYE, 20.0)
    for one, rates in zip(transition.C, (tensor([1e5, 0.01]), tensor([0.02, 0.03])), strict=True):
        expected = -torch.expm1(-40 * rates) / (2 * rates)
        torch.testing.assert_close(one.diagonal(), expected, rtol=1e-9, atol=0)
