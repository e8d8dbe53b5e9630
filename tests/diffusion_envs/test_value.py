"""The value network's terminal condition and its martingale loss."""

import math

import pytest
import torch

from ctrl.noise import stream
from diffusion_envs.training.value_network import (
    ResidualValue,
    ResidualValueOfVectors,
    combine,
    constant_weights,
    cosine_weights,
    linear_weights,
    martingale_loss,
    skip_weights,
    value_network,
)


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


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (linear_weights, (0.6, 0.4)),
        (cosine_weights, (math.cos(0.2 * math.pi), 1 - math.cos(0.2 * math.pi))),
        (constant_weights, (1.0, 1.0)),
    ],
)
def test_the_terms_can_be_weighed_in_other_ways(weights, expected, generator):
    reward, residual = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    value = combine(times, reward, residual, weights)
    middle = expected[0] * reward[:, 1] + expected[1] * residual[:, 1]
    torch.testing.assert_close(value[:, 1], middle)
    if weights is not constant_weights:
        assert torch.equal(value[:, 0], reward[:, 0])


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


def weights(network):
    """Every parameter without symmetry, the last layer's too, which begins at zero."""
    g = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=g)
    return dict(network.double().named_parameters())


TIMES = torch.tensor([0.2, 0.9], dtype=torch.float64)
PHASES = TIMES[:, None] * math.pi / 2 * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
CLOCK = torch.cat([TIMES[:, None], PHASES.sin(), PHASES.cos()], dim=1)


def silu(x):
    return x / (1 + torch.exp(-x))


def test_the_network_of_images_is_its_formula(generator):
    network = ResidualValue(4, 6, generator=stream(0, "value"), width=5)
    p = weights(network)
    network.calibrate(torch.tensor([-3.0, 1.0, 0.5]).double())
    states, context = (
        torch.randn(2, *shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 7, 6), (6,))
    )

    def convolved(name, x, stride=1):
        """A 3 x 3 filter with a rim of zeros, pixel by pixel."""
        x = torch.nn.functional.pad(x, (1, 1, 1, 1))
        patches = x.unfold(2, 3, stride).unfold(3, 3, stride)  # [n, c, h, w, 3, 3]
        filtered = torch.einsum("nchwij,ocij->nohw", patches, p[f"{name}.weight"])
        return filtered + p[f"{name}.bias"][:, None, None]

    seen = torch.cat([context, CLOCK], dim=1)
    shift = (seen @ p["condition.weight"].T + p["condition.bias"])[:, :, None, None]
    x = silu(convolved("enter", states) + shift)
    x = silu(convolved("deepen", x, stride=2) + shift)
    x = silu(convolved("middle", x) + x).mean((2, 3))
    x = silu(x @ p["hidden.weight"].T + p["hidden.bias"])
    x = (x @ p["leave.weight"].T + p["leave.bias"])[:, 0]
    spread = torch.tensor([-3.0, 1.0, 0.5]).double().std()
    torch.testing.assert_close(network(TIMES, states, context), -0.5 + spread * x)


def test_the_network_of_vectors_is_its_formula(generator):
    network = ResidualValueOfVectors(3, 6, generator=stream(0, "value"), width=5)
    p = weights(network)
    network.calibrate(torch.tensor([-3.0, 1.0, 0.5]).double())
    states, context = (torch.randn(2, n, dtype=torch.float64, generator=generator) for n in (3, 6))
    x = torch.cat([states, context, CLOCK], dim=1) @ p["enter.weight"].T + p["enter.bias"]
    x = silu(x)
    x = silu(x @ p["hidden.weight"].T + p["hidden.bias"] + x)
    x = (x @ p["leave.weight"].T + p["leave.bias"])[:, 0]
    spread = torch.tensor([-3.0, 1.0, 0.5]).double().std()
    torch.testing.assert_close(network(TIMES, states, context), -0.5 + spread * x)


@pytest.mark.parametrize("event", [(4, 8, 8), (3,)], ids=str)
def test_a_new_network_is_still_and_spread_as_its_inputs_number(event):
    network = value_network(event, 6, generator=stream(0, "value"))
    assert isinstance(network, ResidualValue if len(event) == 3 else ResidualValueOfVectors)
    states, context = torch.randn(2, *event, generator=stream(0, "x")), torch.ones(2, 6)
    assert not network(TIMES.float(), states, context).any()
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or name == "leave.weight":
            assert not parameter.any()
        else:
            assert len(parameter) == 64
            bound = parameter[0].numel() ** -0.5  # uniform in +- 1 / sqrt(inputs)
            assert 0.95 * bound < parameter.abs().max() <= bound
    network.calibrate(torch.tensor([2.0]))  # one reward has no spread
    assert network(TIMES.float(), states, context).tolist() == [2.0, 2.0]
    network.calibrate(torch.tensor([2.0, 2.0]))
    assert network.scale.item() == 1
    for spread in (3.0, 0.3):
        network.calibrate(torch.tensor([1.0, 1.0 + spread]))
        assert network.scale.item() == pytest.approx(spread / 2**0.5)
    assert len(network.leave.weight) == 1
    again = value_network(event, 6, generator=stream(0, "value"))
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)
    )


def test_other_states_have_no_network():
    for event in ((), (3, 4), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="states must be"):
            value_network(event, 6, generator=stream(0, "value"))


def test_the_martingale_loss_is_the_squared_gap_integrated():
    values, returns = torch.tensor([[0.3, 0.1, 5.0]]), torch.tensor([[1.3, -0.4, 2.0]])
    found = martingale_loss(values, returns, torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(found, torch.tensor([0.2 * 1.0 + 0.7 * 0.25]))
