"""Ready problems: their answers by moments and by the equation that only the optimum solves."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ctrl
from ctrl import problems
from ctrl.q_learning import q_rate

X = torch.tensor([[-1.3], [0.2], [0.9], [2.4]], dtype=torch.float64)
ACTIONS = torch.tensor([[-2.0], [-0.4], [0.3], [1.1]], dtype=torch.float64)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def residual(solved, temperature: float, t: float, average: float = 0.0) -> float:
    """Of q = temperature log pi, relative; zero at any action for the optimal pair alone."""
    at = tensor(t)
    q = q_rate(solved.problem, solved.value, at, X, ACTIONS) - average
    expected = temperature * solved.optimal_policy.log_prob(at, X, ACTIONS)
    scale = 1 + solved.value(at, X).abs().max() + q.abs().max()
    return float((q - expected).abs().max() / scale)


def line(policy, t: float = 0.0) -> tuple[float, float]:
    """Gain and offset of a policy with an affine mean."""
    offset, end = policy.mean(tensor(t), tensor([[0.0], [1.0]])).flatten().tolist()
    return end - offset, offset


def variance(policy, t: float = 0.0) -> float:
    spread = policy.distribution(tensor(t), X[:1]).variance
    return float(spread)


# ---- ergodic benchmark


def ergodic_reward(gain: float, offset: float, spread: float) -> float:
    """Average of -(x^2 + x a + a^2 + x + 2 a), without entropy, from stationary moments.

    dX = -X dt + a dW: the mean of X is 0 and 2 E X^2 = E a^2.
    """
    second = (offset**2 + spread) / (2 - gain**2)
    return -(second + gain * second + 2 * second + 2 * offset)


def test_benchmark_has_its_published_policy():
    policy = problems.exploratory_lq_benchmark().optimal_policy
    # printed to six decimals
    assert line(policy) == pytest.approx((-0.354249, -0.708497), abs=5e-7)
    assert variance(policy) == pytest.approx(0.035425, abs=5e-7)


@given(st.floats(0.01, 3))
def test_benchmark_is_solved_at_every_temperature(temperature):
    solved = problems.exploratory_lq_benchmark(temperature)
    # 2 S^2 - 2 S - 3 = 0 has the negative root S; W = 2 - S
    W = (3 + math.sqrt(7)) / 2
    assert line(solved.optimal_policy) == pytest.approx((-1 / W, -2 / W), rel=1e-13)
    spread = variance(solved.optimal_policy)
    assert spread == pytest.approx(temperature / W, rel=1e-13)
    plain = ergodic_reward(-1 / W, -2 / W, spread)
    assert plain == pytest.approx(2 / W - temperature / 2, rel=1e-12, abs=1e-12)
    entropy = 0.5 * math.log(2 * math.pi * math.e * spread)
    best = plain + temperature * entropy
    assert solved.average_reward == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert residual(solved, temperature, 0.0, solved.average_reward) < 1e-13


def test_benchmark_pays_its_published_rewards():
    warm, cold = problems.exploratory_lq_benchmark(), problems.exploratory_lq_benchmark(0.0)
    assert isinstance(cold.optimal_policy, ctrl.DeterministicPolicy)
    assert cold.average_reward == pytest.approx(0.708497, abs=5e-7)
    gain, offset = line(warm.optimal_policy)
    plain = ergodic_reward(gain, offset, variance(warm.optimal_policy))
    assert plain == pytest.approx(0.658497, abs=5e-7)


def test_no_other_affine_policy_of_the_benchmark_earns_more():
    best = problems.exploratory_lq_benchmark(0.0)
    gain, offset = line(best.optimal_policy)
    for dg in (-0.1, 0.0, 0.1):
        for do in (-0.1, 0.0, 0.1):
            if dg or do:
                assert ergodic_reward(gain + dg, offset + do, 0.0) < best.average_reward - 1e-3


# ---- tracking

TRACKING = {
    "pull": st.floats(-0.8, 2),
    "level": st.floats(-1, 1),
    "noise": st.floats(0, 1.5),
    "target": st.floats(-1, 1),
    "state_cost": st.floats(0.2, 3),
    "action_cost": st.floats(0.2, 3),
    "discount": st.floats(0.1, 1.5),
    "temperature": st.floats(0.05, 1),
}


@given(st.fixed_dictionaries(TRACKING))
def test_tracking_is_solved(numbers):
    solved = problems.ornstein_uhlenbeck_tracking(**numbers)
    assert residual(solved, numbers["temperature"], 0.0) < 1e-12
    # rho S = S^2 / N - 2 pull S - M, negative root; K = S / N
    N, b = numbers["action_cost"], numbers["discount"] + 2 * numbers["pull"]
    S = 0.5 * (N * b - math.sqrt((N * b) ** 2 + 4 * N * numbers["state_cost"]))
    gain, offset = line(solved.optimal_policy)
    assert gain == pytest.approx(S / N, rel=1e-11)
    assert variance(solved.optimal_policy) == pytest.approx(numbers["temperature"] / N, rel=1e-13)
    # at the target, towards which the state is pulled already if it is the level
    there = gain * numbers["target"] + offset
    away = numbers["level"] - numbers["target"]
    slope = S * numbers["pull"] * away / (numbers["discount"] + numbers["pull"] - gain)
    assert there == pytest.approx(slope / N, rel=1e-9, abs=1e-11)


def test_value_of_tracking_is_the_expected_reward():
    solved = problems.ornstein_uhlenbeck_tracking()
    gain, offset = line(solved.optimal_policy)
    spread = variance(solved.optimal_policy)
    entropy = 0.5 * math.log(2 * math.pi * math.e * spread)

    def rate(t, y):
        m, P = y[:2]
        a = gain * m + offset
        gap, action = P + (m + 0.4) ** 2, gain**2 * P + a**2 + spread
        reward = -0.5 * (1.5 * gap + 0.8 * action) + 0.1 * entropy
        drift = 1.2 * (0.5 - m) + a
        return [drift, 2 * (gain - 1.2) * P + 0.7**2, math.exp(-0.3 * t) * reward]

    for x in X[:, 0].tolist():
        # e^{-.3 120} = 2e-16
        found = scipy.integrate.solve_ivp(
            rate, (0, 120), [x, 0.0, 0.0], method="DOP853", rtol=1e-12, atol=1e-13
        )
        value = float(solved.value(tensor(0.0), tensor([[x]])))
        assert value == pytest.approx(found.y[2, -1], rel=1e-10)


def test_tracking_without_temperature_does_not_draw():
    warm, cold = (problems.ornstein_uhlenbeck_tracking(temperature=each) for each in (0.1, 0.0))
    assert isinstance(cold.optimal_policy, ctrl.DeterministicPolicy)
    assert line(cold.optimal_policy) == line(warm.optimal_policy)
    assert warm.average_reward is None


@pytest.mark.parametrize(
    "bad",
    [
        {"discount": 0.0},
        {"discount": -0.1},
        {"action_cost": 0.0},
        {"action_cost": -1.0},
        {"temperature": -0.1},
        {"state_cost": -50.0},
        *({name: math.nan} for name in TRACKING),
        {"noise": math.inf},
    ],
    ids=str,
)
def test_bad_tracking_is_refused(bad):
    with pytest.raises(ValueError, match=r"must|stabilisable"):
        problems.ornstein_uhlenbeck_tracking(**bad)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_bad_temperatures_of_the_benchmark_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        problems.exploratory_lq_benchmark(temperature)


# ---- portfolio

PORTFOLIO = {
    "sharpe_ratio": st.floats(0.2, 1.2) | st.floats(-1.2, -0.2),
    "volatility": st.floats(0.1, 1),
    "horizon": st.floats(0.3, 2),
    "wealth": st.floats(-1, 2),
    "target": st.floats(-1, 3),
    "temperature": st.floats(0.02, 1),
}


def portfolio_moments(solved, sharpe_ratio: float, volatility: float, wealth: float):
    """Mean and variance of terminal wealth and the entropy, by the policy alone."""

    def rate(t, y):
        m, P = y[:2]
        gain, offset = line(solved.optimal_policy, t)
        spread = variance(solved.optimal_policy, t)
        a = gain * m + offset
        drift, closed = volatility * sharpe_ratio * a, volatility * sharpe_ratio * gain
        second = gain**2 * P + a**2 + spread
        entropy = 0.5 * math.log(2 * math.pi * math.e * spread)
        return [drift, 2 * closed * P + volatility**2 * second, entropy]

    horizon = solved.problem.horizon
    return scipy.integrate.solve_ivp(
        rate, (0, horizon), [wealth, 0.0, 0.0], method="DOP853", rtol=1e-11, atol=1e-12
    ).y[:, -1]


@given(st.fixed_dictionaries(PORTFOLIO), st.floats(0, 1))
def test_portfolio_is_solved(numbers, fraction):
    solved = problems.mean_variance_portfolio(**numbers)
    rho, s, T = numbers["sharpe_ratio"], numbers["volatility"], numbers["horizon"]
    t, temperature = fraction * T, numbers["temperature"]
    assert residual(solved, temperature, t) < 1e-11
    # Wang & Zhou, Theorem 3.1
    gain, offset = line(solved.optimal_policy, t)
    w = solved.multiplier
    assert (gain, offset) == pytest.approx((-rho / s, rho / s * w), rel=1e-10, abs=1e-10)
    spread = temperature / (2 * s**2) * math.exp(rho**2 * (T - t))
    assert variance(solved.optimal_policy, t) == pytest.approx(spread, rel=1e-12)
    end = tensor(T)
    torch.testing.assert_close(solved.value(end, X), solved.problem.terminal_reward(X))


@pytest.mark.parametrize(
    "numbers",
    [{}, {"sharpe_ratio": -0.8, "target": 0.7}, {"horizon": 3.0, "temperature": 1.5}],
    ids=str,
)
def test_terminal_wealth_has_the_mean_and_variance_that_are_said(numbers):
    full = {"sharpe_ratio": 0.6, "volatility": 0.25, "wealth": 1.0, "temperature": 0.1} | numbers
    solved = problems.mean_variance_portfolio(**numbers)
    mean, spread, entropy = portfolio_moments(
        solved, full["sharpe_ratio"], full["volatility"], full["wealth"]
    )
    assert mean == pytest.approx(full.get("target", 1.4), rel=1e-9)
    assert solved.terminal_mean == full.get("target", 1.4)
    assert spread == pytest.approx(solved.terminal_variance, rel=1e-9)
    # the value at the start: E[-(X - w)^2] + (w - z)^2 is minus the variance at the right w
    value = float(solved.value(tensor(0.0), tensor([[full["wealth"]]])))
    assert value == pytest.approx(full["temperature"] * entropy - spread, rel=1e-9)


def test_no_cold_portfolio_of_that_mean_has_less_variance():
    numbers = {"sharpe_ratio": 0.6, "horizon": 1.0, "wealth": 1.0, "target": 1.4}
    solved = problems.mean_variance_portfolio(**numbers, temperature=0.0)
    assert isinstance(solved.optimal_policy, ctrl.DeterministicPolicy)
    # martingale duality: X_T = E[X_T] + ..., the least variance is (z - x)^2 / Var of the density
    density_variance = math.exp(0.36) - 1
    assert solved.terminal_variance == pytest.approx(0.16 / density_variance, rel=1e-13)
    # money held constant, b, reaches the mean with the variance (z - x)^2 / (rho^2 T) > it
    assert solved.terminal_variance < 0.16 / 0.36


def test_portfolio_paths_follow_the_euler_chain(generator):
    solved = problems.mean_variance_portfolio()
    grid = ctrl.uniform_grid(1.0, 8)
    start = torch.ones(20000, 1, dtype=torch.float64)
    paths = ctrl.simulate(solved.problem, solved.optimal_policy, start, grid, generator=generator)
    end = paths.states[:, -1, 0]
    # E[X_{k+1} - w] = (1 - rho^2 h) E[X_k - w] on the grid, exactly
    w = solved.multiplier
    expected = w + (1 - w) * (1 - 0.36 / 8) ** 8
    error = float(end.std()) / math.sqrt(len(end))
    assert abs(float(end.mean()) - expected) < 4 * error
    returns = ctrl.returns_to_go(solved.problem, paths, solved.optimal_policy)[:, 0]
    assert np.isfinite(returns.numpy()).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"sharpe_ratio": 0.0},
        {"volatility": 0.0},
        {"volatility": -0.2},
        {"horizon": 0.0},
        {"horizon": math.inf},
        {"temperature": -0.1},
        *({name: math.nan} for name in PORTFOLIO),
    ],
    ids=str,
)
def test_bad_portfolios_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        problems.mean_variance_portfolio(**bad)
