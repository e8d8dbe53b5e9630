"""Control problems: what their settings may be."""

import math

import pytest

import ctrl

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
