"""The exact problems against each other, against sampling, and against theory's limits."""

import dataclasses

import pytest
import torch

from diffusion_envs.exact import (
    CosineReward,
    GaussianProblem,
    MixtureProblem,
    QuadraticReward,
    gaussian,
    log_normaliser,
    table,
)
from diffusion_envs.exact.gaussian import Quadratic
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.samplers import DDIM

SAMPLER = DDIM(1.0).bind(table(), 12)
SCALAR_DATA = (0.4, 0.6)  # mean, std of the one-component mixture


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def quadratic(curvature=0.5, slope=0.7):
    return Quadratic(scalar([[curvature]]), scalar([slope]), scalar(0.0))


def one_component():
    """A mixture of one normal and a quadratic reward: the other class knows it in closed form."""
    mean, std = SCALAR_DATA
    return MixtureProblem((1.0,), (mean,), (std,), QuadraticReward(quadratic()))


class ScalarGaussian(GaussianProblem):
    @property
    def data(self):
        mean, std = SCALAR_DATA
        return gaussian.Gaussian(scalar([mean]), scalar([[std**2]]))

    @property
    def quadratic(self):
        return quadratic()


def test_the_grid_agrees_with_the_closed_form():
    by_grid = one_component().optimum(SAMPLER)
    exact = ScalarGaussian(mean=(0.0,)).optimum(SAMPLER)
    # the grid's error is O(spacing^2): 1.6e-4 here, times a curvature of order 1
    assert by_grid.reward == pytest.approx(exact.reward, abs=5e-4)
    assert by_grid.path_kl == pytest.approx(exact.path_kl, abs=5e-4)


@pytest.mark.parametrize("problem", [GaussianProblem(), MixtureProblem()], ids=["gauss", "mix"])
def test_nothing_beats_the_optimum_and_the_pretrained_model_costs_nothing(problem, generator):
    environment = problem.environment(SAMPLER, seed=0)
    parameters = environment.model.parameters
    best = problem.optimum(SAMPLER)
    start = problem.evaluate(environment.model, SAMPLER)
    assert start.path_kl == pytest.approx(0, abs=1e-12)
    assert best.kl_to_optimum == pytest.approx(0, abs=1e-9)
    assert start.objective < best.objective
    for _ in range(5):
        with torch.no_grad():
            for p in parameters:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        moved = problem.evaluate(environment.model, SAMPLER)
        assert moved.objective < best.objective
        assert moved.kl_to_optimum > 0
        assert moved.path_kl > 0


@pytest.mark.parametrize("problem", [GaussianProblem(), MixtureProblem()], ids=["gauss", "mix"])
def test_the_exact_judgement_is_that_of_samples(problem, generator):
    environment = problem.environment(SAMPLER, seed=3)
    parameters = environment.model.parameters
    with torch.no_grad():
        for p in parameters:
            p.add_(0.08 * torch.randn(p.shape, generator=generator))
    exact = problem.evaluate(environment.model, SAMPLER)
    drawn = evaluate(environment, 4000, batch=4000)
    for values, expected in ((drawn.rewards, exact.reward), (drawn.path_kl, exact.path_kl)):
        error = float(values.std() / len(values) ** 0.5)
        assert abs(float(values.mean()) - expected) < 5 * error + 1e-6


def test_the_optimum_tends_to_the_tilt_of_a_memoryless_model():
    """J* tends to kl_weight log E exp(r / kl_weight) with the step, here at first order."""
    problem = MixtureProblem()
    limit = log_normaliser(problem)
    gaps = [problem.optimum(DDIM(1.0).bind(table(), n)).objective - limit for n in (50, 100, 200)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.35 * gaps[0]
    problem = GaussianProblem()
    tilted = gaussian.tilt(problem.data, problem.quadratic, problem.kl_weight)
    law = problem.best_law(DDIM(1.0).bind(table(), 500))
    torch.testing.assert_close(law.mean, tilted.mean, rtol=0.05, atol=0.05)


def test_the_mixtures_optimum_is_that_of_the_chain_and_the_weight_in_question():
    """Kept optima are not those of another noise table, nor of another weight."""
    problem = MixtureProblem(points=201)
    problem.optimum(SAMPLER)
    milder = DDIM(1.0).bind(table(most=12.0), SAMPLER.steps)
    assert problem.optimum(milder) == MixtureProblem(points=201).optimum(milder)
    dearer = dataclasses.replace(problem, kl_weight=1.5)
    fresh = MixtureProblem(points=201, kl_weight=1.5)
    assert dearer.optimum(SAMPLER) == fresh.optimum(SAMPLER)


def test_the_exact_score_of_one_component_is_the_gaussian_one():
    mean, std = SCALAR_DATA
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    alpha, sigma = torch.full((9,), 0.6), torch.full((9,), 0.8)
    expected = -(x - 0.6 * mean) / (0.36 * std**2 + 0.64)
    found = one_component().exact_score(x, alpha.double(), sigma.double())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_rewards_have_gradients():
    x = torch.tensor([[0.3], [1.1]], dtype=torch.float64, requires_grad=True)
    for reward in (QuadraticReward(quadratic()), CosineReward()):
        (slope,) = torch.autograd.grad(reward(x, ["-", "-"]).sum(), x)
        assert bool((slope != 0).all())


def test_predictions_at_fractional_timesteps_lie_between():
    environment = GaussianProblem().environment(SAMPLER, seed=0)
    x = torch.tensor([[0.3, -0.2]])
    low, mid, high = (
        environment.model.prediction(x, torch.tensor([t])) for t in (300.0, 300.5, 301.0)
    )
    assert bool(((mid - low) * (high - mid) >= 0).all())
    whole = environment.model.prediction(x, torch.tensor([300]))
    torch.testing.assert_close(low, whole)


def test_values_on_the_grid_are_the_expected_reward_of_the_law_that_is_carried(generator):
    problem, sampler = MixtureProblem(points=201), DDIM(1.0).bind(table(), 7)
    changes = 0.4 * torch.randn(7, 201, dtype=torch.float64, generator=generator)
    values = problem.values_of(changes, sampler)
    law, _ = problem.law_of(changes, sampler)
    start = torch.exp(-0.5 * problem.grid.square())
    assert values.shape == (8, 201)
    assert float(start / start.sum() @ values[0]) == pytest.approx(float(law @ problem.rewards))
    assert torch.equal(values[-1], problem.rewards)
