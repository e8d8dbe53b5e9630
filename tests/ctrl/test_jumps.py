"""Jumps as part of the SDE: their law, their noise, and what refuses them."""

import math
from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import hjb
from ctrl.jumps import DiscreteMarks, ExponentialMarks, NormalMarks, poisson_counts

RATE, SHIFT, WIDTH = 1.7, -0.2, 0.4  # of the jumps: intensity, mean and std of their sizes
STILL = ctrl.DeterministicPolicy(lambda t, x: 0 * x)


def intensity(t, x, a):
    return torch.full_like(x[:, 0], RATE)


def sizes(t, x, a, z):
    return z.expand_as(x)


def sde_with(jumps):
    return ctrl.ControlledSDE(lambda t, x, a: 0.3 + 0 * x, lambda t, x: 0.5, jumps=jumps)


PLAIN = ctrl.Jumps(intensity, sizes, NormalMarks(SHIFT, WIDTH))


def problem_of(sde):
    return ctrl.ControlProblem(sde, 1.0)


def rolled_out(sde, paths=64, **settings):
    start = torch.full((paths, 1), 0.2, dtype=torch.float64)
    return ctrl.simulate(problem_of(sde), STILL, start, ctrl.uniform_grid(1.0, 4), **settings)


def assert_mean(values, exact, *, resolves):
    estimate = ctrl.Estimate.of(values)
    tolerance = 5 * estimate.standard_error  # false alarms: 6e-7
    assert tolerance <= resolves / 2
    assert abs(estimate.mean - exact) <= tolerance


def test_one_step_has_the_law_of_the_compound_poisson_process(generator):
    start = torch.zeros(200_000, 1, dtype=torch.float64)
    sde = replace(sde_with(PLAIN), diffusion=lambda t, x: 0.0)
    paths = ctrl.simulate(
        problem_of(sde), STILL, start, ctrl.uniform_grid(1.0, 1), generator=generator
    )
    jumped = paths.states[:, 1, 0] - 0.3
    frequency = 1.3  # the characteristic function, of which several jumps a step are a part
    one = math.exp(-0.5 * (frequency * WIDTH) ** 2)
    real = one * math.cos(frequency * SHIFT) - 1
    exact = math.exp(RATE * real) * math.cos(RATE * one * math.sin(frequency * SHIFT))
    # mildest mistake: at most one jump a step
    once = 1 + (1 - math.exp(-RATE)) * real
    assert_mean((frequency * jumped).cos(), exact, resolves=abs(exact - once))
    assert_mean(paths.jumps[:, 0, 0], RATE, resolves=0.05)


def test_a_jump_begins_where_the_one_before_it_ended():
    doubling = ctrl.Jumps(intensity, lambda t, x, a, z: x)
    sde = replace(sde_with(doubling), diffusion=lambda t, x: 0.0)
    z = torch.zeros(1, 1, 1, dtype=torch.float64) + 1.2  # the 88 % quantile of Poisson(1.7): 3
    start = torch.ones(1, 1, dtype=torch.float64)
    noise = ctrl.Noise(0 * z, jumps=z)
    paths = ctrl.simulate(problem_of(sde), STILL, start, ctrl.uniform_grid(1.0, 1), noise=noise)
    assert paths.jumps.item() == 3
    assert paths.states[0, 1, 0].item() == pytest.approx(1.3 * 8, rel=1e-15)


def test_numbers_of_jumps_of_extreme_normals_are_finite():
    for dtype in (torch.float32, torch.float64):
        normals = torch.tensor([-6.0, 6.0, 9.0], dtype=dtype)
        counts = poisson_counts(normals, torch.full_like(normals, 0.3))
        # P(N >= 14) = 4.1e-19 > 1 - Phi(9) = 1.1e-19 > P(N >= 15)
        assert counts.tolist() == [0.0, 8.0, 14.0]


def test_streams_give_a_path_its_jumps_in_any_batch():
    def some(first, paths):
        streams = ctrl.noise.PathStreams(7, ("jumps",), first)
        return rolled_out(sde_with(PLAIN), paths, generator=streams)

    whole, part = some(0, 40), some(25, 15)
    assert whole.jumps.sum() > 40
    torch.testing.assert_close(whole.jumps[25:], part.jumps, rtol=0, atol=0)
    torch.testing.assert_close(whole.states[25:], part.states, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [ctrl.EulerMaruyama(), ctrl.TorchSDE("euler")])
def test_all_ways_to_roll_out_agree(solver, generator):
    noise = ctrl.Noise(
        *(
            0.5 * torch.randn(64, 4, *event, dtype=torch.float64, generator=generator)
            for event in [(1,)]
        ),
        jumps=torch.randn(64, 4, 1, dtype=torch.float64, generator=generator),
        marks=torch.randn(64, 4, 8, 1, dtype=torch.float64, generator=generator),
    )
    sde = sde_with(PLAIN)
    kept = rolled_out(sde, solver=solver, noise=noise)
    again = rolled_out(sde, solver=solver, noise=noise, differentiable=True)
    end = ctrl.simulate_end(
        problem_of(sde), STILL, kept.states[:, 0], kept.grid, solver, noise=noise
    )
    torch.testing.assert_close(kept.states, again.states)
    torch.testing.assert_close(kept.jumps, again.jumps)
    torch.testing.assert_close(kept.states[:, -1], end)


def test_the_rules_of_marks_have_their_moments():
    like = torch.zeros(1, dtype=torch.float64)
    laws = {
        NormalMarks(0.3, 0.7): 0.3**2 + 0.49,
        ExponentialMarks(0.7): 2 * 0.49,
        DiscreteMarks((2.0, -1.0), (0.2, 0.8)): 1.6,
    }
    for law, second in laws.items():
        weights, marks = law.rule(like)
        assert float(weights @ marks[:, 0].square()) == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize("rate", [-0.5, math.nan, math.inf])
def test_bad_intensities_are_refused_wherever_they_are_used(rate, generator):
    sde = sde_with(ctrl.Jumps(lambda t, x, a: torch.full_like(x[:, 0], rate), sizes, NormalMarks()))
    good = rolled_out(sde_with(PLAIN), generator=generator)
    with pytest.raises(ValueError, match="intensity must be at least 0 and finite"):
        rolled_out(sde, generator=generator)
    with pytest.raises(ValueError, match="intensity must be at least 0 and finite"):
        ctrl.q_learning.q_rates(problem_of(sde), lambda t, x: x[:, 0] ** 2, good)
    with pytest.raises(ValueError, match="intensity must be at least 0 and finite"):
        ctrl.girsanov.path_kl(sde, STILL, STILL, good)


def test_what_is_made_for_continuous_paths_refuses_jumps(generator):
    sde = sde_with(PLAIN)
    paths = rolled_out(sde, generator=generator)
    with pytest.raises(ValueError, match="jumps must be None"):
        ctrl.transitions.log_prob(sde, ctrl.EulerMaruyama(), STILL, paths)
    with pytest.raises(ValueError, match="jumps must be None"):
        ctrl.exploratory_sde(sde, ctrl.GaussianPolicy(STILL.mean, 0.3))
    problem = ctrl.ControlProblem(sde, 1.0)
    with pytest.raises(ValueError, match="jumps must be None"):
        hjb.evaluate_finite_horizon(problem, STILL, (hjb.Axis(-1.0, 1.0, 9),), steps=4)


def test_a_gradient_through_the_intensity_is_refused(generator):
    sde = sde_with(ctrl.Jumps(lambda t, x, a: x[:, 0].square(), sizes, NormalMarks()))
    start = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="numbers of jumps have no derivative"):
        ctrl.simulate(
            problem_of(sde), STILL, start, ctrl.uniform_grid(1.0, 4), generator=generator,
            differentiable=True,
        )  # fmt: skip


def test_noise_without_enough_marks_is_refused(generator):
    increments = torch.zeros(3, 4, 1, dtype=torch.float64)
    many = torch.full((3, 4, 1), 3.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"noise.jumps must be \[paths, steps, 1\]"):
        rolled_out(sde_with(PLAIN), 3, noise=ctrl.Noise(increments))
    few = ctrl.Noise(increments, jumps=many, marks=torch.zeros(3, 4, 2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"noise.marks must be \[paths, steps, 3 or more"):
        rolled_out(sde_with(PLAIN), 3, noise=few)


def test_likelihood_ratios_that_do_not_exist_are_refused(generator):
    by_action = ctrl.Jumps(lambda t, x, a: a[:, 0], sizes, NormalMarks())
    sde = replace(sde_with(by_action), drift=lambda t, x, a: 0 * x)
    one = ctrl.DeterministicPolicy(lambda t, x: torch.ones_like(x))
    paths = ctrl.simulate(
        problem_of(sde), one, torch.zeros(5, 1, dtype=torch.float64), ctrl.uniform_grid(1.0, 4),
        generator=generator,
    )  # fmt: skip
    with pytest.raises(ValueError, match="reference's intensity must be positive"):
        ctrl.girsanov.path_kl(sde, one, STILL, paths)
    with pytest.raises(ValueError, match="must have kept their jumps"):
        ctrl.girsanov.log_ratio(sde, one, one, replace(paths, jumps=None))
    moved = replace(sde, jumps=ctrl.Jumps(intensity, lambda t, x, a, z: a, NormalMarks()))
    with pytest.raises(ValueError, match="move the sizes of jumps"):
        ctrl.girsanov.path_kl(moved, one, STILL, paths)


def test_a_jump_out_of_a_domain_ends_the_path_where_it_leads(generator):
    far = ctrl.Jumps(lambda t, x, a: torch.full_like(x[:, 0], 2.0), lambda t, x, a, z: 5 - x)
    sde = replace(sde_with(far), drift=lambda t, x, a: 0 * x, diffusion=lambda t, x: 0.05)
    problem = ctrl.ControlProblem(sde, 1.0, domain=ctrl.stopping.Interval(-1.0, 1.0))
    start = torch.zeros(500, 1, dtype=torch.float64)
    paths = ctrl.simulate(problem, STILL, start, ctrl.uniform_grid(1.0, 8), generator=generator)
    jumped = paths.jumps[..., 0].sum(1) > 0
    torch.testing.assert_close(paths.terminated, jumped)  # 20 standard deviations to the walls
    assert bool((paths.states[jumped, -1, 0] == 5).all())
    assert not bool(paths.jumps[..., 0][~paths.running].any())
    # the share that never jumps is e^{-2}, within 5 standard deviations
    assert abs(float((~jumped).double().mean()) - math.exp(-2)) < 5 * (0.117 / 500) ** 0.5
