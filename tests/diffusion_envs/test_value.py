"""The value network's terminal condition and its martingale loss."""

import math

import pytest
import torch

from ctrl.noise import stream
from diffusion_envs.value import ResidualValue, combine, martingale_loss, skip_weights


def test_the_terminal_condition_holds_exactly():
    skip, out = skip_weights(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert skip[0].item() == 1
    assert out[0].item() == 0
    torch.testing.assert_close(skip.square() + out.square(), torch.ones(3).double())
    assert skip[2].item() == pytest.approx(0, abs=1e-15)


def test_the_value_is_the_reward_at_the_data_end_whatever_the_network_says(generator):
    reward, residual = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    value = combine(times, reward, residual)
    assert torch.equal(value[:, 0], reward[:, 0])
    expected = math.cos(0.2 * math.pi) * reward[:, 1] + math.sin(0.2 * math.pi) * residual[:, 1]
    torch.testing.assert_close(value[:, 1], expected)
    torch.testing.assert_close(value[:, 2], residual[:, 2])


def test_the_martingale_loss_is_minimised_by_the_projection_of_the_return(generator):
    """With a constant as the only feature the minimiser is the time-weighted mean return."""
    h = torch.tensor([0.3, 0.9, 0.2], dtype=torch.float64)
    returns = torch.randn(500, 4, dtype=torch.float64, generator=generator)
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)
    martingale_loss(constant.expand(500, 4), returns, h).mean().backward()
    best = (returns[:, :3].mean(0) * h).sum() / h.sum()
    assert constant.grad is not None
    assert constant.grad.item() == pytest.approx(-2 * float(best * h.sum()), rel=1e-12)


def test_calibration_sets_location_and_scale():
    value = ResidualValue(4, 6, generator=stream(0, "value"))
    rewards = torch.tensor([-3.0, -1.0, -2.0])
    value.calibrate(rewards)
    states, context = torch.randn(2, 4, 8, 8, generator=stream(0, "x")), torch.zeros(2, 6)
    got = value(torch.tensor([0.2, 0.9]), states, context)
    torch.testing.assert_close(got, torch.full((2,), -2.0))  # an untrained network adds nothing
    assert value.scale.item() == pytest.approx(1.0)
    value.calibrate(torch.full((3,), 5.0))  # equal rewards keep a positive scale
    assert math.isfinite(value.scale.item())
    assert value.scale.item() > 0


def test_initial_weights_come_from_the_given_stream():
    before = torch.random.get_rng_state()
    a, b = (ResidualValue(4, 6, generator=stream(1, "value")) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other = ResidualValue(4, 6, generator=stream(2, "value"))
    assert not torch.equal(a.enter.weight, other.enter.weight)
    del before  # layers draw once from the global stream before they are overwritten
