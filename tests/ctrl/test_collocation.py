"""Collocation: known solutions to round-off, explosions, derivatives."""

import math

import pytest
import torch
from torch import Tensor

from ctrl.linear.collocation import POINTS, RESOLVED, FiniteEscapeError, follow, integrate


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def times(horizon: float) -> Tensor:
    return torch.linspace(0, horizon, 57, dtype=torch.float64)


def test_tangent_is_followed_close_to_its_pole():
    curve = integrate(lambda t, y: 1 + y.square(), tensor([0.0]), 1.5)
    t = times(1.5)
    # near the pole an error is carried on as 1 / cos^2 = 200 times itself, relative 14
    torch.testing.assert_close(curve(t)[:, 0], t.tan(), rtol=100 * RESOLVED, atol=RESOLVED)


@pytest.mark.parametrize("horizon", [2.0, 1e3])
def test_an_explosion_is_refused_at_its_time(horizon):
    with pytest.raises(FiniteEscapeError, match="explodes") as caught:
        integrate(lambda t, y: 1 + y.square(), tensor([0.0]), horizon)
    assert caught.value.time == pytest.approx(math.pi / 2, rel=1e-5)


def test_a_thousand_turns_of_a_pendulum_keep_their_phase():
    turn = tensor([[0.0, 1.0], [-1.0, 0.0]])
    curve = integrate(lambda t, y: y @ turn.T, tensor([1.0, 0.0]), 300.0)
    t = times(300.0)
    expected = torch.stack([t.cos(), -t.sin()], dim=-1)
    # round-off of a few hundred panels
    torch.testing.assert_close(curve(t), expected, rtol=0, atol=1e-12)


def test_rates_may_depend_on_time():
    curve = integrate(lambda t, y: (2 * t * torch.cos(t**2))[:, None], tensor([0.3]), 4.0)
    t = times(4.0)
    torch.testing.assert_close(curve(t)[:, 0], 0.3 + (t**2).sin(), rtol=0, atol=10 * RESOLVED)


def test_a_batch_is_its_members():
    rates = tensor([[0.1], [-30.0], [2.0]])
    start = tensor([[1.0], [2.0], [-1e-6]])
    curve = integrate(lambda t, y: rates * y, start, 1.3)
    t = times(1.3)
    expected = start[:, 0] * torch.exp(rates[:, 0] * t[:, None])
    scale = expected.abs().amax(0)  # accuracy is relative to the largest value on a panel
    assert bool(((curve(t)[..., 0] - expected).abs() <= 1e-12 * scale).all())


def test_values_that_are_known_are_followed_on_panels_that_halvings_make():
    asked = list[tuple[float, int]]()

    def panel(begin: float, halvings: int, y: Tensor) -> Tensor | None:
        asked.append((begin, halvings))
        if begin + 1.6 / 2**halvings > 1.2 and halvings < 4:
            return None  # not known over much, late
        t = begin + 0.8 / 2**halvings * (1 + tensor(POINTS))
        return torch.cos(9 * t)[:, None] + 0 * y

    curve = follow(panel, tensor([1.0]), 1.6)
    t = times(1.6)
    torch.testing.assert_close(curve(t)[:, 0], torch.cos(9 * t), rtol=0, atol=10 * RESOLVED)
    widths = curve.breaks.diff()
    assert float(widths.min()) == pytest.approx(0.1)
    assert float(widths.max()) > 0.15
    parts = curve.breaks[:-1] / widths  # a panel begins at a multiple of its width
    torch.testing.assert_close(parts, parts.round(), rtol=0, atol=1e-9)
    assert len(asked) <= 2 * len(widths) + 6


def test_its_derivative_in_time_is_the_rate():
    curve = integrate(lambda t, y: -y.pow(3), tensor([1.4]), 2.0)
    for t in (0.0, 0.123, curve.breaks[1].item(), 2.0):
        at = tensor(t)
        y, slope = torch.func.jvp(curve, (at,), (torch.ones_like(at),))
        torch.testing.assert_close(slope, -y.pow(3), rtol=1e-11, atol=1e-12)


def test_times_may_have_any_shape_and_be_vectorised():
    curve = integrate(lambda t, y: -y, tensor([[1.0, 2.0], [3.0, 4.0]]), 1.0)
    t = times(1.0).view(3, 19)
    assert curve(t).shape == (3, 19, 2, 2)
    each = torch.func.vmap(torch.func.vmap(curve))(t)
    torch.testing.assert_close(curve(t), each, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(curve(t[1, 4]), each[1, 4], rtol=1e-13, atol=1e-13)


def test_there_is_no_answer_outside_the_horizon():
    curve = integrate(lambda t, y: -y, tensor([1.0]), 1.0)
    assert bool(torch.isnan(curve(tensor([-0.1, 1.1, math.nan]))).all())
    assert bool(torch.isfinite(curve(tensor([0.0, 1.0]))).all())
    # the horizon in float32 may lie a little behind it
    assert bool(torch.isfinite(curve(tensor([1 + 1e-7]))).all())


def test_derivatives_in_start_parameters_and_time():
    def solve(start: Tensor, pull: Tensor, t: Tensor) -> Tensor:
        return integrate(lambda s, y: torch.sin(pull * y) + s[:, None], start, 1.0)(t)

    inputs = (tensor([0.3, -1.2]), tensor([1.7, 0.4]), tensor([0.2, 0.9]))
    inputs = tuple(each.requires_grad_() for each in inputs)
    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)
