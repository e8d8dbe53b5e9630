"""Advantages by a rate against their defining sum; the surrogate's bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl.advantages import temporal_differences
from ctrl.policy_gradient import clipped_surrogate, continuous_gae


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


def test_clipped_surrogate_refuses_shapes_that_would_broadcast():
    rows = torch.zeros(4)
    with pytest.raises((ValueError, TypeError)):  # the shape check of the test run may come first
        clipped_surrogate(rows, rows[:, None].expand(4, 4).sum(1, keepdim=True), rows)


def test_nothing_is_discounted_unless_asked():
    values = torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64)
    rewards = torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    deltas = temporal_differences(values, rewards, torch.tensor([0.3, 0.6]).double())
    torch.testing.assert_close(deltas, values.diff() + rewards)
    summed = continuous_gae(values, rewards, torch.tensor([0.3, 0.6]).double(), 0.0)
    torch.testing.assert_close(summed[:, 0], (values.diff() + rewards).sum(1))
