"""Closed forms answer out of memory, but anew where a mistake is planted."""

import numpy as np
import pytest

from ctrl.girsanov import path_kl
from verification.answers import remembered
from verification.closed_form import linear_policy, tilt
from verification.closed_form.gaussian_law import Normal, Quadratic
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import SHORT
from verification.planting import Edit, planted

START = Normal(np.array([0.3, -0.8]), np.array([[1.2, 0.1], [0.1, 0.7]]))
GAIN, SHIFT = np.array([[-0.3, 0.15], [0.05, 0.2]]), np.array([0.25, -0.1])
FLIPPED = Edit(
    "verification.closed_form.linear_policy._mean_square", "centre @ centre +", "centre @ centre -"
)


def performance(eta=1.0):
    return linear_policy.performance(SHORT, START, GAIN, SHIFT, REWARD, KL_WEIGHT, eta)


def test_a_mistake_in_what_a_closed_form_calls_changes_its_answer_and_goes_with_it():
    right, other = performance(), performance(0.7)
    with planted(FLIPPED):
        wrong = performance()
        assert abs(wrong - right) > 1e-3
        assert performance() == wrong
    assert performance() == right
    assert performance(0.7) == other
    with planted(FLIPPED):
        assert performance() == wrong


def test_an_answer_is_computed_once():
    calls = []

    def closed_form(x):
        calls.append(x)
        return np.array([x])

    closed_form.__module__ = tilt.__name__
    answer = remembered(closed_form)
    first = answer(0.0)
    first += 1.0  # the caller's own
    assert answer(0.0) == [0.0]
    assert answer(-0.0) == [0.0]
    assert [str(x) for x in calls] == ["0.0", "-0.0"]


def test_arguments_are_told_apart_by_their_values():
    moved = Normal(START.mean + 1e-9, START.covariance)
    same = Normal(START.mean.copy(), START.covariance.copy())
    values = [
        linear_policy.performance(SHORT, law, GAIN, SHIFT, REWARD, KL_WEIGHT)
        for law in (START, moved, same)
    ]
    assert values[0] == values[2] != values[1]
    steeper = Quadratic(REWARD.Q, 2 * REWARD.l, REWARD.c)
    assert linear_policy.performance(SHORT, START, GAIN, SHIFT, steeper, KL_WEIGHT) != values[0]


def test_functions_of_the_library_have_no_answers_to_remember():
    with pytest.raises(ValueError, match="no closed form"):
        remembered(path_kl)
    for value in (path_kl, lambda s: tilt.optimal_value(SHORT, REWARD, KL_WEIGHT, s)):
        with pytest.raises(TypeError, match="cannot be remembered"):
            linear_policy.regret(SHORT, START, GAIN, SHIFT, KL_WEIGHT, value)
