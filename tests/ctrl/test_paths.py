"""Grids, integrals, returns, estimates, problems and policies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

import ctrl
from ctrl.policy_gradient import clipped_surrogate, continuous_gae


@pytest.mark.parametrize(
    ("nodes", "error"),
    [
        ([0.0], ValueError),
        ([0.0, 0.0], ValueError),
        ([0.0, 0.5, 0.4], ValueError),
        ([0.0, math.nan], ValueError),
        ([0.0, math.inf], ValueError),
    ],
)
def test_bad_grids_are_refused(nodes, error):
    with pytest.raises(error, match="nodes"):
        ctrl.TimeGrid(torch.tensor(nodes))


def test_integer_grids_and_bad_steps_are_refused():
    with pytest.raises(TypeError, match="nodes"):
        ctrl.TimeGrid(torch.tensor([0, 1]))
    for steps in (0, -1, True):
        with pytest.raises(ValueError, match="steps"):
            ctrl.uniform_grid(1.0, steps)
    with pytest.raises(ValueError, match="horizon"):
        ctrl.uniform_grid(0.0, 3)


@given(
    rate=st.floats(0.1, 3.0),
    discount=st.floats(0.0, 1.5),
    gaps=st.lists(st.floats(0.05, 0.7), min_size=2, max_size=5),
)
def test_gae_is_the_exponentially_weighted_sum_of_differences(rate, discount, gaps):
    g = torch.Generator().manual_seed(1)
    h = torch.tensor(gaps, dtype=torch.float64)
    values = torch.randn(3, len(gaps) + 1, dtype=torch.float64, generator=g)
    rewards = torch.randn(3, len(gaps), dtype=torch.float64, generator=g)
    got = continuous_gae(values, rewards, h, rate, discount)
    times = torch.cat([h.new_zeros(1), h.cumsum(0)])
    for k in range(len(gaps)):
        expected = torch.zeros(3, dtype=torch.float64)
        for j in range(k, len(gaps)):
            delta = math.exp(-discount * gaps[j]) * values[:, j + 1] - values[:, j] + rewards[:, j]
            expected += torch.exp(-(discount + rate) * (times[j] - times[k])) * delta
        torch.testing.assert_close(got[:, k], expected, rtol=1e-10, atol=1e-10)


def test_gae_refuses_bad_rates_and_shapes():
    values, rewards, h = torch.zeros(2, 4), torch.zeros(2, 3), torch.ones(3)
    for rate in (-0.1, math.nan):
        with pytest.raises(ValueError, match="rate"):
            continuous_gae(values, rewards, h, rate)
    with pytest.raises(ValueError, match="values"):
        continuous_gae(values[:, :3], rewards, h, 1.0)


def test_clipped_surrogate_is_a_lower_bound_that_touches_at_equality():
    log_ratio = torch.linspace(-1, 1, 41, dtype=torch.float64)
    width = torch.full_like(log_ratio, 0.2)
    for sign in (1.0, -1.0):
        advantage = torch.full_like(log_ratio, sign)
        got = clipped_surrogate(log_ratio, advantage, width)
        assert bool((got <= log_ratio.exp() * advantage + 1e-12).all())
        assert got[20].item() == pytest.approx(sign)
        flat = got[-1] - got[-5] if sign > 0 else got[0] - got[4]
        assert abs(flat.item()) < 1e-12  # beyond the trusted range nothing is gained


def test_returns_to_go_discount_every_step():
    problem = ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0),
        1.0,
        running_reward=lambda t, x, a: x[:, 0] * (1 + t),
        terminal_reward=lambda x: 2 * x[:, 0],
        discount=0.7,
    )
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    states = torch.tensor([[[1.5], [-0.4], [0.9]]], dtype=torch.float64)
    paths = ctrl.Paths(states, torch.zeros(1, 2, 1).double(), None, grid)
    last = 2 * 0.9
    middle = -0.4 * 1.3 * 0.7 + math.exp(-0.7 * 0.7) * last
    first = 1.5 * 0.3 + math.exp(-0.7 * 0.3) * middle
    expected = torch.tensor([[first, middle, last]], dtype=torch.float64)
    torch.testing.assert_close(ctrl.returns_to_go(problem, paths), expected, rtol=1e-12, atol=0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_estimates_are_means_with_their_standard_error(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    estimate = ctrl.Estimate.of(tensor)
    assert estimate.mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-9)
    spread = float(tensor.std()) / math.sqrt(len(values))
    assert estimate.standard_error == pytest.approx(spread, rel=1e-9, abs=1e-9)


def test_estimates_print_value_and_error():
    assert str(ctrl.Estimate(0.36152, 0.0012, 100)) == "0.3615(12)"
    assert str(ctrl.Estimate(-12.34, 2.5, 10)) == "-12.3(25)"
    assert str(ctrl.Estimate(0.5, 0.0, 3)) == "0.5"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_estimates_refuse_nothing_and_nan(values):
    with pytest.raises(ValueError, match="values"):
        ctrl.Estimate.of(torch.tensor(values))


def test_gaussian_policy_density_and_entropy():
    policy = ctrl.GaussianPolicy(lambda t, x: 2 * x, std=0.3)
    x = torch.tensor([[0.1, -0.4]], dtype=torch.float64)
    a = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    law = Normal(2 * x, 0.3)
    t = torch.tensor(0.0)
    torch.testing.assert_close(policy.log_prob(t, x, a), law.log_prob(a).sum(1))
    torch.testing.assert_close(policy.entropy(t, x), law.entropy().sum(1))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ctrl.GaussianPolicy(lambda t, x: x, std=0.0), "std"),
        (lambda: ctrl.GaussianPolicy(lambda t, x: x, std=math.nan), "std"),
        (lambda: ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0, "white"), "noise"),
        (lambda: ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0, "general"), "noise_dim"),
        (lambda: ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0, noise_dim=2), "noise_dim"),
    ],
)
def test_bad_policies_and_dynamics_are_refused(make, name):
    with pytest.raises((ValueError, TypeError), match=name):
        make()


def test_bad_problems_are_refused():
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)
    for settings in ({"horizon": 0.0}, {"horizon": 1.0, "discount": -1.0}):
        with pytest.raises(ValueError, match=list(settings)[-1]):
            ctrl.ControlProblem(sde, **settings)


def test_solvers_without_density_say_so():
    class Blind:
        def step(self, sde, t0, t1, states, action, increment):
            return states

    paths = ctrl.Paths(torch.zeros(2, 3, 1), None, None, ctrl.uniform_grid(1.0, 2))
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)
    policy = ctrl.DeterministicPolicy(lambda t, x: x)
    with pytest.raises(TypeError, match="density"):
        ctrl.transitions.log_prob(sde, Blind(), policy, paths)
