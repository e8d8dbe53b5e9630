"""Direct distributional optimisation: weights, what they cost in samples, and where they lead."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs import exact
from diffusion_envs.exact import GaussianProblem, gaussian
from diffusion_envs.exact.gaussian import Affine, Gaussian, Quadratic
from diffusion_envs.noise_schedules import VPLinear
from diffusion_envs.objectives import (
    DistributionalOptimisation,
    NearTarget,
    NoisedRows,
    Rollout,
)
from diffusion_envs.objectives.distributional import dual_averaging, mean_reward
from diffusion_envs.samplers import DDIM, BoundBlackBox, BoundDDIM, Scheduler


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rollout(rewards: Tensor, condition: Tensor) -> Rollout:
    none = rewards.new_empty(len(rewards), 0, 1)
    return Rollout(
        states=rewards.new_zeros(len(rewards), 1, 1),
        means=none,
        actions=none,
        noises=none,
        reference_scores=none,
        costs=rewards.new_empty(len(rewards), 0),
        values=None,
        rewards=rewards,
        step_sizes=rewards.new_empty(0),
        condition=condition,
    )


# -- weights -------------------------------------------------------------------------------------


def test_of_a_mean_reward_the_weights_are_the_tilt_within_each_prompt(generator):
    rewards = torch.randn(7, generator=generator, dtype=torch.float64)
    condition = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    objective = DistributionalOptimisation(kl_weight=0.7)
    found = objective.advantages(rollout(rewards, condition)).tolist()
    for prompt in range(3):
        members = [i for i in range(7) if condition[i] == prompt]
        terms = [math.exp(rewards[i].item() / 0.7) for i in members]
        for i, term in zip(members, terms, strict=True):
            assert found[i] == pytest.approx(len(members) * term / sum(terms), rel=1e-12)
    moved = rewards + tensor([3.0, -50.0, 0.4])[condition]
    again = objective.advantages(rollout(moved, condition))
    assert again.tolist() == pytest.approx(found, rel=1e-10)
    size = objective.numbers(tensor(found))["effective_samples"]
    assert size == pytest.approx(1 / np.mean(np.square(found)), rel=1e-12)


def test_dual_averaging_finds_the_optimum_of_a_concave_utility(generator):
    """-1/2 (E r - target)^2: stationary where the potential is (target - E_q r) r."""
    rewards = torch.randn(50, generator=generator, dtype=torch.float64)
    for kl_weight in (0.02, 0.3):  # at the first, plain iteration of the map would diverge
        target = rewards.mean().item() + 1.0
        weights = dual_averaging(rewards, NearTarget(target), kl_weight, 2000).numpy()
        r = rewards.numpy()
        slope = (target - weights @ r) / kl_weight
        expected = np.exp(slope * r) / np.exp(slope * r).sum()
        np.testing.assert_allclose(weights, expected, atol=1e-5)
        gained, free = weights @ r - r.mean(), 1.0
        assert 0.5 * free < gained < free  # near the target, and short of it


def test_a_linear_utility_needs_one_round(generator):
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    one, many = (dual_averaging(rewards, mean_reward, 0.7, n) for n in (1, 100))
    torch.testing.assert_close(one, many, rtol=1e-12, atol=0)


# -- how many samples it takes -------------------------------------------------------------------

VALUES, SHARES, KL_WEIGHT = (-1.0, 0.2, 1.1), (0.5, 0.3, 0.2), 0.7


def expected_mean(n: int) -> float:
    """E[sum of weights * reward] over n samples of the law, by counting all of them."""
    total = 0.0
    for first, second in itertools.product(range(n + 1), repeat=2):
        third = n - first - second
        if third < 0:
            continue
        counts = (first, second, third)
        chance = math.factorial(n)
        for count, share in zip(counts, SHARES, strict=True):
            chance *= share**count / math.factorial(count)
        rewards = tensor([v for v, count in zip(VALUES, counts, strict=True) for _ in range(count)])
        weights = dual_averaging(rewards, mean_reward, KL_WEIGHT, 1)
        total += chance * (weights @ rewards).item()
    return total


def test_self_normalised_weights_are_biased_towards_the_pretrained_model_by_1_over_n():
    values, shares = np.array(VALUES), np.array(SHARES)
    w = np.exp(values / KL_WEIGHT)
    w /= shares @ w
    tilted, free = (shares * w) @ values, shares @ values
    assert expected_mean(1) == pytest.approx(free, rel=1e-12)
    lost = [(tilted - expected_mean(n)) / (tilted - free) for n in (2, 4, 8, 16)]
    assert lost == pytest.approx([0.619, 0.311, 0.136, 0.059], abs=1e-3)
    assert 1 / (shares @ w**2) == pytest.approx(0.423, abs=1e-3)  # of the samples are effective
    slope = (shares * w**2) @ (values - tilted)  # of the bias in 1/n
    for n, rel in ((16, 0.3), (64, 0.08)):
        assert n * (tilted - expected_mean(n)) == pytest.approx(slope, rel=rel)


# -- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_weighted_denoising_score_matching(generator):
    rows, event = 5, (2, 3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    alpha = torch.linspace(0.3, 0.9, rows, dtype=torch.float64)
    mean, noise, data, weight = normal(rows, *event), normal(rows, *event), normal(rows, *event), 0
    weight = normal(rows).square()
    made = NoisedRows(
        mean=mean,
        old_mean=mean,
        reference_score=mean,
        state=data,
        data=data,
        noise=noise,
        alpha=alpha,
        sigma=(1 - alpha.square()).sqrt(),
        reward=weight,
        advantage=weight,
    )
    found = DistributionalOptimisation().loss(made)
    for i in range(rows):
        predicted = -math.sqrt(1 - alpha[i].item() ** 2) * mean[i].numpy()
        expected = weight[i].item() * ((predicted - noise[i].numpy()) ** 2).sum()
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("s", [0.05, 0.3, 1.0])
def test_with_many_samples_the_fixed_point_is_the_score_of_the_noised_optimum(s):
    """Given x, exp(r / kl_weight) over the posterior of the data: by quadrature."""
    data = Gaussian(tensor([0.8, -0.5]), tensor([[0.9, 0.35], [0.35, 0.4]]))
    reward = Quadratic(tensor([[0.9, 0.2], [0.2, -0.2]]), tensor([0.6, -0.3]), tensor(0.11))
    schedule, time, x = VPLinear(0.1, 20.0), tensor(s), tensor([-1.4, 0.9])
    step = gaussian.transition(data, schedule, time, tensor(0.0))
    point, mass = np.polynomial.hermite_e.hermegauss(40)
    grid = torch.cartesian_prod(tensor(point), tensor(point))
    masses = torch.cartesian_prod(tensor(mass), tensor(mass)).prod(1)
    samples = step.matrix @ x + step.shift + grid @ torch.linalg.cholesky(step.covariance).T
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    n = len(samples)
    tilted = gaussian.tilt(data, reward, 0.8)

    def slope(score: Tensor) -> Tensor:
        leaf = score.clone().requires_grad_()
        rows = NoisedRows(
            mean=leaf.expand(n, 2),
            old_mean=leaf.detach().expand(n, 2),
            reference_score=leaf.detach().expand(n, 2),
            state=x.expand(n, 2),
            data=samples,
            noise=(x - alpha * samples) / sigma,
            alpha=alpha.expand(n),
            sigma=sigma.expand(n),
            reward=reward(samples),
            advantage=(reward(samples) / 0.8).exp(),
        )
        loss = (DistributionalOptimisation().loss(rows) * masses).sum()
        return torch.autograd.grad(loss, leaf)[0]

    free = slope(gaussian.score(data, schedule, time, x[None])[0])
    best = slope(gaussian.score(tilted, schedule, time, x[None])[0])
    assert best.norm() < 1e-8 * free.norm()


# -- settings and the loop -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kl_weight": 0.0}, "kl_weight"),
        ({"rounds": 0}, "rounds"),
        ({"draws": -1}, "draws"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        DistributionalOptimisation(**settings)


def test_a_utility_that_is_no_function_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(TypeError, match="first_variation"):
        DistributionalOptimisation(first_variation="mean")


@pytest.mark.parametrize("utility", [mean_reward, NearTarget(4.0)])
def test_two_updates_of_the_real_loop(utility, trains):
    made = trains(DistributionalOptimisation(draws=2, first_variation=utility))
    assert made.environment.reward_queries == 24


def test_data_are_always_the_pretrained_models(small_trainer):
    made = small_trainer(DistributionalOptimisation())
    list(made.updates(2))
    with made._sampling_policy():
        sampled = made.sample().rollout
    fresh = small_trainer(DistributionalOptimisation())
    fresh.update = 2
    expected = fresh.sample().rollout
    torch.testing.assert_close(sampled.states, expected.states, rtol=0, atol=0)
    numbers = made.step()
    assert 1 / 12 <= numbers["effective_samples"] <= 1


# -- what the samples' sampler has to do with it ---------------------------------------------------


def generated(problem: GaussianProblem, sampler: BoundDDIM | BoundBlackBox) -> Gaussian:
    """The pretrained model's law of data on a sampler, to the round-off of its float32 score."""
    if isinstance(sampler, BoundDDIM):
        slope, offset = gaussian.score_coefficients(
            problem.data, sampler.table, sampler.noising_times[:-1]
        )
        unit = torch.eye(2, dtype=torch.float64)
        law = Gaussian(torch.zeros(2, dtype=torch.float64), unit)
        for k in range(sampler.steps):
            a, b = sampler.state_gain[k], sampler.score_gain[k]
            step = Affine(a * unit + b * slope[k], b * offset[k], sampler.std[k].square() * unit)
            law = step.after(law)
        return law
    score = problem.environment(sampler, 0).model
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ends = sampler.sample(lambda x, t: score.prediction(x, t.expand(len(x))), points).double()
    root = (ends[1:] - ends[0]).T
    return Gaussian(ends[0], root @ root.T)


def share(problem: GaussianProblem, law: Gaussian, steps: int) -> float:
    """Share of the gain in J that DDIM allows, if its action is the score of the tilted law."""
    sampler = DDIM(1.0).bind(exact.table(), steps)
    best = gaussian.tilt(law, problem.quadratic, problem.kl_weight)
    times = sampler.noising_times[:-1]
    own, pre = (gaussian.score_coefficients(x, sampler.table, times) for x in (best, problem.data))
    gain, shift = (a - b for a, b in zip(own, pre, strict=True))
    found = problem.outcome_of(gain, shift, sampler).objective
    start = problem.outcome_of(0 * gain, 0 * shift, sampler).objective
    return (found - start) / (problem.optimum(sampler).objective - start)


@pytest.mark.parametrize(("steps", "expected"), [(20, 0.9818), (50, 0.9969), (100, 0.9992)])
def test_the_optimum_of_continuous_time_is_nearly_that_of_the_chain(steps, expected):
    """What the method comes to with samples of the data's own law."""
    problem = GaussianProblem()
    assert share(problem, problem.data, steps) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("sampler", "steps", "expected"),
    [
        (DDIM(1.0), 20, 0.8663),
        (DDIM(1.0), 50, 0.9422),
        (DDIM(1.0), 100, 0.9640),
        (Scheduler("DPMSolverMultistepScheduler"), 20, 0.9740),
        (Scheduler("DPMSolverMultistepScheduler"), 50, 0.9824),
    ],
)
def test_a_samplers_error_is_learned_as_if_it_were_the_models(sampler, steps, expected):
    """With any number of samples: the score becomes that of the tilt of what was generated."""
    problem = GaussianProblem()
    law = generated(problem, sampler.bind(exact.table(), steps))
    assert share(problem, law, 20) == pytest.approx(expected, abs=1e-4)
