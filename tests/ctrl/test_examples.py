"""The example is run and its claim asserted."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_problem.py"


def test_the_example_learns_what_it_says(capsys, as_users_run_it):
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
    assert 3e-5 < chance < 3.3e-5
    assert estimate.standard_error < 0.01 * chance
    assert abs(estimate.mean - chance) < 5 * estimate.standard_error


def test_particles_earn_the_exact_value_of_their_number(capsys):
    estimate, exact, limit = main_of("mean_field")
    capsys.readouterr()
    # the grid of 100 steps is worth less than a standard error
    assert abs(estimate.mean - exact) < 5 * estimate.standard_error
    assert abs(limit - exact) < 0.05 * abs(limit)  # starts differ by chance, values by 1/30


def test_records_give_the_best_policy_s_value():
    value, error, best = main_of("recorded_data")
    # the recorded policy earns -1.4; steps of 0.01 are worth 1 %, the estimated policy 1 %
    assert abs(value - best) < 4 * error + 0.02 * abs(best)
    assert error < 0.08 * abs(best)


def test_an_exploring_investor_earns_the_closed_form():
    estimate, exact = main_of("merton")
    assert abs(estimate.mean - exact) < 5 * estimate.standard_error < 0.1 * exact


def test_selling_costs_what_almgren_and_chriss_say():
    rate, step = 3.3, 1 / 400  # sums by the left end are off by half a step's decay
    for _, estimate, exact in main_of("almgren_chriss"):
        assert abs(estimate.mean - exact) < 5 * estimate.standard_error + rate * step * exact


def test_a_call_on_a_stock_that_jumps_is_worth_mertons_series():
    estimate, series = main_of("jumps")
    assert estimate.standard_error < 0.005 * series
    assert abs(estimate.mean - series) < 5 * estimate.standard_error


def test_an_investor_under_hestons_volatility_has_krafts_utility():
    simulated, grid, exact = main_of("heston")
    assert abs(grid - exact) < 1e-3 * abs(exact)
    assert abs(simulated.mean - exact) < 5 * simulated.standard_error


def test_the_share_that_is_learned_is_mertons():
    learned, merton = main_of("controlled_diffusion")
    assert abs(learned - merton) < 0.01 * merton  # ten steps a year are worth a third of that


def test_the_fine_tuned_chain_earns_the_exact_optimum():
    estimate, exact = main_of("jump_rates")
    assert abs(estimate.mean - exact) < 5 * estimate.standard_error + 0.005 * exact  # held rates


def test_certainty_equivalents_are_those_of_the_riccati_equation():
    worth = main_of("risk_sensitive")
    for estimate, exact in worth.values():
        assert abs(estimate.mean - exact) < 5 * estimate.standard_error
    assert worth["averse"][1] > worth["neutral"][1]


def test_phibe_of_higher_order_is_nearer_on_coarse_data():
    estimates, exact = main_of("coarse_data")
    errors = [abs(value - exact) for value in estimates.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.25 * errors[0]
