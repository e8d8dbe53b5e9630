"""Equations that switch between regimes."""

import pytest
import torch

import ctrl
from ctrl import regimes
from ctrl.linear import LinearQuadratic, TimeVarying, solve_lq, solve_lq_switching

RATES = torch.tensor([[0.0, 1.3], [0.7, 0.0]], dtype=torch.float64)
TIMES = torch.linspace(0, 0.8, 3, dtype=torch.float64)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]


def two(**more):
    return LinearQuadratic(
        A=column(-1.5, 0.9), B=column(0.8, 1.1), sigma=column(0.3, 0.6), M=column(1.0, 0.4),
        N=column(0.7, 0.5), H=column(0.9, 1.6), **more,
    )  # fmt: skip


def test_roll_outs_of_the_optimal_policy_are_paid_the_coupled_value(generator):
    lq = two()
    solution = solve_lq_switching(lq, RATES, TIMES)
    problem = regimes.switching_problem(lq, RATES, 0.8)
    start = regimes.join(torch.full((20_000, 1), 0.7, dtype=torch.float64), 1)
    policy = regimes.switching_policy(solution)
    grid = ctrl.uniform_grid(0.8, 32)
    paths = ctrl.simulate(problem, policy, start, grid, generator=generator)
    paid = ctrl.Estimate.of(ctrl.returns_to_go(problem, paths)[:, 0])
    exact = float(regimes.switching_value(solution, TIMES[0], start[:1]))
    assert set(paths.states[..., 1].unique().tolist()) == {0.0, 1.0}
    # weak order 1: a step of 0.025 is off by some per cent of it, beside 5 standard errors
    assert abs(paid.mean - exact) < 5 * paid.standard_error + 0.025 * abs(exact)
    # without switches regime 1 alone would be worth this, which the test tells apart
    alone = LinearQuadratic(**{k: getattr(lq, k)[1] for k in ("A", "B", "sigma", "M", "N", "H")})
    stays = float(solve_lq(alone, TIMES).value(TIMES[0], start[:1, :1]))
    assert abs(stays - exact) > 2 * (5 * paid.standard_error + 0.025 * abs(exact))


def test_a_likelihood_ratio_moves_the_rates_of_switching(generator):
    sde = regimes.regime_switching(
        lambda t, x, a, i: -x,
        lambda t, x, i: 0.5,
        lambda t, x, a, i: a.expand(len(x), 2),  # the action is the rate of leaving
        2,
    )
    fast, slow = (
        ctrl.DeterministicPolicy(lambda t, x, rate=rate: torch.full_like(x[:, :1], rate))
        for rate in (2.0, 0.5)
    )
    problem = ctrl.ControlProblem(sde, 1.0)
    start = regimes.join(torch.zeros(20_000, 1, dtype=torch.float64), 0)
    paths = ctrl.simulate(problem, fast, start, ctrl.uniform_grid(1.0, 20), generator=generator)
    kl = ctrl.girsanov.path_kl(sde, fast, slow, paths)
    exact = torch.full_like(kl, 2 * torch.tensor(4.0).log().item() - 1.5)  # of Poisson processes
    torch.testing.assert_close(kl, exact)
    ratio = ctrl.Estimate.of(ctrl.girsanov.log_ratio(sde, fast, slow, paths))
    assert abs(ratio.mean - float(exact[0])) < 5 * ratio.standard_error


@pytest.mark.parametrize("bad", [-0.4, float("nan"), float("inf")])
def test_bad_rates_are_refused(bad, generator):
    rates = RATES.clone()
    rates[0, 1] = bad
    with pytest.raises(ValueError, match="rates must be at least 0 and finite"):
        solve_lq_switching(two(), rates, TIMES)
    with pytest.raises(ValueError, match="rates must be at least 0 and finite"):
        regimes.regime_switching(lambda t, x, a, i: x, lambda t, x, i: 1.0, rates, 2)
    sde = regimes.regime_switching(
        lambda t, x, a, i: -x, lambda t, x, i: 0.5, lambda t, x, a, i: rates[i], 2
    )
    start = regimes.join(torch.zeros(4, 1, dtype=torch.float64), 0)
    still = ctrl.DeterministicPolicy(lambda t, x: x[:, :1])
    with pytest.raises(ValueError, match="intensity must be at least 0 and finite"):
        ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0), still, start, ctrl.uniform_grid(1.0, 2),
            generator=generator,
        )  # fmt: skip


def test_problems_that_do_not_switch_as_said_are_refused():
    with pytest.raises(ValueError, match=r"rates must be \[regimes, regimes\]"):
        solve_lq_switching(two(), torch.ones(3, 3, dtype=torch.float64), TIMES)
    with pytest.raises(ValueError, match="batch"):
        regimes.switching_problem(two(temperature=0.1), RATES)
    with pytest.raises(ValueError, match="at least 2"):
        regimes.regime_switching(lambda t, x, a, i: x, lambda t, x, i: 1.0, RATES, 1)


def test_coefficients_that_mix_times_are_refused():
    one = torch.ones(1, 1, dtype=torch.float64)
    mixed = TimeVarying(lambda t: LinearQuadratic(A=t.sum() * one, B=one, sigma=one, M=one, N=one))
    with pytest.raises(ValueError, match="at must return a batch"):
        solve_lq(mixed, TIMES)
    warmer = TimeVarying(
        lambda t: LinearQuadratic(A=one, B=one, sigma=one, M=one, N=one, temperature=0.1 + t)
    )
    with pytest.raises(ValueError, match="temperature must be one number"):
        warmer.problem(1.0)
