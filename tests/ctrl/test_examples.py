"""The example is run and its claim asserted."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_problem.py"


def test_the_example_learns_what_it_says(capsys):
    before, after, optimum = runpy.run_path(str(EXAMPLE))["main"]()
    capsys.readouterr()
    # seeded; 95 % of the way, of which a grid of 20 steps alone keeps half a per cent
    assert after.mean > before.mean + 0.95 * (optimum - before.mean)
    assert after.mean - 5 * after.standard_error < optimum


def main_of(name):
    return runpy.run_path(str(EXAMPLE.with_name(f"{name}.py")))["main"]()


def test_exit_times_are_those_of_brownian_motion():
    for _, estimate, exact in main_of("exit_time"):
        # the exit is recorded at the end of its step: half a step late, at rates up to 3
        assert abs(estimate.mean - exact) < 5 * estimate.standard_error + 0.5 * 0.02 * 3


def test_a_rare_event_is_sampled_as_often_as_the_grid_says():
    estimate, chance = main_of("rare_event")
    assert 1e-6 < chance < 1.3e-6
    assert estimate.standard_error < 0.01 * chance
    assert abs(estimate.mean - chance) < 5 * estimate.standard_error


def test_particles_earn_the_exact_value_of_their_number(capsys):
    estimate, exact, limit = main_of("mean_field")
    capsys.readouterr()
    # the grid of 100 steps is worth less than a standard error
    assert abs(estimate.mean - exact) < 5 * estimate.standard_error
    assert abs(limit - exact) < 0.05 * abs(limit)  # starts differ by chance, values by 1/30
