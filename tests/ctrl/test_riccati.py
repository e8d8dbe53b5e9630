"""LQ solutions: against scipy, moment equations, autodiff residuals, published formulas."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ctrl
from ctrl import linear
from ctrl.linear import LinearGaussian, LinearQuadratic
from ctrl.linear.lq import value_rate
from ctrl.q_learning import q_rate, q_rates
from verification.closed_form import lq as exact

NODES = torch.tensor([0.2, 0.35, 0.9, 1.3], dtype=torch.float64)
SEEDS, DIMS = st.integers(0, 2**31), st.integers(1, 4)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(seed: int, dim: int, condition: float = 10.0) -> Tensor:
    basis = torch.linalg.qr(draw(seed, dim, dim)).Q
    eigenvalues = torch.logspace(0, -math.log10(condition), dim, dtype=torch.float64)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    return 0.5 * (matrix + matrix.T)


def random_lq(
    seed: int,
    dim: int,
    *,
    condition: float = 10.0,
    controlled_noise: float = 0.3,
    discount: float = 0.3,
    temperature: float = 0.2,
) -> LinearQuadratic:
    """Every coefficient; two actions, two Brownian motions; M - R'N^{-1}R stays positive."""
    return LinearQuadratic(
        A=draw(seed, dim, dim) / dim**0.5,
        B=draw(seed + 1, dim, 2),
        sigma=draw(seed + 2, dim, 2),
        M=positive(seed + 3, dim, condition),
        N=positive(seed + 4, 2),
        R=0.1 / condition * draw(seed + 5, 2, dim),
        p=draw(seed + 6, dim),
        l=draw(seed + 7, 2),
        H=positive(seed + 8, dim, condition),
        h=draw(seed + 9, dim),
        f=draw(seed + 10, dim),
        C=controlled_noise * draw(seed + 11, 2, dim, dim) / dim**0.5,
        D=controlled_noise * draw(seed + 12, 2, dim, 2),
        discount=discount,
        temperature=temperature,
    )


def endless(lq: LinearQuadratic, **changed) -> LinearQuadratic:
    return LinearQuadratic(**{**vars(lq), "H": 0 * lq.H, "h": 0 * lq.h, **changed})


def riccati_by_scipy(lq: LinearQuadratic, horizon: float):
    """The completed square, in numpy: no line shared with the library."""
    names = [each.name for each in dataclasses.fields(exact.LQ)]
    numbers = {name: np.asarray(getattr(lq, name)) for name in names}
    rates = {name: float(numbers[name]) for name in ("discount", "temperature")}
    by_motion = {"sigma": numbers["sigma"].T}  # a row for each Brownian motion
    S, e, c = exact.riccati(exact.LQ(**{**numbers, **rates, **by_motion}), horizon)
    return torch.from_numpy(S), torch.from_numpy(e), c


# ---- finite horizon


@settings(max_examples=7)
@given(SEEDS, DIMS, st.floats(1, 1e4), st.sampled_from([0.0, 0.2]))
def test_finite_horizon_solves_the_riccati_equation(seed, dim, condition, temperature):
    lq = random_lq(seed, dim, condition=condition, temperature=temperature)
    values = linear.solve_lq(lq, NODES).values
    S, e, c = riccati_by_scipy(lq, 1.1)
    scale = float(S.abs().max() + e.abs().max() + abs(c)) + 1
    # DOP853 at its tightest tolerance
    torch.testing.assert_close(values.hessian[0], S, rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(values.slope[0], e, rtol=0, atol=1e-11 * scale)
    assert float(values.constant[0]) == pytest.approx(c, abs=1e-11 * scale)
    torch.testing.assert_close(values.hessian[-1], -lq.H, rtol=0, atol=1e-13)


@settings(max_examples=7)
@given(SEEDS, DIMS, st.floats(0.2, 1.3))
def test_optimal_policy_is_the_gibbs_policy_of_the_q_rate(seed, dim, time):
    # q = temperature log pi: the exploratory Hamilton-Jacobi-Bellman equation, at any (t, x, a)
    lq = random_lq(seed, dim)
    solution, problem = linear.solve_lq(lq, NODES), lq.problem(1.3)
    policy, t, x = solution.policy(), tensor(time), draw(seed, 4, dim)
    a = policy.mean(t, x) + draw(seed + 1, 4, 2)
    q = q_rate(problem, solution.value, t, x, a)
    scale = float(solution.value(t, x).abs().max() + a.square().max()) + 10
    torch.testing.assert_close(q, 0.2 * policy.log_prob(t, x, a), rtol=0, atol=1e-11 * scale)


def test_value_ends_in_the_terminal_reward():
    lq = random_lq(1, 3)
    x = draw(2, 5, 3)
    solution = linear.solve_lq(lq, NODES)
    reward = lq.problem(1.3).terminal_reward(x)
    torch.testing.assert_close(solution.value(NODES[-1], x), reward, rtol=1e-13, atol=1e-13)


def test_nodes_only_say_where_to_report():
    lq = random_lq(1, 3)
    few, many = NODES[[0, 3]], torch.linspace(0.2, 1.3, 40, dtype=torch.float64)
    one, other = linear.solve_lq(lq, few), linear.solve_lq(lq, many)
    t, x = tensor(0.777), draw(0, 4, 3)
    torch.testing.assert_close(one.value(t, x), other.value(t, x), rtol=1e-13, atol=1e-13)
    laws = other.laws
    assert laws.gain.shape == (40, 2, 3)
    torch.testing.assert_close(laws.gain[7], one.law_at(many[7]).gain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("time", [0.1, 1.4, math.nan, -math.inf], ids=str)
def test_there_is_no_value_outside_the_horizon(time):
    lq = random_lq(1, 2)
    solution, x, t = linear.solve_lq(lq, NODES), draw(0, 3, 2), tensor(time)
    names = rf"t must be from 0\.2 to 1\.3, .* got {time:g}; solve over times that contain"
    policy = solution.policy()
    asked = [
        lambda: solution.value(t, x),
        lambda: solution.value_at(t),
        lambda: solution.law_at(t),
        lambda: policy.mean(t, x),
        lambda: policy.log_prob(t, x, draw(1, 3, 2)),
        lambda: torch.func.jvp(lambda t: solution.value(t, x), (t,), (torch.ones_like(t),)),
        lambda: torch.func.grad(lambda t: solution.value(t, x).sum())(t),
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=names):
            ask()
    both = torch.stack([NODES[1], t])
    with pytest.raises(ValueError, match=r"t must be from 0\.2 to 1\.3, .* got (times from|nan)"):
        torch.func.vmap(lambda t: solution.value(t, x))(both)
    with pytest.raises(ValueError, match=r"t must be from 0\.2 to 1\.3, .* got (times from|nan)"):
        torch.func.vmap(lambda t: torch.func.grad(lambda t: solution.value(t, x).sum())(t))(both)
    # the end in float32 may lie a little behind it
    assert bool(torch.isfinite(solution.value(torch.tensor(1.3), x)).all())
    torch.func.vmap(lambda t: solution.value(t, x))(NODES)


def test_a_policy_is_not_followed_beyond_the_times_it_was_solved_for():
    lq = random_lq(1, 2)
    short, whole = linear.solve_lq(lq, NODES[:3]), linear.solve_lq(lq, NODES)
    grid = ctrl.TimeGrid(torch.linspace(0.2, 1.3, 8, dtype=torch.float64))
    problem, generator = lq.problem(1.3), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"t must be from 0\.2 to 0\.9"):
        ctrl.simulate(problem, short.policy(), draw(0, 5, 2), grid, generator=generator)
    paths = ctrl.simulate(problem, whole.policy(), draw(0, 5, 2), grid, generator=generator)
    with pytest.raises(ValueError, match=r"t must be from 0\.2 to 0\.9"):
        q_rates(problem, short.value, paths)  # all steps at once
    with pytest.raises(ValueError, match=r"t must be from 0\.2 to 0\.9"):
        linear.evaluate_lq(lq, short.law_at, NODES)


def test_the_value_of_a_bad_policy_may_have_no_improvement():
    # the action moves the noise, whose value is 3: N - D'S D = 1 - 3 before the end
    lq = LinearQuadratic(**ONE | {"M": tensor([[0.0]])}, H=tensor([[-3.0]]), D=tensor([[[1.0]]]))
    still = LinearGaussian(tensor([[-1.0]]), tensor([0.0]), tensor([[0.0]]))
    evaluated = linear.evaluate_lq(lq, still, tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"least eigenvalue is -2.* at t = 0\.9"):
        evaluated.law_at(tensor(0.9))
    with pytest.raises(ValueError, match=r"at t = times from 0\.9 to 1"):
        torch.func.vmap(lambda t: evaluated.law_at(t).gain)(tensor([0.9, 1.0]))


def test_a_policy_of_a_solution_drives_paths_and_their_rates():
    lq = random_lq(1, 2)
    grid = ctrl.uniform_grid(1.3, 6)
    solution, problem = linear.solve_lq(lq, grid.nodes), lq.problem(1.3)
    generator = torch.Generator().manual_seed(0)
    paths = ctrl.simulate(problem, solution.policy(), draw(0, 5, 2), grid, generator=generator)
    q = q_rates(problem, solution.value, paths)
    log_pi = torch.stack(
        [
            solution.policy().log_prob(t, paths.states[:, k], paths.actions[:, k])
            for k, t in enumerate(grid.nodes[:-1])
        ],
        dim=1,
    )
    torch.testing.assert_close(q, 0.2 * log_pi, rtol=1e-9, atol=1e-9)


def value_by_moments(lq: LinearQuadratic, law, x: Tensor, begin: float, end: float) -> float:
    """Expected discounted reward and entropy from x, by the moment equations of (X, a)."""
    A, B, M, N, R, p, q_a, f = (getattr(lq, name).numpy() for name in "ABMNRplf")
    C, D, s = lq.C.numpy(), lq.D.numpy(), lq.sigma.numpy().T
    rho, gam, n = float(lq.discount), float(lq.temperature), len(A)

    def rate(t, y):
        m, P = y[:n], y[n:-1].reshape(n, n)
        K, k, Sig = (each.numpy() for each in law(t))
        a = K @ m + k
        second_x, second_a = P + np.outer(m, m), K @ P @ K.T + np.outer(a, a) + Sig
        cross = K @ P + np.outer(a, m)  # E[a x']
        drift = A @ m + B @ a + f
        P_rate = (A + B @ K) @ P
        P_rate = P_rate + P_rate.T
        for Cj, Dj, sj in zip(C, D, s, strict=True):
            shift = Cj @ m + Dj @ a + sj
            closed = Cj + Dj @ K
            P_rate += closed @ P @ closed.T + np.outer(shift, shift) + Dj @ Sig @ Dj.T
        reward = -(np.sum(M * second_x) / 2 + np.sum(R * cross) + np.sum(N * second_a) / 2)
        reward -= p @ m + q_a @ a
        if gam:
            reward += gam / 2 * np.linalg.slogdet(2 * np.pi * np.e * Sig)[1]
        return np.concatenate([drift, P_rate.ravel(), [math.exp(-rho * (t - begin)) * reward]])

    start = np.concatenate([x.numpy(), np.zeros(n * n), [0.0]])
    y = scipy.integrate.solve_ivp(
        rate, (begin, end), start, method="DOP853", rtol=3e-14, atol=1e-13
    ).y[:, -1]
    m, P = y[:n], y[n:-1].reshape(n, n)
    second = P + np.outer(m, m)
    terminal = -(np.sum(lq.H.numpy() * second) / 2 + lq.h.numpy() @ m)
    return y[-1] + math.exp(-rho * (end - begin)) * terminal


def random_law(seed: int, dim: int) -> LinearGaussian:
    return LinearGaussian(0.5 * draw(seed, 2, dim), draw(seed + 1, 2), positive(seed + 2, 2))


@settings(max_examples=8)
@given(SEEDS, DIMS)
def test_value_of_a_policy_is_its_expected_reward(seed, dim):
    lq, law, x = random_lq(seed, dim), random_law(seed + 20, dim), draw(seed + 30, dim)
    evaluated = linear.evaluate_lq(lq, law, NODES)
    parts = law.gain, law.offset, law.covariance
    expected = value_by_moments(lq, lambda t: parts, x, 0.35, 1.3)
    value = evaluated.value(NODES[1], x.unsqueeze(0))
    scale = 1 + float(evaluated.values.hessian.abs().max() * x.square().sum())
    assert float(value) == pytest.approx(expected, rel=1e-10, abs=1e-11 * scale)


def test_value_of_a_policy_that_changes_over_time():
    lq, x = random_lq(5, 2), draw(0, 2)

    def law(t: Tensor) -> LinearGaussian:
        wave = torch.sin(3 * t)
        gain = wave[:, None, None] * draw(1, 2, 2)
        offset = wave.square()[:, None] * draw(2, 2)
        return LinearGaussian(gain, offset, (1 + wave.square())[:, None, None] * positive(3, 2))

    def one(t: float):
        at = law(tensor([t]))
        return at.gain[0], at.offset[0], at.covariance[0]

    policy_value = linear.evaluate_lq(lq, law, NODES).value(NODES[0], x.unsqueeze(0))
    assert float(policy_value) == pytest.approx(value_by_moments(lq, one, x, 0.2, 1.3), rel=1e-10)


@settings(max_examples=4)
@given(SEEDS, DIMS)
def test_optimal_policy_has_the_optimal_value_and_others_less(seed, dim):
    lq, x = random_lq(seed, dim), draw(seed + 40, 5, dim)
    best = linear.solve_lq(lq, NODES)
    again = linear.evaluate_lq(lq, best.law_at, NODES)
    optimum = best.value(NODES[0], x)
    scale = 1 + float(optimum.abs().max())
    torch.testing.assert_close(again.value(NODES[0], x), optimum, rtol=0, atol=1e-11 * scale)
    other = linear.evaluate_lq(lq, random_law(seed, dim), NODES)
    assert bool((other.value(NODES[0], x) < optimum).all())


def test_policy_iteration_over_a_finite_horizon_converges_quadratically():
    lq = random_lq(3, 2)
    best = linear.solve_lq(lq, NODES[2:]).values
    now = linear.evaluate_lq(lq, random_law(0, 2), NODES[2:])
    errors = []
    for _ in range(7):
        errors.append(float((now.values.hessian - best.hessian).abs().max()))
        now = linear.evaluate_lq(lq, now.law_at, NODES[2:])
    assert errors[-1] < 1e-12
    fast = [after / before**2 for before, after in itertools.pairwise(errors)
            if 1e-10 < after < 0.1]  # fmt: skip
    assert len(fast) >= 2
    assert max(fast) < 30 * min(fast)  # a constant, where linear convergence has 1/error


# ---- infinite horizon


def scalar_formulas(A, B, C, D, M, N, R, P, L, rho, lam):
    """Wang, Zariphopoulou & Zhou: the negative root of the quadratic for k2, and what follows."""
    # rho k2 S = (k2 (B + C D) - R)^2 + S (k2 (2 A + C^2) - M), S = N - k2 D^2
    bcd, growth = B + C * D, 2 * A + C * C - rho
    square = bcd**2 - D**2 * growth
    middle = -2 * bcd * R + N * growth + D**2 * M
    roots = np.roots([square, middle, R**2 - N * M])
    for k2 in sorted(float(root.real) for root in roots if abs(root.imag) < 1e-12):
        S = N - k2 * D**2
        K = (k2 * bcd - R) / S
        if k2 < 0 and S > 0 and rho > 2 * (A + B * K) + (C + D * K) ** 2:
            k1 = (-P - L * K) / (rho - A - B * K)
            k0 = (k1 * B - L) ** 2 / (2 * S)
            k0 += lam / 2 * (math.log(2 * math.pi * math.e * lam / S) - 1)
            return k2, k1, k0 / rho, K, (k1 * B - L) / S, lam / S
    return None


UNIT = st.floats(-1, 1)


@settings(max_examples=25)
@given(UNIT, st.floats(0.3, 1.5), UNIT, UNIT, UNIT, UNIT, UNIT, st.floats(0.2, 2))
def test_discounted_scalar_problem_is_the_published_one(A, B, C, D, R, P, L, rho):
    M, N, lam = 1.5, 0.8, 0.3
    expected = scalar_formulas(A, B, C, D, M, N, R, P, L, rho, lam)
    m = lambda number: tensor([[number]])
    lq = LinearQuadratic(
        m(A), m(B), m(0.0), m(M), m(N), m(R), tensor([P]), tensor([L]),
        C=tensor([[[C]]]), D=tensor([[[D]]]), discount=rho, temperature=lam,
    )  # fmt: skip
    if expected is None:
        with pytest.raises(ValueError, match="stabilisable"):
            linear.solve_lq_discounted(lq)
        return
    k2, k1, k0, K, k, variance = expected
    solution = linear.solve_lq_discounted(lq)
    value, law = solution.quadratic, solution.law
    pairs = [(value.hessian, k2), (value.slope, k1), (value.constant, k0)]
    pairs += [(law.gain, K), (law.offset, k), (law.covariance, variance)]
    for one, other in pairs:
        # np.roots of a quadratic keeps fewer digits than the rest
        assert float(one) == pytest.approx(other, rel=1e-9, abs=1e-10)


@settings(max_examples=7)
@given(SEEDS, DIMS, st.floats(1, 1e6))
def test_discounted_value_is_that_of_the_algebraic_riccati_equation(seed, dim, condition):
    lq = endless(random_lq(seed, dim, condition=condition, controlled_noise=0.0))
    kept = (lq.A - 0.15 * torch.eye(dim, dtype=torch.float64)).numpy()  # discount .3
    M, N, R, B = (getattr(lq, name).numpy() for name in "MNRB")
    # conditioned problems only: scipy's own residual bounds the comparison
    P = scipy.linalg.solve_continuous_are(kept, B, M, N, s=R.T)
    hessian = linear.solve_lq_discounted(lq).quadratic.hessian
    scale = float(np.abs(P).max())
    assume(scale < 1e4)
    torch.testing.assert_close(hessian, torch.from_numpy(-P), rtol=0, atol=1e-9 * scale)


@settings(max_examples=7)
@given(SEEDS, DIMS)
def test_stationary_solutions_solve_the_hamilton_jacobi_bellman_equation(seed, dim):
    lq = endless(random_lq(seed, dim, discount=1.0))
    x, t = draw(seed, 4, dim), tensor(0.0)
    try:
        solution = linear.solve_lq_discounted(lq)
    except ValueError:  # the noise C can be too large for any policy
        assume(False)
    a = solution.law.mean(x) + draw(seed + 1, 4, 2)
    q = q_rate(lq.problem(), solution.value, t, x, a)
    scale = 10 + float(solution.value(t, x).abs().max() + a.square().max())
    log_pi = solution.policy().log_prob(t, x, a)
    torch.testing.assert_close(q, 0.2 * log_pi, rtol=0, atol=1e-11 * scale)

    shifted = lq.A - 1.5 * torch.eye(dim, dtype=torch.float64)  # as stable without a discount
    averaged = endless(lq, A=shifted, discount=0.0)
    solution = linear.solve_lq_ergodic(averaged)
    a = solution.law.mean(x) + draw(seed + 1, 4, 2)
    q = q_rate(averaged.problem(), solution.value, t, x, a) - solution.average_reward
    log_pi = solution.policy().log_prob(t, x, a)
    scale = 10 + float(solution.value(t, x).abs().max() + a.square().max())
    torch.testing.assert_close(q, 0.2 * log_pi, rtol=0, atol=1e-11 * scale)


def test_a_long_horizon_forgets_its_end():
    lq = random_lq(2, 3)
    solution = linear.solve_lq(lq, tensor([0.0, 60.0]))
    stationary = linear.solve_lq_discounted(lq)
    values = solution.values
    torch.testing.assert_close(values.hessian[0], stationary.quadratic.hessian, rtol=0, atol=1e-10)
    # the slope and the constant remember it as e^{-.3 60}
    torch.testing.assert_close(values.slope[0], stationary.quadratic.slope, rtol=0, atol=1e-6)
    torch.testing.assert_close(values.constant[0], stationary.quadratic.constant, rtol=0, atol=1e-5)


def test_average_reward_is_the_slope_of_a_long_horizons_value():
    lq = endless(
        random_lq(2, 3), A=random_lq(2, 3).A - 2 * torch.eye(3, dtype=torch.float64), discount=0.0
    )
    long, longer = (linear.solve_lq(lq, tensor([0.0, end])).values for end in (20.0, 21.0))
    gain = longer.constant[0] - long.constant[0]
    solution = linear.solve_lq_ergodic(lq)
    # the closed loop, faster than e^{-t}, has forgotten the end but for e^{-20}
    assert float(gain) == pytest.approx(float(solution.average_reward), rel=1e-8)
    torch.testing.assert_close(long.slope[0], solution.quadratic.slope, rtol=0, atol=1e-8)


@settings(max_examples=8)
@given(SEEDS, DIMS)
def test_value_of_a_stationary_policy_is_its_expected_reward(seed, dim):
    lq = endless(
        random_lq(seed, dim, discount=0.8),
        A=draw(seed, dim, dim) / 2 - 2 * torch.eye(dim, dtype=torch.float64),
    )
    law, x = random_law(seed + 20, dim), draw(seed + 30, dim)
    law = LinearGaussian(0.2 * law.gain, law.offset, law.covariance)
    try:
        evaluated = linear.evaluate_lq_discounted(lq, law)
    except ValueError:
        assume(False)
    parts = law.gain, law.offset, law.covariance
    # with the value itself as the reward at time 2: the programming principle
    V = evaluated.quadratic
    ended = LinearQuadratic(**{**vars(lq), "H": -V.hessian, "h": -V.slope})
    expected = value_by_moments(ended, lambda t: parts, x, 0.0, 2.0)
    expected += math.exp(-0.8 * 2) * float(V.constant)
    scale = 1 + abs(float(V.constant)) + float(V.hessian.abs().max())
    value = evaluated.value(tensor(0.0), x.unsqueeze(0))
    assert float(value) == pytest.approx(expected, rel=1e-10, abs=1e-11 * scale)


def test_policy_iteration_is_newtons_method():
    lq = endless(
        random_lq(3, 3, discount=1.0), A=random_lq(3, 3).A - torch.eye(3, dtype=torch.float64)
    )
    best = linear.solve_lq_discounted(lq)
    law = LinearGaussian(0 * lq.R, 0 * lq.l, torch.eye(2, dtype=torch.float64))
    errors, values = [], []
    for _ in range(7):
        now = linear.evaluate_lq_discounted(lq, law).quadratic
        errors.append(float((now.hessian - best.quadratic.hessian).abs().max()))
        values.append(now(draw(0, 6, 3)))
        law = linear.improve_lq(lq, now)
    assert errors[-1] < 1e-12
    fast = [after / before**2 for before, after in itertools.pairwise(errors)
            if 1e-10 < after < 0.3]  # fmt: skip
    assert len(fast) >= 2
    assert max(fast) < 30 * min(fast)
    for before, after in itertools.pairwise(values):
        assert bool((after >= before - 1e-11).all()), "an improvement made the policy worse"


def test_a_problem_whose_costs_do_not_see_an_unstable_state_is_stabilised():
    # M = 0: doing nothing costs nothing, but the policy sought keeps the state from growing
    lq = LinearQuadratic(
        tensor([[1.0]]), tensor([[1.0]]), tensor([[0.5]]), tensor([[0.0]]), tensor([[2.0]])
    )
    solution = linear.solve_lq_ergodic(lq)
    # 2 A S + S^2 B^2 / N = 0: S = -2 A N / B^2, K = S B / N = -2 A / B
    assert float(solution.law.gain) == pytest.approx(-2.0, rel=1e-12)
    assert float(solution.quadratic.hessian) == pytest.approx(-4.0, rel=1e-12)


# ---- margins of stability, and many dimensions


def averaging(seed: int, dim: int, rate: float) -> Tensor:
    """-rate times the Laplacian of a random graph: agents that average. Its rows sum to 0."""
    weights = draw(seed, dim, dim).abs()
    weights = weights + weights.T
    return rate * (weights - torch.diag(weights.sum(-1)))


def simple(A: Tensor, B: Tensor, **settings) -> LinearQuadratic:
    one = torch.eye(len(A), dtype=torch.float64)
    return LinearQuadratic(A, B, one, one, torch.eye(B.shape[-1]).double(), **settings)


def residual(lq: LinearQuadratic, S: Tensor) -> tuple[float, float]:
    """What S leaves of the algebraic Riccati equation, and the size of its terms."""
    kept = lq.A - 0.5 * lq.rates[0] * torch.eye(len(lq.A)).double()
    G = lq.B.T @ S - lq.R
    terms = [kept.T @ S + S @ kept, -lq.M, G.T @ torch.linalg.solve(lq.N, G)]
    return float(sum(terms).norm()), float(sum(each.norm() for each in terms))


EPS = torch.finfo(torch.float64).eps


@settings(max_examples=12)
@given(SEEDS, st.sampled_from([2, 3, 5, 11]), st.floats(0.01, 3), st.sampled_from([0.0, 0.4]))
def test_agents_that_average_are_controlled(seed, dim, rate, discount):
    # without action their average keeps: an eigenvalue 0, or -1e-17 by round-off
    A = averaging(seed, dim, rate) + 0.5 * discount * torch.eye(dim, dtype=torch.float64)
    one = torch.eye(dim, dtype=torch.float64)
    lq = simple(A, one, discount=discount)
    solve = linear.solve_lq_discounted if discount else linear.solve_lq_ergodic
    solution = solve(lq)
    kept = (A - 0.5 * discount * one).numpy()
    expected = -torch.from_numpy(scipy.linalg.solve_continuous_are(kept, *[one.numpy()] * 3))
    S = solution.quadratic.hessian
    scale = float(expected.norm())
    torch.testing.assert_close(S, expected, rtol=0, atol=1e-12 * scale * dim)
    reward = solution.average_reward if discount == 0 else discount * solution.quadratic.constant
    assert float(reward) == pytest.approx(0.5 * float(expected.trace()), rel=1e-11)
    idle = LinearGaussian(0 * one, 0 * one[0], 0 * one)
    evaluate = linear.evaluate_lq_discounted if discount else linear.evaluate_lq_ergodic
    with pytest.raises(ValueError, match="gain must keep"):
        evaluate(lq, idle)
    with pytest.raises(ValueError, match="stabilisable"):
        solve(simple(A, 0 * one, discount=discount))


def test_a_margin_of_stability_is_found_in_any_member_of_a_batch():
    one = torch.eye(3, dtype=torch.float64)
    A = torch.stack([averaging(0, 3, 0.7), averaging(0, 3, 0.7) - one])
    for order in ([0, 1], [1, 0]):
        lq = LinearQuadratic(A[order], one, one, one, one)
        solution = linear.solve_lq_ergodic(lq)
        for k, i in enumerate(order):
            alone = linear.solve_lq_ergodic(simple(A[i], one))
            torch.testing.assert_close(solution.average_reward[k], alone.average_reward)
        idle = LinearGaussian(0 * one, 0 * one[0], 0 * one)
        with pytest.raises(ValueError, match="gain must keep"):
            linear.evaluate_lq_ergodic(lq, idle)


def test_a_problem_on_the_margin_that_no_cost_sees_is_refused():
    # A = 0 and M = 0: every gain below 0 is better than the last, and 0 keeps the state as it is
    lq = LinearQuadratic(**ONE | {"A": tensor([[0.0]]), "M": tensor([[0.0]])})
    with pytest.raises(ValueError, match="costs must have an optimal policy"):
        linear.solve_lq_ergodic(lq)


@pytest.mark.parametrize("actions", [60, 20])
@pytest.mark.parametrize("kind", ["averaging", "mean field"])
def test_sixty_dimensions_take_no_kronecker_product(kind, actions):
    dim = 60
    field = 0.4 * torch.eye(dim).double() + 1.7 * torch.ones(dim, dim).double() / dim
    A = averaging(0, dim, 0.02) if kind == "averaging" else field
    B = torch.eye(dim).double() if actions == dim else draw(1, dim, actions) / dim**0.5
    if actions < dim:
        A = A - 0.5 * torch.eye(dim).double()
    settings = {"R": 0.01 * draw(2, actions, dim), "p": draw(3, dim), "l": draw(4, actions)}
    settings |= {"f": draw(5, dim), "temperature": 0.3}
    for discount, solve in ((0.0, linear.solve_lq_ergodic), (0.7, linear.solve_lq_discounted)):
        lq = simple(A, B, discount=discount, **settings)
        solved_lq = solve(lq)
        left, size = residual(lq, solved_lq.quadratic.hessian)
        assert left <= 8 * dim * EPS * size
        # the Hamilton-Jacobi-Bellman equation, linear terms and entropy too
        q = value_rate(lq, solved_lq.quadratic, solved_lq.law)
        constant = 0.0 if discount else float(solved_lq.average_reward)
        scale = 1 + float(solved_lq.quadratic.slope.norm() * (1 + A.norm()))
        assert float(q.slope.abs().max()) <= 1e-12 * scale
        assert float(q.constant) == pytest.approx(constant, rel=1e-11, abs=1e-11 * scale)
    lq = simple(A, B, H=torch.eye(dim).double(), h=draw(8, dim), discount=0.2, **settings)
    solution = linear.solve_lq(lq, tensor([0.0, 1.0]))
    # d_t V + the rate of V along its own policy is 0
    t = tensor(0.37)
    value, slope = torch.func.jvp(
        lambda t: torch.cat([solution.value_at(t).hessian, solution.value_at(t).slope[None]]),
        (t,),
        (torch.ones_like(t),),
    )
    rate = value_rate(lq, solution.value_at(t), solution.law_at(t))
    rate = torch.cat([rate.hessian, rate.slope[None]])
    scale = float(value.abs().max() * (A.norm() + B.norm() ** 2 * value.abs().max()))
    torch.testing.assert_close(slope + rate, 0 * rate, rtol=0, atol=1e-11 * scale)


@settings(max_examples=4)
@given(SEEDS, DIMS, st.sampled_from([0.0, 0.3]))
def test_the_flow_and_collocation_agree(seed, dim, discount):
    # zeros that are given are noise to collocation, and those left out are none to the flow
    full = random_lq(seed, dim, discount=discount)
    still = LinearQuadratic(**{n: each for n, each in vars(full).items() if n not in "CD"})
    quiet = LinearQuadratic(**vars(full) | {"C": 0 * full.C, "D": 0 * full.D})
    law, times = random_law(seed, dim), torch.linspace(0.2, 1.3, 9, dtype=torch.float64)
    for one, other in (
        (linear.solve_lq(still, NODES), linear.solve_lq(quiet, NODES)),
        (linear.evaluate_lq(still, law, NODES), linear.evaluate_lq(quiet, law, NODES)),
    ):
        by_flow, expected = one.value_at(times), other.value_at(times)
        for name in ("hessian", "slope", "constant"):
            part = getattr(expected, name)
            scale = 1 + float(max(each.abs().max() for each in vars(expected).values()))
            torch.testing.assert_close(getattr(by_flow, name), part, rtol=0, atol=1e-12 * scale)


def test_a_stiff_problem_is_followed_to_its_rest():
    # rates of 1 and of 3000: nothing of the flow grows that the value does not
    A, B = torch.diag(tensor([-1.0, 0.3])), torch.diag(tensor([1.0, 1e3]))
    M = torch.diag(tensor([1.0, 9.0]))
    lq = LinearQuadratic(A, B, torch.eye(2).double(), M, torch.eye(2).double())
    hessian = linear.solve_lq(lq, tensor([0.0, 40.0])).values.hessian[0]
    # s = (a - sqrt(a^2 + b^2 m)) / b^2 for each
    expected = [
        (a + math.sqrt(a * a + b * b * m)) / b**2 for a, b, m in ((-1, 1, 1), (0.3, 1e3, 9))
    ]
    torch.testing.assert_close(hessian.diagonal(), -tensor(expected), rtol=1e-11, atol=0)


# ---- exploration


def test_cost_of_exploration_is_what_the_policies_lose():
    for horizon in (0.7, math.inf):
        lq = endless(random_lq(4, 3, discount=0.8, temperature=0.3))
        cold = endless(lq, temperature=0.0)
        x, t = draw(0, 4, 3), tensor(0.0)
        if math.isinf(horizon):
            best, warm = linear.solve_lq_discounted(cold), linear.solve_lq_discounted(lq)
            plain = linear.evaluate_lq_discounted(cold, warm.law)  # reward without entropy
        else:
            nodes = tensor([0.0, horizon])
            best, warm = linear.solve_lq(cold, nodes), linear.solve_lq(lq, nodes)
            plain = linear.evaluate_lq(cold, warm.law_at, nodes)
        lost = best.value(t, x) - plain.value(t, x)
        # two actions: .3 * 2 / 2 * int_0^horizon e^{-.8 t} dt
        expected = 0.3 * (1 - math.exp(-0.8 * horizon)) / 0.8
        torch.testing.assert_close(lost, tensor([expected] * 4), rtol=0, atol=1e-11)
        assert float(linear.cost_of_exploration(lq, horizon)) == pytest.approx(expected, rel=1e-14)


def test_cost_of_exploration_without_discount_grows_with_the_horizon():
    lq = random_lq(4, 3, discount=0.0, temperature=0.3)
    assert float(linear.cost_of_exploration(lq, 2.5)) == pytest.approx(0.75, rel=1e-15)
    with pytest.raises(ValueError, match="horizon"):
        linear.cost_of_exploration(lq)


# ---- batches and derivatives


def test_a_batch_is_its_members():
    members = [random_lq(seed, 2, discount=2.0 + 0.3 * seed) for seed in range(3)]
    many = LinearQuadratic(
        **{
            name: torch.stack([getattr(each, name) for each in members])
            for name in vars(members[0])
        }
    )
    x, t = draw(0, 3, 2), tensor(0.5)
    solution = linear.solve_lq(many, NODES)
    stationary = linear.solve_lq_discounted(many)
    value = linear.evaluate_lq(many, random_law(0, 2), NODES).value(t, x)
    for i, one in enumerate(members):
        alone = linear.solve_lq(one, NODES)
        expected = alone.value(t, x[i : i + 1])[0]
        torch.testing.assert_close(solution.value(t, x)[i], expected, rtol=1e-11, atol=1e-11)
        gain = solution.laws.gain[:, i]
        torch.testing.assert_close(gain, alone.laws.gain, rtol=1e-11, atol=1e-11)
        expected = linear.solve_lq_discounted(one).value(t, x[i : i + 1])[0]
        torch.testing.assert_close(stationary.value(t, x)[i], expected, rtol=1e-10, atol=1e-10)
        expected = linear.evaluate_lq(one, random_law(0, 2), NODES).value(t, x[i : i + 1])[0]
        torch.testing.assert_close(value[i], expected, rtol=1e-11, atol=1e-11)


NAMES = ["A", "B", "sigma", "M", "N", "R", "p", "l", "H", "h", "f", "C", "D"]
NAMES += ["discount", "temperature"]


def rebuilt(*values: Tensor) -> LinearQuadratic:
    """From free tensors; the costs are made symmetric, as a single entry's change is not."""
    by_name = dict(zip(NAMES, values, strict=True))
    for name in ("M", "N", "H"):
        by_name[name] = 0.5 * (by_name[name] + by_name[name].mT)
    return LinearQuadratic(**by_name)


def inputs(lq: LinearQuadratic) -> list[Tensor]:
    return [getattr(lq, name).clone().requires_grad_() for name in NAMES]


def test_derivatives_of_a_finite_horizon_in_everything(as_users_run_it):
    def solve(t, x, times, *values):
        solution = linear.solve_lq(rebuilt(*values), times)
        law = solution.law_at(t)
        return solution.value(t, x), law.gain, law.offset, law.covariance

    t, x = tensor(0.4).requires_grad_(), draw(0, 2, 2).requires_grad_()
    times = tensor([0.1, 0.8]).requires_grad_()
    assert torch.autograd.gradcheck(solve, [t, x, times, *inputs(random_lq(1, 2))], fast_mode=True)


def test_derivatives_of_a_policys_value_in_the_policy():
    lq = random_lq(1, 2)

    def evaluate(gain, offset, root):
        law = LinearGaussian(gain, offset, root @ root.T)
        endless_value = linear.evaluate_lq_discounted(stable, law).value(tensor(0.0), x)
        return linear.evaluate_lq(lq, law, NODES).value(NODES[0], x), endless_value

    stable = endless(lq, A=lq.A - 3 * torch.eye(2, dtype=torch.float64))
    x = draw(0, 2, 2)
    law = random_law(1, 2)
    parameters = (0.1 * law.gain, law.offset, torch.linalg.cholesky(law.covariance))
    assert torch.autograd.gradcheck(evaluate, [each.requires_grad_() for each in parameters])


def test_derivatives_of_stationary_solutions_in_everything(as_users_run_it):
    def discounted(*values):
        solution = linear.solve_lq_discounted(rebuilt(*values))
        return solution.quadratic.hessian, solution.value(tensor(0.0), x), solution.law.gain

    def ergodic(*values):
        free = dict(zip(NAMES, values, strict=True))
        lq = endless(
            rebuilt(*values), A=free["A"] - 3 * torch.eye(2, dtype=torch.float64), discount=0.0
        )
        solution = linear.solve_lq_ergodic(lq)
        return solution.average_reward, solution.law.offset, solution.law.covariance

    x = draw(0, 2, 2)
    assert torch.autograd.gradcheck(discounted, inputs(random_lq(1, 2)), fast_mode=True)
    one, x = inputs(random_lq(1, 1)), draw(0, 2, 1)
    few = [each if name in "AND" else each.detach() for name, each in zip(NAMES, one, strict=True)]
    assert torch.autograd.gradgradcheck(discounted, few)
    assert torch.autograd.gradcheck(ergodic, inputs(random_lq(1, 2)), fast_mode=True)


# ---- what is refused

ONE = {name: tensor([[1.0]]) for name in ("A", "B", "sigma", "M", "N")}


def test_problems_that_no_linear_policy_stabilises_are_refused():
    unreachable = LinearQuadratic(**ONE | {"B": tensor([[0.0]])}, discount=0.5)
    with pytest.raises(ValueError, match="stabilisable"):
        linear.solve_lq_discounted(unreachable)  # e^{2 t - .5 t}
    fine = LinearQuadratic(**ONE | {"B": tensor([[0.0]])}, discount=2.5)
    # S (2 - 2.5) = 1
    value = linear.solve_lq_discounted(fine).quadratic.hessian
    assert float(value) == pytest.approx(-2.0, rel=1e-13)
    noisy = LinearQuadratic(
        **ONE | {"A": tensor([[-1.0]]), "B": tensor([[0.0]])}, C=tensor([[[1.5]]])
    )
    with pytest.raises(ValueError, match="noise C"):
        linear.solve_lq_ergodic(noisy)  # 2 A + C^2 = .25


def test_rewards_of_large_actions_are_refused():
    bad = LinearQuadratic(**ONE | {"N": tensor([[-1.0]])}, discount=0.5)
    for solve in (linear.solve_lq_discounted, lambda lq: linear.solve_lq(lq, NODES)):
        with pytest.raises(ValueError, match="positive definite"):
            solve(bad)
    # N = 0 is enough where the noise punishes large actions
    lq = LinearQuadratic(
        **ONE | {"N": tensor([[0.0]])}, H=tensor([[1.0]]), D=tensor([[[0.5]]]), temperature=0.1
    )
    linear.solve_lq(lq, NODES)


def test_a_value_that_explodes_is_refused_where_it_does():
    # S' = -1 - S^2 backwards from 0: S = tan(T - t)
    rewarded = LinearQuadratic(**ONE | {"A": tensor([[0.0]]), "M": tensor([[-1.0]])})
    linear.solve_lq(rewarded, tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match=r"t = 0\.4292"):  # 2 - pi / 2
        linear.solve_lq(rewarded, tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match="cost"):
        linear.solve_lq_ergodic(rewarded)


def test_noise_that_comes_to_reward_large_actions_is_refused():
    # S = T - t, whatever the action: N - D^2 S is negative more than a unit of time before the end
    lq = LinearQuadratic(
        **ONE | {name: tensor([[0.0]]) for name in ("A", "B", "sigma")} | {"M": tensor([[-1.0]])},
        D=tensor([[[1.0]]]),
    )
    value = linear.solve_lq(lq, tensor([0.0, 0.9])).values.hessian[0]
    assert float(value) == pytest.approx(0.9, rel=1e-13)
    with pytest.raises(ValueError, match="before the horizon"):
        linear.solve_lq(lq, tensor([0.0, 2.0]))


def test_discounts_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="solve_lq_ergodic"):
        linear.solve_lq_discounted(LinearQuadratic(**ONE))
    with pytest.raises(ValueError, match="solve_lq_discounted"):
        linear.solve_lq_ergodic(LinearQuadratic(**ONE, discount=0.1))


@pytest.mark.parametrize(
    "times",
    [[1.0], [1.0, 0.5], [0.0, math.nan], [[0.0, 1.0]]],
    ids=str,
)
def test_bad_times_are_refused(times):
    with pytest.raises((ValueError, TypeError)):
        linear.solve_lq(LinearQuadratic(**ONE), tensor(times))
    with pytest.raises((ValueError, TypeError)):
        linear.solve_lq(LinearQuadratic(**ONE), tensor([0.0, 1.0]).float())


def test_bad_policies_are_refused():
    lq = LinearQuadratic(**ONE, discount=3.0, temperature=0.1)
    gain, offset, covariance = tensor([[-2.0]]), tensor([0.1]), tensor([[0.2]])
    linear.evaluate_lq_discounted(lq, LinearGaussian(gain, offset, covariance))
    bad = [
        (tensor([[-2.0, 1.0]]), offset, covariance),
        (gain, tensor([0.1, 0.2]), covariance),
        (gain, offset, tensor([[0.0]])),  # its entropy is minus infinity
        (gain, offset, tensor([[-0.1]])),
        (gain, offset, tensor([[math.nan]])),
        (gain * math.inf, offset, covariance),
        (gain.float(), offset, covariance),
    ]
    for parts in bad:
        for evaluate in (
            linear.evaluate_lq_discounted,
            lambda lq, law: linear.evaluate_lq(lq, law, NODES),
        ):
            with pytest.raises((ValueError, TypeError)):
                evaluate(lq, LinearGaussian(*parts))
    unstable = LinearGaussian(-gain, offset, covariance)
    with pytest.raises(ValueError, match="grows"):
        linear.evaluate_lq_discounted(lq, unstable)


def test_policies_without_spread_may_be_evaluated_where_entropy_is_not_paid():
    lq = LinearQuadratic(**ONE, discount=3.0)
    law = LinearGaussian(tensor([[-2.0]]), tensor([0.0]), tensor([[0.0]]))
    # 2 (A + B K) = -2: S (-2 - 3) = M + K^2 N = 5, c = sigma^2 S / 2 / 3
    value = linear.evaluate_lq_discounted(lq, law).quadratic
    assert float(value.hessian) == pytest.approx(-1.0, rel=1e-14)
    assert float(value.constant) == pytest.approx(-1 / 6, rel=1e-14)


# ---- one bad member among good ones


def twice(**settings) -> LinearQuadratic:
    """Two problems alike but for what is given."""
    return LinearQuadratic(**ONE | {"A": ONE["A"].expand(2, 1, 1)}, **settings)


def test_cost_of_exploration_of_a_batch():
    mixed = twice(discount=tensor([0.0, 0.3]), temperature=tensor([0.2, 0.5]))
    expected = tensor([0.1 * 2.5, 0.25 * (1 - math.exp(-0.75)) / 0.3])
    torch.testing.assert_close(linear.cost_of_exploration(mixed, 2.5), expected)
    with pytest.raises(ValueError, match="horizon"):
        linear.cost_of_exploration(mixed)
    both = twice(discount=tensor([0.6, 0.3]), temperature=0.2)
    torch.testing.assert_close(linear.cost_of_exploration(both), tensor([0.1 / 0.6, 0.1 / 0.3]))


@pytest.mark.parametrize("discounts", [[0.0, 0.5], [0.5, 0.0]], ids=str)
def test_one_discount_of_the_wrong_kind_spoils_a_batch(discounts):
    lq = twice(discount=tensor(discounts))
    for solve in (linear.solve_lq_discounted, linear.solve_lq_ergodic):
        with pytest.raises(ValueError, match="discount must be"):
            solve(lq)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_policys_spread_is_judged_by_its_own_size_in_every_member(size):
    lq = LinearQuadratic(
        **{name: torch.eye(2, dtype=torch.float64) for name in ("B", "sigma", "M", "N")},
        A=-torch.eye(2, dtype=torch.float64).expand(2, 2, 2),
        discount=3.0,
    )
    zero = torch.zeros(2, dtype=torch.float64)
    good = size * torch.diag(tensor([1.0, 0.4]))

    def evaluated(*covariances, problem=lq):
        law = LinearGaussian(zero.expand(2, 2, 2), zero.expand(2, 2), torch.stack(covariances))
        return linear.evaluate_lq_discounted(problem, law)

    nearly = size * torch.diag(tensor([1.0, -1e-14]))  # round-off of a singular one
    evaluated(good, nearly)
    evaluated(good, 0 * good)
    for eigenvalues in ([1.0, -1e-8], [-1e-8, 1.0]):
        bad = size * torch.diag(tensor(eigenvalues))
        for members in ((good, bad), (bad, good), (1e9 * good, bad)):
            with pytest.raises(ValueError, match="covariance must not be negative"):
                evaluated(*members)
    warm = LinearQuadratic(
        **{name: getattr(lq, name) for name in ("A", "B", "sigma", "M", "N", "discount")},
        temperature=tensor([0.0, 0.2]),
    )
    evaluated(0 * good, good, problem=warm)  # no entropy is paid for in the first
    with pytest.raises(ValueError, match="covariance must be positive definite"):
        evaluated(good, 0 * good, problem=warm)


def test_one_policy_that_lets_the_state_grow_spoils_a_batch():
    lq = twice(discount=0.5)
    gains = tensor([[[-2.0]], [[2.0]]])
    for order in ([0, 1], [1, 0]):
        law = LinearGaussian(gains[order], 0 * gains[:, 0], 0 * gains)
        with pytest.raises(ValueError, match="gain must keep"):
            linear.evaluate_lq_discounted(lq, law)
    edge = LinearQuadratic(**ONE | {"sigma": 0 * ONE["sigma"]})
    flat = LinearGaussian(-ONE["A"], tensor([0.0]), tensor([[0.0]]))  # A + B K = 0: it stays
    with pytest.raises(ValueError, match="gain must keep"):
        linear.evaluate_lq_ergodic(edge, flat)


def test_laws_of_more_problems_or_of_other_shapes_are_refused():
    lq = LinearQuadratic(**ONE, discount=3.0)

    def zeros(*batch, actions=1):
        shapes = ((*batch, 1, 1), (*batch, actions), (*batch, 1, 1))
        return LinearGaussian(*[torch.zeros(shape, dtype=torch.float64) for shape in shapes])

    linear.evaluate_lq_discounted(lq, zeros())
    with pytest.raises(ValueError, match=r"gain must be \[1, 1\], got \[2, 1, 1\]"):
        linear.evaluate_lq_discounted(lq, zeros(2))
    linear.evaluate_lq(lq, lambda t: zeros(*t.shape), NODES)
    with pytest.raises(ValueError, match=r"gain must be \['nodes', 1, 1\], got \[4, 2, 1, 1\]"):
        linear.evaluate_lq(lq, lambda t: zeros(*t.shape, 2), NODES)
    for law in (zeros(2), lambda t: zeros(*t.shape, 2)):
        linear.evaluate_lq(twice(discount=3.0), law, NODES)


def test_solutions_keep_their_problem_and_answer_at_times_of_any_precision():
    lq = LinearQuadratic(**ONE, discount=3.0)
    assert linear.solve_lq_discounted(lq).lq is lq
    endless = LinearQuadratic(**ONE)
    assert linear.solve_lq_ergodic(endless).lq is endless
    solution = linear.solve_lq(lq, NODES.clone().requires_grad_())  # times may be learned
    single = solution.value_at(torch.tensor(0.5))  # float32 has it exactly
    torch.testing.assert_close(single.hessian, solution.value_at(tensor(0.5)).hessian)
    both = solution.value_at(torch.tensor([0.5, 0.75]))
    torch.testing.assert_close(both.hessian[0], single.hessian, rtol=1e-13, atol=0)
    policy = linear.solve_lq(lq, NODES).policy()
    assert isinstance(policy, ctrl.DeterministicPolicy)
    x = draw(0, 3, 1)
    expected = linear.solve_lq(lq, NODES).law_at(tensor(0.5)).gain[0] * x
    torch.testing.assert_close(policy.mean(tensor(0.5), x), expected)


def test_a_batch_with_any_temperature_has_no_single_policy():
    lq = twice(discount=3.0, temperature=tensor([0.0, 0.2]))
    with pytest.raises(ValueError, match="one problem"):
        linear.solve_lq(lq, NODES).policy()


def test_one_entry_of_a_law_that_is_not_finite_is_refused():
    lq = LinearQuadratic(**{name: torch.eye(2).double() for name in ONE}, discount=3.0)
    gain = torch.zeros(2, 2, dtype=torch.float64)
    gain[0, 1] = math.nan
    with pytest.raises(ValueError, match="gain must be finite"):
        linear.evaluate_lq_discounted(lq, LinearGaussian(gain, gain[1], 0 * gain.nan_to_num()))


def test_a_stationary_value_of_a_batch_has_one_constant_for_each_problem():
    solved = linear.solve_lq_ergodic(twice())
    assert solved.quadratic.constant.tolist() == [0.0, 0.0]
    assert solved.average_reward.shape == (2,)


SHORT = tensor([0.9, 1.0])


@pytest.mark.parametrize(
    "solve", [linear.solve_lq_discounted, lambda lq: linear.solve_lq(lq, SHORT)]
)
def test_two_batch_dimensions_are_as_good_as_one(solve):
    members = [random_lq(seed, 2, discount=2.0 + 0.3 * seed) for seed in range(4)]
    parts = {n: torch.stack([getattr(each, n) for each in members]) for n in vars(members[0])}
    flat = LinearQuadratic(**parts)
    lq = LinearQuadratic(**{name: part.unsqueeze(0) for name, part in parts.items()})
    torch.testing.assert_close(linear.cost_of_exploration(lq)[0], linear.cost_of_exploration(flat))
    nested, expected = (
        each.quadratic if hasattr(each, "quadratic") else each.value_at(SHORT[0])
        for each in (solve(lq), solve(flat))
    )
    for name in ("hessian", "slope", "constant"):
        one, other = getattr(nested, name)[0], getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=str)
def test_one_problem_that_no_policy_stabilises_spoils_a_batch(order):
    B = tensor([[[0.0]], [[1.0]]])[order]
    with pytest.raises(ValueError, match="stabilisable"):
        linear.solve_lq_discounted(LinearQuadratic(**ONE | {"B": B}, discount=0.5))
