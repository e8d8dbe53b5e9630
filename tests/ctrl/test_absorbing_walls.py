"""Dirichlet walls of the HJB grid: exact exit problems, and grids that miss the walls."""

import math
from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import hjb
from ctrl.state_grid import grid_points
from ctrl.stopping import Ball, HalfSpace, Inside, Interval

W = 1.4
SDE = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)
STILL = ctrl.DeterministicPolicy(lambda t, x: 0 * x)
FLEMING = ctrl.ControlProblem(
    SDE, math.inf, lambda t, x, a: -0.5 * (a.square().sum(1) + W**2), domain=Interval(-1.0, 1.0)
)
CLOCK = replace(FLEMING, running_reward=lambda t, x, a: 1 + 0 * x[:, 0])
AXES = (hjb.Axis(-1.0, 1.0, 41),)
X = AXES[0].points()


def test_flemings_transform_solves_the_exit_problem():
    """V = log cosh(w x) / cosh(w) of -a^2/2 - w^2/2, a = w tanh(w x); O(spacing^2)."""
    actions = hjb.trapezoid(-2.0, 2.0, 401)
    errors = []
    for nodes in (11, 21):
        axes = (hjb.Axis(-1.0, 1.0, nodes),)
        x = axes[0].points()
        solution = hjb.solve_discounted(FLEMING, axes, actions)
        exact = (torch.cosh(W * x) / math.cosh(W)).log()
        errors.append(float((solution.value.table[0] - exact).abs().max()))
        best = solution.mean_action.table[0, :, 0]
        assert float((best - W * torch.tanh(W * x))[1:-1].abs().max()) < 0.03
    assert errors[1] < 0.01
    assert 3.5 < errors[0] / errors[1] < 4.5
    long = hjb.solve_finite_horizon(replace(FLEMING, horizon=6.0), axes, actions, steps=20)
    torch.testing.assert_close(long.value.table[0], solution.value.table[0], rtol=0, atol=1e-4)


def test_the_mean_exit_time_is_exact_where_it_is_quadratic():
    """1 - x^2 between two walls, and with a reflecting end in the middle."""
    for axes, domain in ((AXES, CLOCK.domain), ((hjb.Axis(0.0, 1.0, 21),), Interval(-9.0, 1.0))):
        problem = replace(CLOCK, domain=domain)
        time = hjb.evaluate_discounted(problem, STILL, axes)
        torch.testing.assert_close(time.table[0], 1 - axes[0].points().square())


def test_an_exit_is_paid_at_its_time():
    """e^{-t} paid at the walls is the value of a discount: cosh(sqrt(2) x) / cosh(sqrt(2))."""
    paid = replace(
        CLOCK, running_reward=None, horizon=8.0, exit_reward=lambda t, x: (-t).exp() + 0 * x[:, 0]
    )
    v = hjb.evaluate_finite_horizon(paid, STILL, AXES, steps=160).table[0]
    exact = torch.cosh(2**0.5 * X) / math.cosh(2**0.5)
    torch.testing.assert_close(v, exact, rtol=0, atol=2e-3)
    still = replace(paid, horizon=math.inf)
    with pytest.raises(ValueError, match="exit_reward must be the same at all times"):
        hjb.evaluate_discounted(still, STILL, AXES)


def test_walls_need_not_be_flat_nor_at_the_end_of_an_axis():
    axes = (hjb.Axis(-1.0, 1.0, 41),) * 2
    points = grid_points(axes)
    exact = (1 - points.square().sum(1)).clamp(min=0) / 2
    ball = replace(CLOCK, domain=Ball(torch.zeros(2).double(), 1.0))
    time = hjb.evaluate_discounted(ball, STILL, axes).table[0].flatten()
    assert float((time - exact).abs().max()) < 0.03  # O(spacing): the wall goes between the nodes
    wide = (hjb.Axis(-2.0, 2.0, 81),)
    time = hjb.evaluate_discounted(CLOCK, STILL, wide).table[0]
    exact = (1 - wide[0].points().square()).clamp(min=0)
    torch.testing.assert_close(time, exact, rtol=0, atol=1e-12)


def test_coefficients_may_be_infinite_on_a_wall():
    singular = replace(CLOCK, running_reward=lambda t, x, a: 1 / (1 - x[:, 0].square()).sqrt())
    value = hjb.evaluate_discounted(singular, STILL, AXES)
    assert bool(torch.isfinite(value.table).all())


@pytest.mark.parametrize(
    ("domain", "where"),
    [
        (Interval(-2.0, 2.0), "inside"),
        (HalfSpace(torch.ones(1).double(), 5.0), "outside"),
        (Inside(lambda t, x: -1 - 0 * x[:, 0]), "outside"),
    ],
)
def test_grids_that_miss_the_walls_are_refused(domain, where):
    with pytest.raises(ValueError, match=f"all points are {where}"):
        hjb.solve_discounted(replace(FLEMING, domain=domain), AXES, hjb.trapezoid(-2.0, 2.0, 5))


def test_an_endless_problem_needs_a_discount_or_a_wall():
    endless = replace(FLEMING, domain=None)
    with pytest.raises(ValueError, match="discount must be positive"):
        hjb.solve_discounted(endless, AXES, hjb.trapezoid(-2.0, 2.0, 5))
