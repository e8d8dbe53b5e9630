"""Generated laws against the problems' own judgement, against sampling, and against the limits."""

import dataclasses
import math

import pytest
import torch

from benchmarks import exact_laws
from benchmarks.exact_laws import Correction
from ctrl import DeterministicPolicy
from ctrl.noise import stream
from diffusion_envs.exact import (
    GaussianProblem,
    MixtureProblem,
    NeuralCorrection,
    table,
)
from diffusion_envs.exact.gaussian import Gaussian
from diffusion_envs.exact.problems import gaussian_kl
from diffusion_envs.samplers import DDIM, Scheduler

TABLE = table()
CHAIN = DDIM(1.0).bind(TABLE, 12)
BLACK_BOXES = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler")


def trained(problem):
    """A score with a correction that is not zero."""
    environment = problem.environment(CHAIN, seed=3)
    parameters = environment.model.parameters
    for index, parameter in enumerate(parameters):
        with torch.no_grad():
            drawn = torch.randn(parameter.shape, generator=stream(5, "weights", index))
            parameter.add_(0.05 * drawn)
    return environment.model


def test_the_gaussian_chain_is_judged_as_by_the_problem_itself():
    problem = GaussianProblem()
    score = trained(problem)
    found, expected = exact_laws.evaluate(problem, score, CHAIN), problem.evaluate(score, CHAIN)
    # the score's own eigenvalues are float32: 6e-8 relative, over 12 steps
    assert found.reward == pytest.approx(expected.reward, rel=1e-5, abs=1e-6)
    assert found.path_kl == pytest.approx(expected.path_kl, rel=1e-5)
    assert found.kl_to_chain == pytest.approx(expected.kl_to_optimum, rel=1e-5)


def test_the_mixture_chain_is_judged_as_by_the_problem_itself():
    problem = MixtureProblem(points=201)
    score = trained(problem)
    found, expected = exact_laws.evaluate(problem, score, CHAIN), problem.evaluate(score, CHAIN)
    # there the correction is evaluated in float32; measured: up to 2e-5
    assert found.reward == pytest.approx(expected.reward, rel=1e-4)
    assert found.path_kl == pytest.approx(expected.path_kl, rel=1e-4)
    assert found.kl_to_chain == pytest.approx(expected.kl_to_optimum, rel=1e-4)


@pytest.mark.parametrize("kind", BLACK_BOXES)
def test_a_deterministic_solver_maps_any_start_as_the_law_says(kind, generator):
    problem, sampler = GaussianProblem(), Scheduler(kind).bind(TABLE, 10)
    score = exact_laws.in_float64(trained(problem))
    with torch.no_grad():
        run = lambda x: exact_laws.run_black_box(score, sampler, x)
        matrix, shift = exact_laws.affine_map(run, 2, 1e-5)
        starts = torch.randn(50, 2, dtype=torch.float64, generator=generator)
        law = exact_laws.generated(score, sampler, 2)
        # the schedulers compute in float32
        torch.testing.assert_close(run(starts), starts @ matrix.T + shift, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(law.covariance, matrix @ matrix.T)
    torch.testing.assert_close(law.mean, shift)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_the_loop_have_the_law_that_is_judged(eta):
    problem, sampler = GaussianProblem(), DDIM(eta).bind(TABLE, 10)
    environment = problem.environment(sampler, seed=3)
    parameters = environment.model.parameters
    score = trained(problem)
    with torch.no_grad():
        others = score.correction.parameters()
        for parameter, value in zip(parameters, others, strict=True):
            parameter.copy_(value)
        law = exact_laws.generated(exact_laws.in_float64(score), sampler, 2)
    count = 2000
    sample = environment.sample(
        lambda mean, sigma: DeterministicPolicy(mean),
        range(count),
        torch.zeros(count).long(),
        stream="t",
    )
    ends = sample.rollout.states[:, -1].double()
    # five standard errors of a mean and of a covariance
    error = (law.covariance.diagonal() / count).sqrt()
    assert bool(((ends.mean(0) - law.mean).abs() < 5 * error).all())
    spread = law.covariance.diagonal().max() * math.sqrt(2 / count)
    assert bool(((ends.T.cov() - law.covariance).abs() < 5 * spread).all())


def test_what_is_not_affine_is_refused():
    with pytest.raises(ValueError, match="affine"):
        exact_laws.affine_map(lambda x: x.square(), 2, 1e-9)


@pytest.mark.parametrize("problem", [GaussianProblem(), MixtureProblem()], ids=["gauss", "mix"])
def test_the_optimum_generates_the_target_as_steps_grow(problem):
    score = exact_laws.optimal_score(problem, TABLE)
    few, more = (
        exact_laws.evaluate(problem, score, DDIM(0.0).bind(TABLE, steps)).kl_to_target
        for steps in (20, 40)
    )
    # from data to target it is about 0.9 nats; moments err by O(1 / steps), the KL by its square
    assert 0 < more < 0.01
    assert 3.3 < few / more < 4.5


def test_the_mixture_optimum_is_the_gradient_of_the_log_of_the_tilt():
    problem = MixtureProblem()
    score = exact_laws.optimal_score(problem, TABLE)
    alpha = torch.tensor([0.3, 0.7, 0.95], dtype=torch.float64)
    x = torch.tensor([[0.4], [-0.9], [1.2]], dtype=torch.float64)
    data = torch.linspace(-6, 6, 24001, dtype=torch.float64)  # the reward is known everywhere
    log_mass = exact_laws.log_target(problem, data)

    def noised(states):
        gap = states - alpha[:, None] * data
        return torch.logsumexp(log_mass - 0.5 * gap.square() / (1 - alpha[:, None] ** 2), 1)

    (expected,) = torch.autograd.grad(noised(x.requires_grad_()).sum(), x)
    pretrained = problem.exact_score(x.detach(), alpha, (1 - alpha**2).sqrt())
    found = pretrained + score.correction(x.detach(), alpha)
    # the normaliser of the problem's grid drops out; the quadrature has 48 nodes a component
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_pushed_density_is_that_of_an_affine_map():
    """On a scalar problem whose answer the Gaussian formulas know."""
    problem = MixtureProblem(weights=(1.0,), means=(0.4,), stds=(0.6,))
    score = exact_laws.pretrained_score(problem, TABLE)
    sampler = DDIM(0.0).bind(TABLE, 20)
    found = exact_laws.evaluate(problem, score, sampler)
    law = exact_laws.generated(score, sampler, 1)
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    std = float(law.covariance[0, 0].sqrt())
    log_density = -0.5 * ((x - law.mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
    gap = log_density.exp() * (log_density - exact_laws.log_target(problem, x))
    assert found.kl_to_target == pytest.approx(float(gap.sum() * (x[1] - x[0])), rel=1e-4)
    reward = log_density.exp() @ problem.reward(x[:, None], ["-"] * len(x)) * (x[1] - x[0])
    assert found.reward == pytest.approx(float(reward), rel=1e-6)


def test_a_map_that_folds_has_no_kl_but_a_reward():
    problem = MixtureProblem()
    folding = Correction(lambda x, alpha: 40 * torch.sin(6 * x))
    score = exact_laws.pretrained_score(problem, TABLE)
    folded = dataclasses.replace(score, correction=folding)
    found = exact_laws.evaluate(problem, folded, DDIM(0.0).bind(TABLE, 10))
    assert math.isnan(found.kl_to_target)
    assert math.isfinite(found.reward)


def test_the_table_of_the_optimum_is_the_optimum_on_its_own_chain():
    problem = GaussianProblem()
    best = problem.optimum(CHAIN)
    for elsewhere in ("nearest", "zero"):
        score = exact_laws.table_of_optimum(problem, CHAIN, elsewhere=elsewhere)
        found = exact_laws.evaluate(problem, score, CHAIN)
        assert found.reward == pytest.approx(best.reward, rel=1e-6)
        assert found.path_kl == pytest.approx(best.path_kl, rel=1e-6)
        assert abs(found.kl_to_chain) < 1e-9


def test_a_correction_answers_in_float64():
    generator = torch.Generator().manual_seed(0)
    score = exact_laws.pretrained_score(MixtureProblem(), TABLE)
    neural = dataclasses.replace(score, correction=NeuralCorrection(1, generator=generator))
    states = torch.ones(2, 1, dtype=torch.float64)
    assert exact_laws.in_float64(neural)(states, torch.tensor([3, 5])).dtype == torch.float64


def test_the_regret_is_the_kl_to_the_target():
    problem = GaussianProblem()
    target = exact_laws.target_of(problem)
    law = Gaussian(target.mean + 0.1, 1.2 * target.covariance)

    def free(p):
        nats = gaussian_kl(p, problem.data)
        return float(problem.quadratic.expectation(p)) - problem.kl_weight * nats

    regret = problem.kl_weight * gaussian_kl(law, target)
    assert free(target) - free(law) == pytest.approx(regret, rel=1e-9)
