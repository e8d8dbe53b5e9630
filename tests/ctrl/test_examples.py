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
