"""Ready problems: their answers solve the Hamilton-Jacobi-Bellman equation and match the papers."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ctrl
from ctrl import linear, problems
from ctrl.q_learning import q_rate


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


X = tensor([[-1.3], [0.2], [0.9], [2.1]])
SHIFTS = tensor([[0.4], [-0.9], [1.7], [0.0]])


def residual(solved, t: Tensor) -> Tensor:
    """q - average - temperature log pi, which vanishes for every action."""
    policy, problem = solved.optimal_policy, solved.problem
    a = policy.mean(t, X) + SHIFTS
    q = q_rate(problem, solved.value, t, X, a)
    average = getattr(solved, "average_reward", None) or 0.0
    return q - average - problem.temperature * policy.log_prob(t, X, a)


NONE = torch.zeros(4, dtype=torch.float64)
ROUND_OFF = {"rtol": 0.0, "atol": 1e-11}  # of values of a hundred, differentiated twice


def test_benchmark_has_the_published_answer():
    solved = problems.exploratory_lq_benchmark()
    policy, t = solved.optimal_policy, tensor(0.0)
    mean = policy.mean(t, tensor([[0.0], [1.0]]))[:, 0]
    # six digits are published; here from x^2 - 4 x + 1 ... : gain = (sqrt(7) - 3), S = 1 / -gain
    gain = math.sqrt(7) - 3
    assert gain == pytest.approx(-0.354249, abs=5e-7)
    torch.testing.assert_close(mean, tensor([2 * gain, 3 * gain]), rtol=1e-12, atol=0)
    entropy = float(policy.entropy(t, X)[0])
    variance = math.exp(2 * entropy) / (2 * math.pi * math.e)
    assert variance == pytest.approx(0.035425, abs=5e-7)
    plain = solved.average_reward - 0.1 * entropy
    assert plain == pytest.approx(0.658497, abs=5e-7)
    best = problems.exploratory_lq_benchmark(temperature=0.0)
    assert best.average_reward == pytest.approx(0.708497, abs=5e-7)
    assert best.average_reward - plain == pytest.approx(0.1 / 2, rel=1e-11)


def test_benchmark_solves_its_equation():
    solved = problems.exploratory_lq_benchmark(0.3)
    torch.testing.assert_close(residual(solved, tensor(0.0)), NONE, **ROUND_OFF)


def test_benchmark_reward_is_the_papers():
    problem = problems.exploratory_lq_benchmark().problem
    x, a = tensor([[0.3]]), tensor([[-0.7]])
    expected = -(0.09 - 0.21 + 0.49 + 0.3 - 1.4)  # -(x^2 + x a + a^2 + x + 2 a)
    assert float(problem.running_reward(tensor(0.0), x, a)) == pytest.approx(expected, rel=1e-14)
    assert math.isinf(problem.horizon)
    assert problem.discount == 0


@given(
    st.floats(-0.5, 2),
    st.floats(-1, 1),
    st.floats(0.1, 1),
    st.floats(-1, 1),
    st.floats(0.1, 3),
    st.floats(0.2, 3),
    st.floats(0.1, 2),
)
def test_tracking_solves_its_equation(pull, level, noise, target, state_cost, action_cost, rate):
    solved = problems.ornstein_uhlenbeck_tracking(
        pull=pull,
        level=level,
        noise=noise,
        target=target,
        state_cost=state_cost,
        action_cost=action_cost,
        discount=rate,
        temperature=0.2,
    )
    scale = 1 + float(solved.value(tensor(0.0), X).abs().max())
    equation_residual = residual(solved, tensor(0.0))
    torch.testing.assert_close(equation_residual, NONE, rtol=0, atol=1e-12 * scale)


def test_tracking_value_is_the_expected_reward():
    solved = problems.ornstein_uhlenbeck_tracking()
    t, zero_one = tensor(0.0), tensor([[0.0], [1.0]])
    k, slope = solved.optimal_policy.mean(t, zero_one)[:, 0].tolist()
    slope -= k
    entropy = float(solved.optimal_policy.entropy(t, X)[0])
    variance = math.exp(2 * entropy) / (2 * math.pi * math.e)

    def rate(s, y):  # mean and variance of X, and the value so far
        m, P, _ = y
        drift, pull = 1.2 * (0.5 - m) + slope * m + k, -1.2 + slope
        second_a = slope**2 * P + (slope * m + k) ** 2 + variance
        reward = -0.75 * (P + (m + 0.4) ** 2) - 0.4 * second_a + 0.1 * entropy
        return [drift, 2 * pull * P + 0.49, math.exp(-0.3 * s) * reward]

    y = scipy.integrate.solve_ivp(
        rate, (0, 110), [0.9, 0.0, 0.0], method="DOP853", rtol=1e-13, atol=1e-14
    ).y[-1, -1]
    value = float(solved.value(t, tensor([[0.9]])))
    assert value == pytest.approx(y, rel=1e-10)  # the rest is e^{-33}


def test_tracking_without_temperature_is_deterministic():
    solved = problems.ornstein_uhlenbeck_tracking(temperature=0.0)
    assert isinstance(solved.optimal_policy, ctrl.DeterministicPolicy)
    warm = problems.ornstein_uhlenbeck_tracking()
    t = tensor(0.0)
    assert torch.equal(solved.optimal_policy.mean(t, X), warm.optimal_policy.mean(t, X))


PORTFOLIO = {"sharpe_ratio": 0.7, "volatility": 0.3, "horizon": 1.3, "wealth": 0.9, "target": 1.5}


@given(st.floats(0.1, 1.5), st.floats(0.1, 1), st.floats(0, 1), st.floats(0.01, 2))
def test_portfolio_solves_its_equation(sharpe_ratio, volatility, share, temperature):
    solved = problems.mean_variance_portfolio(
        **PORTFOLIO | {"sharpe_ratio": sharpe_ratio, "volatility": volatility},
        temperature=temperature,
    )
    t = tensor(1.3 * share)
    scale = 1 + float(solved.value(t, X).abs().max())
    torch.testing.assert_close(residual(solved, t), NONE, rtol=0, atol=1e-11 * scale)
    end = solved.problem.terminal_reward(X)
    torch.testing.assert_close(solved.value(tensor(1.3), X), end, rtol=1e-13, atol=1e-12)


def test_portfolio_is_the_linear_quadratic_problem_without_cost_of_the_action():
    solved = problems.mean_variance_portfolio(**PORTFOLIO, temperature=0.2)
    m = lambda number: tensor([[number]])
    w = solved.multiplier
    lq = linear.LinearQuadratic(
        m(0.0), m(0.21), m(0.0), m(0.0), m(0.0), H=m(2.0), h=tensor([-2 * w]),
        D=m(0.3).unsqueeze(0), temperature=0.2,
    )  # fmt: skip
    other = linear.solve_lq(lq, tensor([0.0, 1.3]))
    t = tensor(0.4)
    constant = (w - 1.5) ** 2 - w**2
    torch.testing.assert_close(
        solved.value(t, X), other.value(t, X) + constant, rtol=1e-12, atol=1e-11
    )
    one, two = solved.optimal_policy, other.policy()
    torch.testing.assert_close(one.mean(t, X), two.mean(t, X), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one.entropy(t, X), two.entropy(t, X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_portfolio_reaches_its_target_with_the_variance_it_says(temperature):
    solved = problems.mean_variance_portfolio(**PORTFOLIO, temperature=temperature)
    policy = solved.optimal_policy

    def rate(t, y):  # mean and second moment of wealth; a ~ N(k + K x, v)
        m, second = y
        k, both = policy.mean(tensor(t), tensor([[0.0], [1.0]]))[:, 0].tolist()
        K = both - k
        v = float(policy.std_at(tensor(t))) ** 2 if temperature else 0.0
        a, a_x = k + K * m, k * m + K * second
        a_second = k**2 + 2 * k * K * m + K**2 * second + v
        return [0.21 * a, 2 * 0.21 * a_x + 0.09 * a_second]

    y = scipy.integrate.solve_ivp(
        rate, (0, 1.3), [0.9, 0.81], method="DOP853", rtol=1e-12, atol=1e-13
    ).y[:, -1]
    assert y[0] == pytest.approx(1.5, rel=1e-10)
    assert y[0] == pytest.approx(solved.terminal_mean, rel=1e-10)
    assert y[1] - y[0] ** 2 == pytest.approx(solved.terminal_variance, rel=1e-9)
    # the frontier of Markowitz, and temperature * horizon / 2 for exploring
    frontier = 0.36 / np.expm1(0.49 * 1.3)
    assert solved.terminal_variance == pytest.approx(frontier + temperature * 0.65, rel=1e-14)


@pytest.mark.parametrize(
    "bad",
    [
        {"sharpe_ratio": 0.0},
        {"sharpe_ratio": math.nan},
        {"volatility": 0.0},
        {"volatility": -0.2},
        {"horizon": 0.0},
        {"horizon": math.inf},
        {"wealth": math.inf},
        {"target": math.nan},
        {"temperature": -0.1},
    ],
    ids=str,
)
def test_bad_portfolios_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        problems.mean_variance_portfolio(**{**PORTFOLIO, "temperature": 0.1, **bad})


@pytest.mark.parametrize(
    "bad",
    [
        {"pull": math.nan},
        {"noise": math.inf},
        {"action_cost": 0.0},
        {"discount": 0.0},
        {"discount": -1.0},
        {"temperature": -0.1},
    ],
    ids=str,
)
def test_bad_tracking_problems_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        problems.ornstein_uhlenbeck_tracking(**bad)
    with pytest.raises(ValueError, match="temperature"):
        problems.exploratory_lq_benchmark(temperature=-0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_can_be_drawn_under_every_optimal_policy(dtype):
    for solved in (
        problems.exploratory_lq_benchmark(),
        problems.ornstein_uhlenbeck_tracking(),
        problems.mean_variance_portfolio(),
    ):
        generator = torch.Generator().manual_seed(0)
        start = torch.ones(3, 1, dtype=dtype)
        grid = ctrl.uniform_grid(1.0, 4)
        paths = ctrl.simulate(
            solved.problem, solved.optimal_policy, start, grid, generator=generator
        )
        assert paths.states.shape == (3, 5, 1)
        assert paths.states.dtype == dtype
