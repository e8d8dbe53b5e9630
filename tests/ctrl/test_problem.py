"""Control problems: what their settings may be."""

import math

import pytest
import torch

import ctrl
from ctrl import hjb

SDE = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"horizon": 0.0}, ValueError),
        ({"horizon": -1.0}, ValueError),
        ({"horizon": math.nan}, ValueError),
        ({"horizon": "1"}, TypeError),
        ({"discount": -1.0}, ValueError),
        ({"discount": math.inf}, ValueError),
        ({"discount": None}, TypeError),
        ({"temperature": math.nan}, ValueError),
        ({"temperature": True}, TypeError),
        ({"running_reward": 1.0}, TypeError),
        ({"terminal_reward": 1.0}, TypeError),
        ({"sde": "unknown"}, TypeError),
    ],
    ids=str,
)
def test_bad_problems_are_refused(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        ctrl.ControlProblem(**{"sde": SDE, "horizon": 1.0} | settings)


def test_nothing_is_paid_at_the_end_of_an_endless_problem():
    assert ctrl.ControlProblem(SDE, math.inf).horizon == math.inf
    with pytest.raises(ValueError, match="horizon"):
        ctrl.ControlProblem(SDE, math.inf, terminal_reward=lambda x: x[:, 0])


@pytest.mark.parametrize("rate", [-0.3, float("nan"), float("inf")])
def test_negative_killing_is_refused_by_all_that_discounts(rate, generator):
    sde = ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x: 0.5)
    problem = ctrl.ControlProblem(
        sde, 1.0, terminal_reward=lambda x: x[:, 0],
        discount=lambda t, x: torch.full_like(x[:, 0], rate),
    )  # fmt: skip
    still = ctrl.DeterministicPolicy(lambda t, x: 0 * x)
    start = torch.ones(5, 1, dtype=torch.float64)
    paths = ctrl.simulate(problem, still, start, ctrl.uniform_grid(1.0, 3), generator=generator)

    def value(t, x):
        return x[:, 0].square()

    for asked in (
        lambda: ctrl.returns_to_go(problem, paths),
        lambda: ctrl.value.discount_factors(problem, paths),
        lambda: ctrl.martingale.increments(value, problem, paths),
        lambda: ctrl.martingale.ctd_lambda(value, problem, paths, 0.5),
        lambda: ctrl.q_learning.q_rates(problem, value, paths),
        lambda: hjb.evaluate_finite_horizon(problem, still, (hjb.Axis(-2.0, 2.0, 9),), steps=4),
    ):
        with pytest.raises(ValueError, match="discount must be at least 0 and finite, but at t ="):
            asked()


def test_a_discount_must_be_one_number_a_path():
    sde = ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x: 0.5)
    x = torch.ones(5, 1, dtype=torch.float64)
    wide = ctrl.ControlProblem(sde, 1.0, discount=lambda t, x: x)
    with pytest.raises(ValueError, match=r"discount must return \[5\]"):
        wide.discount_at(x.new_tensor(0.0), x)
    with pytest.raises(TypeError, match="a number or a function of"):
        ctrl.ControlProblem(sde, 1.0, discount=lambda x: x)
