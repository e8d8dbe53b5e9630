"""Tilted regression: weights, where the loss leads, what it costs in samples and in calls."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs.exact import GaussianProblem, gaussian, table
from diffusion_envs.objectives import Rollout, Rows, TiltedRegression
from diffusion_envs.objectives.path_steps import PathLosses
from diffusion_envs.objectives.tilted_regression import tilt_weights
from diffusion_envs.samplers import DDIM
from tests.diffusion_envs.objectives import random_rows
from tests.diffusion_envs.objectives.random_rows import close, column
from tests.diffusion_envs.objectives.resting_points import gained, resting
from tests.diffusion_envs.objectives.small_runs import assert_runs_and_resumes, numbers, trainer


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- weights and loss ----------------------------------------------------------------------------


def test_weights_are_the_tilt_over_its_mean_within_each_prompt(generator):
    rewards = 3 * torch.randn(7, generator=generator, dtype=torch.float64)
    condition = torch.tensor([0, 1, 0, 1, 1, 2, 0])
    weights = tilt_weights(rewards, condition, 0.7).tolist()
    for i in range(7):
        own = [math.exp(rewards[j].item() / 0.7) for j in range(7) if condition[j] == condition[i]]
        mean = sum(own) / len(own)
        assert weights[i] == pytest.approx(math.exp(rewards[i].item() / 0.7) / mean, rel=1e-12)
    moved = rewards + tensor([3.0, -500.0, 0.4])[condition]
    assert tilt_weights(moved, condition, 0.7).tolist() == pytest.approx(weights, rel=1e-9)


def test_every_step_of_a_path_has_its_weight_and_the_effective_share_is_logged(generator):
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)
    condition = torch.tensor([0, 0, 0, 1, 1, 1])
    objective = TiltedRegression(kl_weight=0.4)
    found = objective.advantages(rollout(rewards, condition))
    expected = tilt_weights(rewards, condition, 0.4)
    assert torch.equal(found, expected[:, None].expand(6, 5))
    share = objective.numbers(found)["effective_samples"]
    assert share == pytest.approx(1 / np.mean(np.square(expected.numpy())), rel=1e-12)


def rollout(rewards: Tensor, condition: Tensor) -> Rollout:
    states = rewards.new_zeros(len(rewards), 6, 1)
    return Rollout(
        states=states,
        means=states[:, 1:],
        actions=states[:, 1:],
        noises=states[:, 1:],
        reference_scores=None,
        costs=states[:, 1:, 0],
        values=None,
        rewards=rewards,
        step_sizes=states[0, 1:, 0],
        condition=condition,
    )


@pytest.mark.parametrize("control_variate", [0.0, 1.0, 0.6])
def test_the_loss_is_the_weighted_likelihood_ratio_less_the_control_variate(
    control_variate, generator
):
    """-w log(p_th / p_pre)(x' | x) + c u . z, from the densities' own formula."""
    rows = random_rows.rows(generator, 0.4, kind=Rows)
    rows = Rows(**vars(rows) | {"advantage": rows.advantage.square()})
    found = TiltedRegression(control_variate=control_variate).loss(rows)
    gain, std = column(rows.score_gain), column(rows.std)
    after = gain * rows.old_mean + std * rows.noise  # up to what both means share
    own, pretrained = (
        torch.distributions.Normal(gain * score, std).log_prob(after).flatten(1).sum(1)
        for score in (rows.mean, rows.old_mean)
    )
    shift = gain / std * (rows.mean - rows.old_mean)
    control = control_variate * (shift * rows.noise).flatten(1).sum(1)
    close(found, -rows.advantage * (own - pretrained) + control)


# -- where it leads ------------------------------------------------------------------------------

PROBLEM, SAMPLER = GaussianProblem(), DDIM(0.8).bind(table(), 3)


def optimal_values(kl_weight: float) -> list[gaussian.Quadratic]:
    """V* = kl_weight log E[exp(r / kl_weight) | x_k] of the pretrained chain, up to constants."""
    slope, offset = gaussian.score_coefficients(
        PROBLEM.data, SAMPLER.table, SAMPLER.noising_times[:-1]
    )
    Q, tilt = PROBLEM.quadratic.curvature.numpy(), PROBLEM.quadratic.slope.numpy()
    values = [(Q, tilt)]
    for k in reversed(range(3)):
        F = (
            SAMPLER.state_gain[k].item() * np.eye(2)
            + SAMPLER.score_gain[k].item() * slope[k].numpy()
        )
        f = SAMPLER.score_gain[k].item() * offset[k].numpy()
        # E exp((-y'Qy/2 + l'y) / b), y = m + std z: precision 1 / std^2 + Q / b
        inner = np.linalg.inv(np.eye(2) + SAMPLER.std[k].item() ** 2 / kl_weight * Q)
        Q_m, tilt_m = Q @ inner, inner.T @ tilt
        Q, tilt = F.T @ Q_m @ F, F.T @ (tilt_m - Q_m @ f)
        values.append((Q, tilt))
    zero = tensor(0.0)
    return [gaussian.Quadratic(tensor(Q), tensor(tilt), zero) for Q, tilt in values[::-1]]


@pytest.mark.parametrize("control_variate", [0.0, 1.0])
def test_the_loss_is_least_at_the_optimal_control_of_the_chain(control_variate):
    """Given x the weight's mean is exp(V* / kl_weight) at the next state: by quadrature over z.

    The optimum is that of a recursion over the best shifts of the mean, not of tilted densities.
    """
    kl_weight = 0.6
    objective = TiltedRegression(kl_weight=kl_weight, control_variate=control_variate)
    values = optimal_values(kl_weight)
    # reward per half square of the score's change, where std^2 is that of the mean's
    price = kl_weight * (SAMPLER.score_gain / SAMPLER.std).square()
    gains, shifts, _ = resting(PROBLEM, SAMPLER, price, charged=True)
    slope, offset = gaussian.score_coefficients(
        PROBLEM.data, SAMPLER.table, SAMPLER.noising_times[:-1]
    )
    point, mass = np.polynomial.hermite_e.hermegauss(40)
    z = torch.cartesian_prod(tensor(point), tensor(point))
    masses = torch.cartesian_prod(tensor(mass), tensor(mass)).prod(1) / (2 * math.pi)
    n, x = len(z), tensor([-1.4, 0.9])

    def slope_at(k: int, score: Tensor) -> Tensor:
        """Of the expected loss of step k, in the score at x."""
        pretrained, b, std = slope[k] @ x + offset[k], SAMPLER.score_gain[k], SAMPLER.std[k]
        after = SAMPLER.state_gain[k] * x + b * pretrained + std * z
        weight = (values[k + 1](after) / kl_weight).exp()
        leaf = score.clone().requires_grad_()
        rows = Rows(
            mean=leaf.expand(n, 2),
            old_mean=pretrained.expand(n, 2),
            reference_score=None,
            noise=z,
            advantage=weight / (masses @ weight),
            step_size=SAMPLER.integrated_g2[k].expand(n),
            horizon=SAMPLER.integrated_g2.sum(),
            score_gain=b.expand(n),
            std=std.expand(n),
            kl_factor=SAMPLER.kl_factor,
        )
        return torch.autograd.grad(objective.loss(rows) @ masses, leaf)[0]

    for k in range(3):
        pretrained = slope[k] @ x + offset[k]
        free, best = (slope_at(k, pretrained + u) for u in (0 * x, gains[k] @ x + shifts[k]))
        assert best.norm() < 1e-10 * free.norm()


@pytest.mark.parametrize(("steps", "share"), [(20, 0.844), (50, 0.951), (100, 0.982)])
def test_what_its_optimum_is_worth_where_the_path_kl_is_charged(steps, share):
    sampler = DDIM(1.0).bind(table(), steps)
    price = PROBLEM.kl_weight * (sampler.score_gain / sampler.std).square()
    gains, shifts, _ = resting(PROBLEM, sampler, price, charged=True)
    assert gained(PROBLEM, sampler, gains, shifts) == pytest.approx(share, abs=1e-3)


# -- what it costs in samples --------------------------------------------------------------------


def learned_control(std: float, n: int, nodes: int) -> float:
    """E[mean of w z] over n one-step paths with reward std z and kl_weight 1, over the optimum."""
    point, mass = (tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    z = torch.cartesian_prod(*[point] * n).view(-1, n)
    masses = torch.cartesian_prod(*[mass / mass.sum()] * n).view(-1, n).prod(1)
    group = torch.arange(len(z)).repeat_interleave(n)
    weights = tilt_weights(std * z.flatten(), group, 1.0).view_as(z)
    return (masses @ (weights * z).mean(1)).item() / std


@pytest.mark.parametrize(("n", "nodes", "rel"), [(2, 24, 0.1), (4, 8, 0.05)])
def test_a_linear_rewards_control_is_short_by_one_over_the_effective_samples(n, nodes, rel):
    std = 0.3
    effective = n * math.exp(-(std**2))
    assert 1 - learned_control(std, n, nodes) == pytest.approx(1 / effective, rel=rel)


def test_one_sample_teaches_to_stay():
    assert learned_control(0.7, 1, 24) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_the_control_variate_lowers_the_variance_by_the_share_of_effective_samples(std):
    """In a direction that the reward does not depend on, at the pretrained model."""
    point, mass = (tensor(v) for v in np.polynomial.hermite_e.hermegauss(60))
    z = torch.cartesian_prod(point, point)
    masses = torch.cartesian_prod(mass, mass).prod(1) / (2 * math.pi)
    weight = (std * z[:, 0]).exp()
    weight, ones = weight / (masses @ weight), torch.ones(len(z), dtype=torch.float64)
    variances = []
    for control_variate in (1.0, 0.0):
        mean = torch.zeros_like(z).requires_grad_()
        rows = Rows(
            mean=mean,
            old_mean=torch.zeros_like(z),
            reference_score=None,
            noise=z,
            advantage=weight,
            step_size=ones,
            horizon=ones[0],
            score_gain=ones,
            std=ones,
            kl_factor=1.0,
        )
        loss = TiltedRegression(control_variate=control_variate).loss(rows).sum()
        slope = torch.autograd.grad(loss, mean)[0]
        torch.testing.assert_close(masses @ slope, tensor([-std, 0.0]), rtol=0, atol=1e-10)
        variances.append((masses @ slope[:, 1].square()).item())
    assert 1 - variances[0] / variances[1] == pytest.approx(math.exp(-(std**2)), rel=1e-9)


# -- settings and the loop -----------------------------------------------------------------------

PATHS, STEPS = 12, 4


def test_it_runs_in_the_loop_and_resumes_to_the_same_numbers():
    assert_runs_and_resumes(TiltedRegression(), queries=12)
    assert_runs_and_resumes(TiltedRegression(), queries=12, train_steps=2, minibatches=3, epochs=2)


def test_no_network_call_is_spent_on_the_pretrained_model():
    """A call a step to sample, and one each time that a step is learned from."""
    for epochs in (1, 3):
        log = numbers(trainer(TiltedRegression(), epochs=epochs, minibatches=2), 2)
        each = PATHS * STEPS * (1 + epochs)
        assert [line["network_calls"] for line in log] == [each, 2 * each]
        assert 1 / PATHS <= log[0]["effective_samples"] <= 1


def test_losses_compare_with_the_pretrained_model_also_after_the_weights_moved():
    run = trainer(TiltedRegression(learning_rate=0.1), epochs=3, minibatches=2)
    list(run.updates(2))
    with run._sampling_policy():
        rollout = run.sample().rollout
    losses = run.losses(rollout)
    assert isinstance(losses, PathLosses)
    list(run._improve_adapter(losses, rollout))
    which = torch.cartesian_prod(torch.arange(PATHS), torch.arange(STEPS))
    with torch.no_grad():
        rows = losses.rows(which)
        states = rollout.states[which[:, 0], which[:, 1]]
        with run.environment.pretrained():
            pretrained = run.environment.action(states, which[:, 1], 0 * which[:, 0])
    torch.testing.assert_close(rows.old_mean, pretrained, rtol=1e-5, atol=1e-6)
    assert rows.reference_score is None
    assert (rows.mean - pretrained).abs().max() > 0.05
    fresh = trainer(TiltedRegression())
    fresh.update = 2
    assert torch.equal(rollout.states, fresh.sample().rollout.states)


def test_prompts_of_one_sample_each_are_refused(small_trainer):
    message = "samples must be more than the prompts, as TiltedRegression .* got 3 of 3 prompts"
    with pytest.raises(ValueError, match=message):
        small_trainer(TiltedRegression(), samples=3).step()
    small_trainer(TiltedRegression(), samples=4).step()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kl_weight": 0.0}, "kl_weight"),
        ({"kl_weight": math.nan}, "kl_weight"),
        ({"control_variate": -0.1}, "control_variate"),
        ({"control_variate": math.inf}, "control_variate"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        TiltedRegression(**settings)
