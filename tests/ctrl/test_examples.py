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


def test_particles_earn_the_exact_value_of_their_number(capsys):
    example = Path(__file__).parents[2] / "examples" / "mean_field.py"
    estimate, exact, limit = runpy.run_path(str(example))["main"]()
    capsys.readouterr()
    # the grid of 100 steps is worth less than a standard error
    assert abs(estimate.mean - exact) < 5 * estimate.standard_error
    assert abs(limit - exact) < 0.05 * abs(limit)  # starts differ by chance, values by 1/30
