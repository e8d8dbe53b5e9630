"""Means with their standard errors: values, printing, refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctrl


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_estimates_are_means_with_their_standard_error(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    estimate = ctrl.Estimate.of(tensor)
    assert estimate.mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-9)
    standard_error = float(tensor.std()) / math.sqrt(len(values))
    assert estimate.standard_error == pytest.approx(standard_error, rel=1e-9, abs=1e-9)


def test_estimates_print_value_and_error():
    assert str(ctrl.Estimate(0.36152, 0.0012, 100)) == "0.3615(12)"
    assert str(ctrl.Estimate(-12.34, 2.5, 10)) == "-12.3(25)"
    assert str(ctrl.Estimate(0.5, 0.0, 3)) == "0.5"


def test_small_estimates_print_their_power_of_ten():
    assert str(ctrl.Estimate(8.362e-11, 6.7e-12, 9)) == "8.36(67)e-11"
    assert str(ctrl.Estimate(-3.1e-7, 4.84e-6, 9)) == "-0.3(48)e-06"
    assert str(ctrl.Estimate(0.0, 2.5e-105, 9)) == "0.0(25)e-105"
    assert str(ctrl.Estimate(-9.96e-6, 1.2e-7, 9)) == "-0.00000996(12)"
    assert str(ctrl.Estimate(-0.0000071, 0.0000174, 9)) == "-0.000007(17)"
    assert str(ctrl.Estimate(0.25, 1.24e-7, 9)) == "0.25000000(12)"
    assert str(ctrl.Estimate(0.00031, 0.0000217, 9)) == "0.000310(22)"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_estimates_refuse_nothing_and_nan(values):
    with pytest.raises(ValueError, match="values"):
        ctrl.Estimate.of(torch.tensor(values))


def test_an_error_that_rounds_up_keeps_two_digits():
    assert str(ctrl.Estimate(0.36152, 0.0996, 9)) == "0.36(10)"
    assert str(ctrl.Estimate(1234.5, 250.0, 9)) == "1234(250)"


def test_one_sample_has_no_known_error():
    estimate = ctrl.Estimate.of(torch.tensor([1.5]))
    assert estimate.standard_error == math.inf
    assert str(estimate) == "1.5(?)"
    assert estimate.as_dict() == {"mean": 1.5, "standard_error": None, "n": 1}


def test_quadrature_weights_make_an_exact_mean():
    values, weights = torch.tensor([1.0, 4.0]), torch.tensor([0.25, 0.75])
    assert ctrl.Estimate.of(values, quadrature_weights=weights) == ctrl.Estimate(3.25, 0.0, 2)


def test_importance_weights_leave_a_standard_error(generator):
    """Its mean over many estimates is the spread of their means, within 4 of its own errors."""
    shift, samples, repeats = 0.7, 400, 2000
    x = torch.randn(repeats, samples, dtype=torch.float64, generator=generator)
    weights = torch.softmax(shift * x, 1)  # of N(shift, 1) instead
    estimates = [
        ctrl.Estimate.of(row.square(), importance_weights=w)
        for row, w in zip(x, weights, strict=True)
    ]
    means = torch.tensor([each.mean for each in estimates], dtype=torch.float64)
    errors = torch.tensor([each.standard_error for each in estimates], dtype=torch.float64)
    std = means.std()
    # bias of both is O(1 / samples); the relative error of a standard deviation is 1 / sqrt(2 n)
    assert abs(errors.mean() / std - 1) < 4 / (2 * repeats) ** 0.5 + 10 / samples
    assert abs(means.mean() - (1 + shift**2)) < 4 * std / repeats**0.5 + 10 / samples


def test_an_importance_sample_of_one_has_no_known_error():
    estimate = ctrl.Estimate.of(
        torch.tensor([1.0, 4.0]), importance_weights=torch.tensor([0.0, 1.0])
    )
    assert estimate == ctrl.Estimate(4.0, math.inf, 2)


@pytest.mark.parametrize("kind", ["quadrature_weights", "importance_weights"])
@pytest.mark.parametrize("weights", [[0.5, 0.6], [-0.5, 1.5], [math.nan, 0.5], [1.0]])
def test_bad_weights_are_refused(kind, weights):
    with pytest.raises((ValueError, TypeError), match=kind):
        ctrl.Estimate.of(torch.tensor([1.0, 2.0]), **{kind: torch.tensor(weights)})


def test_weights_of_both_kinds_are_refused():
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="not both"):
        ctrl.Estimate.of(half, quadrature_weights=half, importance_weights=half)
