"""Policies: densities against torch.distributions, precision, bad input."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal

import ctrl


def test_gaussian_policy_density_and_entropy():
    policy = ctrl.GaussianPolicy(lambda t, x: 2 * x, std=0.3)
    x = torch.tensor([[0.1, -0.4]], dtype=torch.float64)
    a = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    law = Normal(2 * x, 0.3)
    t = torch.tensor(0.0)
    torch.testing.assert_close(policy.log_prob(t, x, a), law.log_prob(a).sum(1))
    torch.testing.assert_close(policy.entropy(t, x), law.entropy().sum(1))


@pytest.mark.parametrize("std", [0.3, lambda t: 0.3], ids=["number", "function of time"])
def test_a_float64_policy_reads_its_std_in_float64(std):
    policy = ctrl.GaussianPolicy(lambda t, x: 2 * x, std=std)
    x = torch.tensor([[0.1, -0.4]], dtype=torch.float64)
    a = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    law = Normal(2 * x, torch.tensor(0.3, dtype=torch.float64))
    t = torch.tensor(0.0)  # float32, as a caller may give it: 0.3 in float32 is 4e-8 off
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(policy.log_prob(t, x, a), law.log_prob(a).sum(1), **close)
    torch.testing.assert_close(policy.entropy(t, x), law.entropy().sum(1), **close)
    noise = torch.tensor([[0.7, -1.1]], dtype=torch.float64)
    torch.testing.assert_close(policy.act(2 * x, t, noise), 2 * x + 0.3 * noise, **close)


@pytest.mark.parametrize("event", [(), (3,), (4, 8, 8)], ids=str)
def test_densities_of_events_of_any_shape_are_sums_over_coordinates(event, generator):
    policy = ctrl.GaussianPolicy(lambda t, x: torch.sin(x) + t, std=lambda t: 0.4 + t)
    t = torch.tensor(0.25, dtype=torch.float64)
    x, a = torch.randn(2, 5, *event, dtype=torch.float64, generator=generator)
    law = Normal(torch.sin(x) + t, 0.4 + t)
    expected = law.log_prob(a).reshape(5, -1).sum(1)
    torch.testing.assert_close(policy.log_prob(t, x, a), expected, rtol=1e-12, atol=1e-12)
    expected = law.entropy().reshape(5, -1).sum(1)
    torch.testing.assert_close(policy.entropy(t, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"std": 0.0}, "std"),
        ({"std": -0.3}, "std"),
        ({"std": math.nan}, "std"),
        ({"std": math.inf}, "std"),
        ({"std": "wide"}, "std"),
        ({"std": True}, "std"),
        ({"mean": 0.0}, "mean"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], name):
    good: dict[str, Any] = {"mean": lambda t, x: x, "std": 0.3}
    with pytest.raises((ValueError, TypeError), match=name):
        ctrl.GaussianPolicy(**good | settings)
    if name == "mean":
        with pytest.raises(TypeError, match=name):
            ctrl.DeterministicPolicy(**settings)


@pytest.mark.parametrize("std", [0.0, -0.2, math.nan, math.inf])
def test_a_std_that_turns_bad_in_time_has_no_density(std):
    policy = ctrl.GaussianPolicy(lambda t, x: x, std=lambda t: std)
    t, x = torch.tensor(0.5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"std must be positive and finite, at t = 0\.5"):
        policy.log_prob(t, x, x)
    with pytest.raises(ValueError, match="std"):
        policy.entropy(t, x)


def test_shapes_that_would_broadcast_are_refused():
    policy = ctrl.GaussianPolicy(lambda t, x: x[:, :1], std=0.3)
    t, x = torch.tensor(0.5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="actions"):
        policy.log_prob(t, x, x)
    for noise in (None, torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="noise"):
            policy.act(x[:, :1], t, noise)
    wide = ctrl.GaussianPolicy(lambda t, x: x, std=lambda t: torch.full((2,), 0.2))
    with pytest.raises((ValueError, TypeError), match="std"):
        wide.act(x, t, x)
