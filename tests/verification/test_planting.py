"""Mistakes are planted in the code that everybody holds, and are gone afterwards."""

import pytest

import ctrl
from ctrl.girsanov import terminal_kl_bound
from verification.planting import Edit, PlantingError, planted
from verification.statistics import influence, samples_needed

SAMPLES = "verification.statistics.samples_needed"
FACTOR = Edit(SAMPLES, "1.4 * 2", "1.4 * 4")


def test_whoever_holds_the_function_runs_the_mistake_and_then_the_right_code():
    right = samples_needed(0.1, 1.0)
    with planted(FACTOR):
        assert samples_needed(0.1, 1.0) == pytest.approx(2 * right, abs=1)
    assert samples_needed(0.1, 1.0) == right


def test_the_right_code_is_back_after_an_error():
    right = samples_needed(0.1, 1.0)
    with pytest.raises(RuntimeError, match="inside"), planted(FACTOR):
        raise RuntimeError("inside")
    assert samples_needed(0.1, 1.0) == right


def test_several_functions_at_once_and_only_those(generator):
    import torch

    x = torch.tensor([0.3])
    with planted(FACTOR, Edit("verification.statistics.influence", "0.5 *", "2.0 *")):
        assert float(influence(x)) == pytest.approx(float(torch.log1p(x + 2 * x**2)))
    assert float(influence(x)) == pytest.approx(float(torch.log1p(x + x**2 / 2)))


def test_methods_and_properties_of_classes_can_be_changed():
    edit = Edit("ctrl.paths.TimeGrid.steps", "diff()", "diff() * 2")
    grid = ctrl.uniform_grid(1.0, 2)
    with planted(edit):
        assert ctrl.uniform_grid(1.0, 2).steps.tolist() == [1.0, 1.0]
    assert grid.steps.tolist() == [0.5, 0.5]


def test_an_edit_shows_the_lines_that_differ():
    right, wrong = Edit("ctrl.girsanov.path_kl", "0.5 * energy", "energy").lines()
    assert right == "rates = 0.5 * energy"
    assert wrong == "rates = energy"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(SAMPLES, "no such text", "x"), "must stand exactly once"),
        (Edit(SAMPLES, "tolerance", "x"), "stands there"),
        (Edit(SAMPLES, "1.4", "1.4"), "differ"),
        (Edit("verification.statistics.nothing", "a", "b"), "no nothing"),
        (Edit("verification.statistics.Verdict.PASS", "a", "b"), "no function"),
    ],
)
def test_an_edit_that_does_not_fit_does_not_load(edit, message):
    with pytest.raises(PlantingError, match=message), planted(edit):
        pass


def test_two_edits_of_one_function_are_refused():
    with (
        pytest.raises(PlantingError, match="different functions"),
        planted(FACTOR, Edit(SAMPLES, "math.ceil", "math.floor")),
    ):
        pass


def test_nothing_is_left_behind():
    assert terminal_kl_bound.__module__ == "ctrl.girsanov"
    assert "energy" in __import__("inspect").getsource(ctrl.girsanov.path_kl)
