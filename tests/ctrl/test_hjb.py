"""The HJB solver: against closed forms, and against its own exact discrete answers."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctrl import (
    ControlledSDE,
    ControlProblem,
    DeterministicPolicy,
    GaussianPolicy,
    hjb,
    simulate,
    uniform_grid,
)
from ctrl.action_grid import ActionGrid, gauss_legendre, trapezoid
from ctrl.markov_chain import markov_chain
from ctrl.state_grid import Axis

NOW = torch.tensor(0.0, dtype=torch.float64)
CIRCLE = (Axis(-math.pi, math.pi, 24, "periodic"),)
IDLE = ActionGrid(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def inside(solution_table: Tensor, axes: tuple[Axis, ...], width: float) -> tuple[Tensor, Tensor]:
    """Nodes within ``width`` of the origin, and the table's rows there."""
    x = torch.cartesian_prod(*(axis.points() for axis in axes)).view(-1, len(axes))
    near = (x.abs() <= width).all(-1)
    return x[near], solution_table.reshape(len(x), -1)[near]


# --- scalar linear-quadratic, infinite horizon ------------------------------------------------


class Scalar:
    """dX = (A x + B a) dt + (C x + D a) dW + s dW', reward -(M x^2 + 2 R x a + N a^2) / 2 - ..."""

    A, B, C, M, R, N, P, L, rho, lam = -0.6, 0.8, 0.0, 1.3, 0.4, 0.9, 0.3, -0.2, 0.5, 0.3

    def __init__(self, D: float, noise: float = 0.7) -> None:
        self.D, self.s = D, noise

    def problem(self, temperature: float | None = None) -> ControlProblem:
        def sigma(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            both = torch.cat([self.C * x + self.D * a, torch.full_like(x, self.s)], dim=-1)
            return both.unsqueeze(1)

        def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            squares = self.M * x * x + 2 * self.R * x * a + self.N * a * a
            return -(squares / 2 + self.P * x + self.L * a).sum(-1)

        return ControlProblem(
            ControlledSDE(
                lambda t, x, a: self.A * x + self.B * a,
                sigma,
                noise="general",
                noise_dim=2,
                controls_diffusion=True,
            ),
            math.inf,
            reward,
            discount=self.rho,
            temperature=self.lam if temperature is None else temperature,
        )

    def coefficients(self) -> tuple[float, float, float, float, float]:
        """k2, k1, k0 of the value; gain and offset of the policy's mean (Wang et al. 2020)."""
        A, B, C, D, M, R, N, P, L = (getattr(self, name) for name in "ABCDMRNPL")

        def riccati(k: float) -> float:
            gain = (k * (B + C * D) - R) ** 2 / (N - k * D * D)
            return gain + k * (2 * A + C * C) - M - self.rho * k

        k2 = scipy.optimize.brentq(riccati, -50, 0, xtol=1e-15)
        S = N - k2 * D * D
        K = (k2 * (B + C * D) - R) / S
        k1 = (-L * K - P) / (self.rho - B * K - A)
        entropy = self.lam / 2 * (math.log(2 * math.pi * math.e * self.lam / S) - 1)
        k0 = ((k1 * B - L) ** 2 / (2 * S) + entropy + self.s**2 * k2 / 2) / self.rho
        return k2, k1, k0, K, (k1 * B - L) / S


WIDE = (Axis(-5.0, 5.0, 101),)


@pytest.mark.parametrize("D", [0.0, 0.5])
def test_scalar_exploratory_lq_is_the_closed_form(D):
    lq = Scalar(D)
    solution = hjb.solve_discounted(
        lq.problem(), WIDE, gauss_legendre(-8.0, 8.0, 41), differences="central"
    )
    k2, k1, k0, K, k = lq.coefficients()
    x, v = inside(solution.value.table, WIDE, 1.0)
    # central differences of a quadratic are exact; what is left is the wall, 4 away, seen through
    # e^{-4^2 / (2 variance)} with a stationary variance below 0.5 (D = 0: 2e-9)
    torch.testing.assert_close(v, k2 * x**2 / 2 + k1 * x + k0, rtol=0, atol=1e-5)
    x, mean = inside(solution.mean_action.table, WIDE, 1.0)
    torch.testing.assert_close(mean, K * x + k, rtol=0, atol=1e-4)
    x, std = inside(solution.action_std.table, WIDE, 1.0)
    exact_std = math.sqrt(lq.lam / (lq.N - k2 * D * D))
    torch.testing.assert_close(std, torch.full_like(std, exact_std), rtol=0, atol=1e-5)
    assert solution.residual < 1e-11  # round-off: rates of 1e3 times values of 10
    assert solution.end_mass.table[0, 40:61].max() < 1e-10


def test_monotone_differences_are_of_order_one_where_noise_is_weak():
    # |b| h > sigma^2 = 4e-4 for nearly all actions: their noise is |b| h instead
    lq = Scalar(0.0, noise=0.02)
    k2, k1, k0, *_ = lq.coefficients()
    errors = []
    for nodes in (21, 41, 81, 161):
        axes = (Axis(-4.0, 4.0, nodes),)
        solution = hjb.solve_discounted(lq.problem(), axes, gauss_legendre(-8.0, 8.0, 41))
        x, v = inside(solution.value.table, axes, 0.8)
        errors.append(float((v - (k2 * x**2 / 2 + k1 * x + k0)).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(0.8 < one < 1.3 for one in orders), (errors, orders)


def test_the_value_without_entropy_is_below_the_optimum_by_at_most_what_the_nodes_miss():
    # nodes da apart miss the maximum of a Hamiltonian with curvature N by at most N (da / 2)^2 / 2
    lq = Scalar(0.0)
    k2, k1, k0, *_ = lq.coefficients()
    k0 -= lq.lam / (2 * lq.rho) * math.log(2 * math.pi * lq.lam / lq.N)  # the entropy's share
    gaps = []
    for nodes in (33, 65, 129):
        solution = hjb.solve_discounted(lq.problem(0.0), WIDE, trapezoid(-8.0, 8.0, nodes))
        x, v = inside(solution.value.table, WIDE, 1.0)
        gap = k2 * x**2 / 2 + k1 * x + k0 - v
        missed = lq.N * (16 / (nodes - 1) / 2) ** 2 / 2 / lq.rho
        assert -1e-8 < float(gap.min()) <= float(gap.max()) < missed
        gaps.append(float(gap.mean()))
    assert 3 < gaps[0] / gaps[1] < 5
    assert 3 < gaps[1] / gaps[2] < 5


def test_the_value_tends_to_that_of_temperature_zero():
    lq = Scalar(0.0)
    cold = hjb.solve_discounted(lq.problem(0.0), WIDE, trapezoid(-8.0, 8.0, 801))
    _, limit = inside(cold.value.table, WIDE, 1.0)
    for temperature in (1e-2, 1e-3):
        warm = hjb.solve_discounted(lq.problem(temperature), WIDE, trapezoid(-8.0, 8.0, 801))
        _, v = inside(warm.value.table, WIDE, 1.0)
        shift = temperature / (2 * lq.rho) * math.log(2 * math.pi * temperature / lq.N)
        missed = lq.N * 0.01**2 / 2 / lq.rho  # by the nodes of temperature 0
        torch.testing.assert_close(v - shift, limit, rtol=0, atol=missed)


def test_evaluating_a_linear_policy_is_the_closed_form():
    lq, K, k, std = Scalar(0.5), -0.3, 0.2, 0.6
    policy = GaussianPolicy(lambda t, x: K * x + k, std)
    A, B, D, M, R, N, P, L = (getattr(lq, name) for name in "ABDMRNPL")
    # match powers of x in rho v = L v + E[r] + lam entropy, v = p2 x^2 / 2 + p1 x + p0
    p2 = -(M + 2 * R * K + N * K * K) / (lq.rho - 2 * (A + B * K) - (D * K) ** 2)
    p1 = (p2 * (B * k + D * D * K * k) - (R * k + N * K * k + P + L * K)) / (lq.rho - A - B * K)
    noise = lq.s**2 + D * D * (k * k + std**2)
    pay = -(N * (k * k + std**2) / 2 + L * k) + lq.lam * math.log(std * math.sqrt(17.079468445347))
    p0 = (p1 * B * k + p2 * noise / 2 + pay) / lq.rho  # 2 pi e = 17.079468...
    evaluated = hjb.evaluate_discounted(lq.problem(), policy, WIDE, differences="central")
    x, v = inside(evaluated.table, WIDE, 1.0)
    # as above: the wall, for a stationary variance of 0.36
    torch.testing.assert_close(v, p2 * x**2 / 2 + p1 * x + p0, rtol=0, atol=1e-5)


def test_the_optimal_policy_has_the_optimal_value():
    problem = Scalar(0.0).problem()
    solution = hjb.solve_discounted(problem, WIDE, gauss_legendre(-8.0, 8.0, 41))
    again = hjb.evaluate_discounted(problem, solution.policy(), WIDE)
    _, v = inside(solution.value.table, WIDE, 1.0)
    _, w = inside(again.table, WIDE, 1.0)
    torch.testing.assert_close(w, v, rtol=0, atol=1e-6)


# --- two dimensions ---------------------------------------------------------------------------


def plane() -> tuple[ControlProblem, np.ndarray, float]:
    """A 2-d problem with correlated noise; its Riccati matrix and constant by scipy."""
    A = np.array([[-0.7, 0.4], [-0.2, -0.5]])
    B, M, N = np.array([[0.3], [0.9]]), np.array([[1.1, 0.2], [0.2, 0.6]]), np.array([[0.8]])
    G = np.array([[0.6, 0.0], [0.2, 0.5]])
    rho, lam = 0.7, 0.2
    a, b, m, g = (torch.from_numpy(one) for one in (A, B, M, G))
    problem = ControlProblem(
        ControlledSDE(
            lambda t, x, u: x @ a.T + u @ b.T,
            lambda t, x: g.expand(len(x), 2, 2),
            noise="general",
            noise_dim=2,
        ),
        math.inf,
        lambda t, x, u: -0.5 * ((x @ m * x).sum(-1) + 0.8 * u[:, 0].square()),
        discount=rho,
        temperature=lam,
    )
    Pi = scipy.linalg.solve_continuous_are(A - rho / 2 * np.eye(2), B, M, N)
    entropy = lam / 2 * math.log(2 * math.pi * lam / 0.8)
    return problem, Pi, (entropy - 0.5 * np.trace(G @ G.T @ Pi)) / rho


@pytest.mark.parametrize("differences", ["central", "monotone"])
def test_two_dimensional_lq_with_correlated_noise_is_that_of_scipy(differences):
    problem, Pi, constant = plane()
    axes = (Axis(-4.0, 4.0, 41), Axis(-4.0, 4.0, 33))
    solution = hjb.solve_discounted(
        problem, axes, gauss_legendre(-6.0, 6.0, 41), differences=differences
    )
    x, v = inside(solution.value.table, axes, 1.0)
    exact = constant - 0.5 * (x @ torch.from_numpy(Pi) * x).sum(-1, keepdim=True)
    # the wall, 3 away, for a stationary variance below 0.3: e^{-15}; monotone differences add
    # noise where |b| h > sigma^2, far out or for rare actions
    atol = {"central": 1e-6, "monotone": 5e-2}[differences]
    torch.testing.assert_close(v, exact, rtol=0, atol=atol)
    gain = -torch.from_numpy(np.array([[0.3, 0.9]]) @ Pi) / 0.8
    x, mean = inside(solution.mean_action.table, axes, 1.0)
    torch.testing.assert_close(mean, x @ gain.T, rtol=0, atol=10 * atol)


def test_noise_along_a_line_that_meets_no_node_is_refused():
    along = torch.tensor([[0.7], [0.7 * math.sqrt(2)]], dtype=torch.float64)
    problem = ControlProblem(
        ControlledSDE(
            lambda t, x, a: 0 * x, lambda t, x: along.expand(len(x), 2, 1), "general", noise_dim=1
        ),
        math.inf,
        discount=0.4,
    )
    axes = (Axis(-4.0, 4.0, 17), Axis(-4.0, 4.0, 17))
    with pytest.raises(ValueError, match="correlated too strongly"):
        hjb.solve_discounted(problem, axes, IDLE)


@pytest.mark.parametrize("share", [0.95, -0.9])
def test_noise_of_any_other_correlation_moves_by_rates_that_are_not_negative(share):
    """And of its covariance: (x - y)(x - y)' of all moves, weighted by their rates."""
    G = torch.tensor([[0.9, 0.0], [0.5 * share, 0.1]], dtype=torch.float64)
    problem = ControlProblem(
        ControlledSDE(
            lambda t, x, a: 0 * x,
            lambda t, x, a: (1 + a[:, :1, None]) * G,
            "general",
            noise_dim=2,
            controls_diffusion=True,
        ),
        math.inf,
        discount=0.4,
    )
    axes = (Axis(-4.0, 4.0, 41), Axis(-3.0, 3.0, 25))
    actions = torch.tensor([[[0.0]], [[0.7]]], dtype=torch.float64)
    chain = markov_chain(problem, axes, 0.0, actions)
    assert bool((chain.rates >= 0).all())
    x = torch.cartesian_prod(*(axis.points() for axis in axes))
    middle = len(x) // 2
    moved = (x[chain.neighbours] - x)[:, middle]
    got = torch.einsum("ma,mi,mj->aij", chain.rates[..., middle], moved, moved)
    exact = (1 + actions[:, 0, 0])[:, None, None] ** 2 * (G @ G.mT)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


# --- Fourier modes: the exact answer of the discrete equations ----------------------------------


def decay(sigma: float, h: float, k: int) -> float:
    """-L cos(k x) / cos(k x) of the central difference."""
    return sigma**2 / h**2 * (1 - math.cos(k * h))


def test_a_fourier_mode_decays_as_the_scheme_says():
    sigma, discount, k, steps, horizon = 0.9, 0.4, 3, 7, 0.8
    problem = ControlProblem(
        ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: sigma),
        horizon,
        terminal_reward=lambda x: (k * x[:, 0] + 0.3).cos(),
        discount=discount,
    )
    rate = decay(sigma, CIRCLE[0].spacing, k) + discount
    step = rate * horizon / steps
    first = [(1 + step) ** -i for i in range(steps + 1)]
    second = [1.0, 1 / (1 + step)]
    for _ in range(steps - 1):
        second.append((4 * second[-1] - second[-2]) / (3 + 2 * step))
    mode = (k * CIRCLE[0].points() + 0.3).cos()
    for order, factors in ((1, first), (2, second)):
        solution = hjb.solve_finite_horizon(problem, CIRCLE, IDLE, steps=steps, order=order)
        exact = torch.tensor(factors[::-1], dtype=torch.float64)[:, None] * mode
        torch.testing.assert_close(solution.value.table, exact, rtol=0, atol=1e-13)
        policy = DeterministicPolicy(lambda t, x: 0 * x)
        again = hjb.evaluate_finite_horizon(problem, policy, CIRCLE, steps=steps, order=order)
        torch.testing.assert_close(again.table, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("share", [0.4, -0.4])
def test_a_plane_wave_under_correlated_noise_is_the_symbol_of_the_stencil(share):
    axes = (Axis(0.0, 2 * math.pi, 16, "periodic"), Axis(0.0, 2 * math.pi, 20, "periodic"))
    G = torch.tensor([[0.8, 0.0], [share, 0.7]], dtype=torch.float64)
    k, discount = (2, 3), 0.6
    problem = ControlProblem(
        ControlledSDE(
            lambda t, x, a: 0 * x, lambda t, x: G.expand(len(x), 2, 2), "general", noise_dim=2
        ),
        math.inf,
        lambda t, x, a: (k[0] * x[:, 0] + k[1] * x[:, 1]).cos(),
        discount=discount,
    )
    h, c = [axis.spacing for axis in axes], (G @ G.T).tolist()
    cross = c[0][1] / (h[0] * h[1])
    angle = [k[0] * h[0], k[1] * h[1]]
    diagonal = angle[0] + math.copysign(1, cross) * angle[1]
    rate = discount + abs(cross) * (1 - math.cos(diagonal))
    for i in range(2):
        rate += (c[i][i] / h[i] ** 2 - abs(cross)) * (1 - math.cos(angle[i]))
    x = torch.cartesian_prod(*(axis.points() for axis in axes))
    exact = (k[0] * x[:, 0] + k[1] * x[:, 1]).cos() / rate
    solution = hjb.solve_discounted(problem, axes, IDLE)
    torch.testing.assert_close(solution.value.table.reshape(-1), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.9, -0.9])
def test_a_plane_wave_is_the_symbol_of_central_differences_for_any_correlation(share):
    """The covariance is far from dominant in its diagonal, and moves are to neighbours only."""
    axes = (Axis(0.0, 2 * math.pi, 16, "periodic"), Axis(0.0, 2 * math.pi, 26, "periodic"))
    G = torch.tensor([[0.9, 0.0], [0.3 * share, 0.06]], dtype=torch.float64)
    k, discount = (2, 3), 0.6
    problem = ControlProblem(
        ControlledSDE(
            lambda t, x, a: 0 * x, lambda t, x: G.expand(len(x), 2, 2), "general", noise_dim=2
        ),
        math.inf,
        lambda t, x, a: (k[0] * x[:, 0] + k[1] * x[:, 1]).cos(),
        discount=discount,
    )
    h, c = [axis.spacing for axis in axes], (G @ G.T).tolist()
    angle = [k[0] * h[0], k[1] * h[1]]
    rate = discount + c[0][1] * math.sin(angle[0]) * math.sin(angle[1]) / (h[0] * h[1])
    rate += sum(c[i][i] * (1 - math.cos(angle[i])) / h[i] ** 2 for i in range(2))
    x = torch.cartesian_prod(*(axis.points() for axis in axes))
    exact = (k[0] * x[:, 0] + k[1] * x[:, 1]).cos() / rate
    solution = hjb.solve_discounted(problem, axes, IDLE, differences="central")
    torch.testing.assert_close(solution.value.table.reshape(-1), exact, rtol=0, atol=1e-12)


def test_transport_without_noise_is_upwind():
    # delta v = v_x + cos(x) to the right, differences towards where the state goes
    problem = ControlProblem(
        ControlledSDE(lambda t, x, a: 0 * x + 1.3, lambda t, x: 0.0),
        math.inf,
        lambda t, x, a: x[:, 0].cos(),
        discount=0.5,
    )
    table = hjb.solve_discounted(problem, CIRCLE, IDLE).value.table[0]
    h = CIRCLE[0].spacing
    symbol = 1 / (0.5 - 1.3 / h * (complex(math.cos(h), math.sin(h)) - 1))
    x = CIRCLE[0].points()
    exact = symbol.real * x.cos() - symbol.imag * x.sin()
    torch.testing.assert_close(table, exact, rtol=0, atol=1e-12)


# --- finite horizon ---------------------------------------------------------------------------


def cole_hopf(sigma: float, N: float, temperature: float, left: float, x: Tensor) -> Tensor:
    """dX = a dt + sigma dW, reward -N a^2 / 2, cos(X_T): V = c log E exp(cos(x + noise) / c)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    c = N * sigma**2
    tilted = ((x.unsqueeze(-1) + sigma * math.sqrt(left) * z).cos() / c).exp()
    return c * (tilted @ w).log() + left * temperature / 2 * math.log(2 * math.pi * temperature / N)


def bounded_problem(sigma: float, N: float, temperature: float, horizon: float) -> ControlProblem:
    return ControlProblem(
        ControlledSDE(lambda t, x, a: a, lambda t, x: sigma),
        horizon,
        lambda t, x, a: -0.5 * N * a[:, 0].square(),
        lambda x: x[:, 0].cos(),
        temperature=temperature,
    )


@pytest.mark.parametrize("order", [1, 2])
def test_a_bounded_nonlinear_problem_converges_to_cole_hopf(order):
    sigma, N, temperature, horizon = 1.1, 0.7, 0.2, 0.9
    problem = bounded_problem(sigma, N, temperature, horizon)
    errors = []
    for factor in (1, 2, 4):
        axes = (Axis(-math.pi, math.pi, 20 * factor, "periodic"),)
        # second order in space, so steps in proportion to nodes^2 / order
        steps = 8 * factor ** (2 // order)
        solution = hjb.solve_finite_horizon(
            problem, axes, trapezoid(-6.0, 6.0, 41), steps=steps, order=order
        )
        exact = cole_hopf(sigma, N, temperature, horizon, axes[0].points())
        errors.append(float((solution.value.table[0] - exact).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    # two in the spacing; two-sided, as the next term is two orders smaller
    assert all(1.8 < one < 2.2 for one in orders), (errors, orders)
    assert errors[-1] < 3e-3  # of a value that varies by 1


@pytest.mark.parametrize("order", [1, 2])
def test_finite_horizon_lq_converges_in_time_to_the_riccati_equation(order):
    A, B, M, N, H, s, gam, rho, T = -0.4, 0.9, 0.8, 1.2, 0.5, 0.6, 0.15, 0.2, 0.9
    problem = ControlProblem(
        ControlledSDE(lambda t, x, a: A * x + B * a, lambda t, x: s * (1 + 0.5 * t)),
        T,
        lambda t, x, a: -0.5 * (M * x * x + N * a * a).sum(-1),
        lambda x: -0.5 * H * x[:, 0].square(),
        discount=rho,
        temperature=gam,
    )

    def rates(left, y):  # of P and c in V = -P x^2 / 2 + c, in time to go
        P, c = y
        noise = (s * (1 + 0.5 * (T - left))) ** 2
        entropy = gam / 2 * math.log(2 * math.pi * gam / N)
        return [2 * A * P - (B * P) ** 2 / N + M - rho * P, -noise * P / 2 + entropy - rho * c]

    P, c = scipy.integrate.solve_ivp(rates, (0, T), [H, 0], rtol=1e-12, atol=1e-12).y[:, -1]
    errors = []
    for steps in (10, 20, 40):
        solution = hjb.solve_finite_horizon(
            problem,
            WIDE,
            gauss_legendre(-8.0, 8.0, 61),
            steps=steps,
            order=order,
            differences="central",
        )
        x, v = inside(solution.value.table[0], WIDE, 1.0)
        errors.append(float((v - (c - P * x**2 / 2)).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    # space is exact; the next term of the error is one order smaller: 10 % at these steps
    assert all(abs(one - order) < 0.2 for one in orders), (errors, orders)
    t = torch.tensor(T / 2, dtype=torch.float64)
    P = scipy.integrate.solve_ivp(rates, (0, T / 2), [H, 0], rtol=1e-12, atol=1e-12).y[0, -1]
    mean = solution.mean_action(t, x)
    torch.testing.assert_close(mean, -B * P / N * x, rtol=0, atol=0.02)


# --- properties of the discrete equation --------------------------------------------------------

NUMBERS = st.floats(-2, 2)


def random_problem(seed: int, temperature: float) -> tuple[ControlProblem, ActionGrid]:
    draw = torch.Generator().manual_seed(seed)
    c = torch.rand(8, generator=draw, dtype=torch.float64)

    def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return (x[:, 0] * (1 + c[0])).sin() * a[:, 0] - c[1] * a[:, 0].square()

    sde = ControlledSDE(
        lambda t, x, a: (c[2] - 0.5) * x + 2 * a * (x + c[3]).cos(),
        lambda t, x, a: c[4] * (1 + 0.5 * (c[5] * x).sin() * a),
        controls_diffusion=True,
    )
    problem = ControlProblem(
        sde, math.inf, reward, discount=0.1 + float(c[6]), temperature=temperature
    )
    return problem, gauss_legendre(-1.0, 1.0, 7)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4]), st.booleans())
def test_the_solution_is_the_fixed_point_of_value_iteration(seed, temperature, periodic):
    problem, actions = random_problem(seed, temperature)
    axis = Axis(-1.5, 1.5, 9, "periodic" if periodic else "reflecting")
    solution = hjb.solve_discounted(problem, (axis,), actions)
    x, h, n = axis.points().numpy(), axis.spacing, axis.nodes
    sde, discount = problem.sde, problem.discount
    v = solution.value.table[0].numpy()
    best = np.empty(n)
    for i in range(n):  # written out from the book: one state, one action at a time
        H = []
        for a in actions.nodes:
            state = torch.tensor([[x[i]]])
            b = float(sde.drift_at(NOW, state, a[None]))
            noise = float(sde.diffusion_at(NOW, state, a[None])) ** 2
            r = float(problem.running_reward(NOW, state, a[None]))
            effective = max(noise, abs(b) * h)
            up, down = (effective + b * h) / (2 * h**2), (effective - b * h) / (2 * h**2)
            if periodic:
                pull = up * (v[(i + 1) % n] - v[i]) + down * (v[i - 1] - v[i])
            elif i == 0:
                pull = max(noise / h**2, b / h) * (v[1] - v[0])
            elif i == n - 1:
                pull = max(noise / h**2, -b / h) * (v[-2] - v[-1])
            else:
                pull = up * (v[i + 1] - v[i]) + down * (v[i - 1] - v[i])
            H.append(r + pull)
        H = np.array(H)
        if temperature:
            w = actions.weights.numpy()
            best[i] = temperature * np.log((w * np.exp(H / temperature)).sum())
        else:
            best[i] = H.max()
    # round-off of sums of size rate * v, below 1e3
    np.testing.assert_allclose(best - discount * v, 0, atol=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4]))
def test_a_better_reward_gives_a_better_value_everywhere(seed, temperature):
    problem, _ = random_problem(seed, temperature)
    actions = gauss_legendre(-1.0, 1.0, 21)  # steep values make narrow policies
    more = ControlProblem(
        problem.sde,
        math.inf,
        lambda t, x, a: problem.running_reward(t, x, a) + (-(x[:, 0] ** 2)).exp(),
        discount=problem.discount,
        temperature=temperature,
    )
    axes = (Axis(-1.5, 1.5, 15),)
    v, w = (hjb.solve_discounted(one, axes, actions).value.table for one in (problem, more))
    # at least e^{-1.5^2} and at most 1 for ever, up to the solver's tolerance
    low, high = math.exp(-2.25) / problem.discount, 1 / problem.discount
    assert float((w - v).min()) > low - 1e-7
    assert float((w - v).max()) < high + 1e-7


# --- what is returned, and what is refused ------------------------------------------------------


def test_the_optimal_policy_can_be_simulated(generator):
    problem = bounded_problem(1.1, 0.7, 0.2, 0.5)
    solution = hjb.solve_finite_horizon(problem, CIRCLE, trapezoid(-6.0, 6.0, 31), steps=5)
    policy = solution.policy()
    assert isinstance(policy, GaussianPolicy)
    for dtype in (torch.float64, torch.float32):
        start = torch.full((3, 1), 4.0, dtype=dtype)
        paths = simulate(problem, policy, start, uniform_grid(0.5, 10), generator=generator)
        assert paths.states.dtype == dtype
        assert solution.value(torch.tensor(0.5), start).dtype == dtype
    cold = hjb.solve_finite_horizon(
        bounded_problem(1.1, 0.7, 0.0, 0.5), CIRCLE, trapezoid(-6.0, 6.0, 31), steps=5
    )
    assert isinstance(cold.policy(), DeterministicPolicy)


@pytest.mark.parametrize(("variation", "constant"), [(0.4, False), (0.1, False), (0.03, True)])
def test_a_std_that_varies_by_more_than_five_percent_is_one_of_the_state(variation, constant):
    """std^2 = temperature / (2 cost) where q is -cost(x) a^2 + linear."""
    cost = lambda x: 1 + 2 * variation * x[:, 0].cos()
    problem = ControlProblem(
        ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0),
        math.inf,
        lambda t, x, a: -cost(x) * a[:, 0].square(),
        discount=1.0,
        temperature=0.5,
    )
    solution = hjb.solve_discounted(problem, CIRCLE, trapezoid(-4.0, 4.0, 81))
    policy, t = solution.policy(), torch.tensor(0.0)
    x = hjb.grid_points(CIRCLE)
    assert isinstance(policy, GaussianPolicy)
    assert policy.sees_states is not constant
    mean = policy.mean(t, x)
    exact = (problem.temperature / (2 * cost(x))).sqrt()[:, None]
    if constant:
        assert float(policy.std_at(t, mean)) == pytest.approx(float(exact.mean()), rel=0.01)
    else:
        torch.testing.assert_close(policy.std_at(t, mean, x), exact, rtol=0.01, atol=0)


def periodic(period, place, phase=0.4):
    """An endless problem with one coefficient of this period in time."""
    wave = lambda t: 0.3 * torch.cos(2 * math.pi * t / period + phase)
    of = lambda name, t: 1 + wave(t) * (name == place)
    return ControlProblem(
        ControlledSDE(
            lambda t, x, a: of("drift", t) * (a - x),
            lambda t, x: of("diffusion", t) * torch.ones_like(x),
        ),
        math.inf,
        lambda t, x, a: -of("running_reward", t) * a.square().sum(1),
        discount=0.5,
    )


@pytest.mark.parametrize("period", [1.0, 0.5, 0.1, math.pi, 10.0])
@pytest.mark.parametrize("place", ["drift", "diffusion", "running_reward", "policy"])
def test_coefficients_that_change_in_time_are_refused_whatever_their_period(place, period):
    problem, axes = periodic(period, place), (Axis(-3.0, 3.0, 11),)
    wave = (lambda t: torch.cos(2 * math.pi * t / period)) if place == "policy" else (lambda t: 1)
    policy = DeterministicPolicy(lambda t, x: -0.3 * wave(t) * x)
    with pytest.raises(ValueError, match=f"{place} must be the same at all times"):
        hjb.evaluate_discounted(problem, policy, axes)
    if place != "policy":
        with pytest.raises(ValueError, match=f"{place} must be the same at all times"):
            hjb.solve_discounted(problem, axes, trapezoid(-2.0, 2.0, 5))


def test_end_mass_says_that_the_action_grid_cuts_the_policy_off():
    narrow = hjb.solve_discounted(Scalar(0.0).problem(), WIDE, trapezoid(-0.5, 0.5, 21))
    assert narrow.end_mass.table.max() > 0.04  # about 1/21 of a nearly flat density, and more


STILL = ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 1.0)
ENDLESS = ControlProblem(STILL, math.inf, lambda t, x, a: x[:, 0].cos(), discount=1.0)
ENDING = ControlProblem(STILL, 1.0)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (ENDING, "horizon must be infinite"),
        (ControlProblem(STILL, math.inf), "discount must be positive"),
        (ControlProblem(STILL, math.inf, lambda t, x, a: t * x[:, 0], discount=1.0), "same at all"),
        (ControlProblem(STILL, math.inf, lambda t, x, a: x, discount=1.0), "must return"),
        (ControlProblem(STILL, math.inf, lambda t, x, a: x[:, 0].log(), discount=1.0), "finite"),
        (
            ControlProblem(ControlledSDE(lambda t, x, a: x / 0, lambda t, x: 1.0), math.inf),
            "discount",
        ),
        (
            ControlProblem(
                ControlledSDE(lambda t, x, a: 1 / (0 * x), lambda t, x: 1.0), math.inf, discount=1.0
            ),
            "drift must be finite",
        ),
        (
            ControlProblem(
                ControlledSDE(lambda t, x, a: x, lambda t, x: math.nan), math.inf, discount=1.0
            ),
            "diffusion must be finite",
        ),
        (
            ControlProblem(
                ControlledSDE(lambda t, x, a: x, lambda t, x: 1.0, calculus="stratonovich"),
                math.inf,
                discount=1.0,
            ),
            "ito",
        ),
    ],
)
def test_a_problem_of_another_kind_is_refused(problem, words):
    with pytest.raises(ValueError, match=words):
        hjb.solve_discounted(problem, CIRCLE, IDLE)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="axes must be one or two"):
        hjb.solve_discounted(ENDLESS, (), IDLE)
    with pytest.raises(ValueError, match="axes must be one or two"):
        hjb.solve_discounted(ENDLESS, 3 * CIRCLE, IDLE)
    with pytest.raises((ValueError, TypeError), match=r"differences|type"):
        hjb.solve_discounted(ENDLESS, CIRCLE, IDLE, differences="upwind")
    for tolerance in (0.0, math.nan, -1.0, math.inf):
        with pytest.raises(ValueError, match="tolerance"):
            hjb.solve_discounted(ENDLESS, CIRCLE, IDLE, tolerance=tolerance)
    with pytest.raises(ValueError, match="iterations"):
        hjb.solve_discounted(ENDLESS, CIRCLE, IDLE, iterations=0)
    with pytest.raises(ValueError, match="steps"):
        hjb.solve_finite_horizon(ENDING, CIRCLE, IDLE, steps=0)
    with pytest.raises((ValueError, TypeError), match=r"order|type"):
        hjb.solve_finite_horizon(ENDING, CIRCLE, IDLE, steps=3, order=3)
    with pytest.raises(ValueError, match="horizon must be finite"):
        hjb.solve_finite_horizon(ENDLESS, CIRCLE, IDLE, steps=3)
    with pytest.raises(ValueError, match="horizon must be infinite"):
        hjb.evaluate_discounted(ENDING, DeterministicPolicy(lambda t, x: x), CIRCLE)
    with pytest.raises(ValueError, match=r"policy.mean must return"):
        hjb.evaluate_discounted(ENDLESS, DeterministicPolicy(lambda t, x: x[:1]), CIRCLE)
    nan_end = ControlProblem(STILL, 1.0, terminal_reward=lambda x: x[:, 0].log())
    with pytest.raises(ValueError, match="terminal_reward"):
        hjb.solve_finite_horizon(nan_end, CIRCLE, IDLE, steps=3)


def test_an_action_grid_that_does_not_resolve_the_policy_is_refused():
    with pytest.raises(ValueError, match="take more nodes"):
        hjb.solve_discounted(Scalar(0.0).problem(0.01), WIDE, trapezoid(-8.0, 8.0, 21))


def test_too_few_iterations_raise_with_the_residual():
    with pytest.raises(RuntimeError, match="violated by"):
        hjb.solve_discounted(Scalar(0.0).problem(), WIDE, trapezoid(-8.0, 8.0, 41), iterations=2)


def test_a_loose_tolerance_shows_in_the_residual():
    problem, actions = Scalar(0.0).problem(), trapezoid(-8.0, 8.0, 41)
    loose = hjb.solve_discounted(problem, WIDE, actions, tolerance=1.0)
    tight = hjb.solve_discounted(problem, WIDE, actions)
    assert loose.iterations < tight.iterations
    assert loose.residual > 1e-6 > tight.residual


def test_one_step_and_scalar_actions_are_enough():
    actions = ActionGrid(trapezoid(-1.0, 1.0, 5).nodes[:, 0], trapezoid(-1.0, 1.0, 5).weights)
    problem = ControlProblem(
        ControlledSDE(lambda t, x, a: a.unsqueeze(-1) + 0 * x, lambda t, x: 1.0),
        1.0,
        terminal_reward=lambda x: x[:, 0].cos(),
    )
    solution = hjb.solve_finite_horizon(problem, CIRCLE, actions, steps=1)
    assert solution.value.table.shape == (2, 24)
    assert solution.mean_action.table.shape == (2, 24)
    policy = hjb.solve_finite_horizon(problem, CIRCLE, actions, steps=1).policy()
    assert policy.mean(NOW, torch.zeros(4, 1)).shape == (4,)
