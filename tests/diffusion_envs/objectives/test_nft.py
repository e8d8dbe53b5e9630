"""DiffusionNFT: its loss by hand, its fixed point and its bias by quadrature over posteriors."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs.exact import gaussian
from diffusion_envs.exact.gaussian import Gaussian, Quadratic
from diffusion_envs.noise_schedules import VPLinear
from diffusion_envs.objectives import DiffusionNFT, NoisedRows, Rollout
from diffusion_envs.objectives.nft import optimality

ROWS, EVENT = 6, (3, 2, 2)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noised(generator: torch.Generator, **changed: Any) -> NoisedRows:
    """Any rows: the loss does not ask whether they come from a model."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    alpha = torch.linspace(0.2, 0.95, ROWS, dtype=torch.float64)
    data, noise = normal(ROWS, *EVENT), normal(ROWS, *EVENT)
    sigma = (1 - alpha.square()).sqrt()
    wide = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    fields = {
        "mean": normal(ROWS, *EVENT).requires_grad_(),
        "old_mean": normal(ROWS, *EVENT),
        "reference_score": normal(ROWS, *EVENT),
        "state": wide[0] * data + wide[1] * noise,
        "data": data,
        "noise": noise,
        "alpha": alpha,
        "sigma": sigma,
        "reward": normal(ROWS),
        "advantage": 4 * normal(ROWS),
    }
    return NoisedRows(**fields | changed)


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_the_published_one(weighted, generator):
    """In a flow's velocity u = epsilon - x_0, as published: x_0 = x - s u at x = (1 - s) x_0 + s e.

    States are scaled so that signal and noise add up to 1, where that velocity lives.
    """
    rows = noised(generator)
    objective = DiffusionNFT(
        beta=0.3, advantage_clip=3.0, velocity_weight=0.07, draws=1, weighted=weighted
    )
    found = objective.loss(rows).detach().numpy()
    for i in range(ROWS):
        a, s = rows.alpha[i].item(), rows.sigma[i].item()
        x0, x = rows.data[i].numpy().ravel(), rows.state[i].numpy().ravel()
        scores = (rows.mean, rows.old_mean, rows.reference_score)
        eps = [-s * each[i].detach().numpy().ravel() for each in scores]
        flow = [e - (x - s * e) / a for e in eps]
        time, scaled = s / (a + s), x / (a + s)
        plus = 0.3 * flow[0] + 0.7 * flow[1]
        minus = 1.3 * flow[1] - 0.3 * flow[0]
        r = 0.5 + np.clip(rows.advantage[i].item(), -3, 3) / 6
        total = 0.0
        for share, u in ((r, plus), (1 - r, minus)):
            error = scaled - time * u - x0
            weight = 1 / max(np.abs(error).mean(), 1e-5) if weighted else 1.0
            total += share * weight * (error**2).mean()
        velocity = [a * e - s * (x - s * e) / a for e in eps]
        strayed = ((velocity[0] - velocity[2]) ** 2).mean()
        assert found[i] == pytest.approx(3 * total / 0.3 + 0.07 * strayed, rel=1e-12)


def test_no_gradient_flows_through_the_weights(generator):
    """The gradient of a row is that of the same loss with the weights as numbers."""
    rows = noised(generator)
    objective = DiffusionNFT(velocity_weight=0.0)
    objective.loss(rows).sum().backward()
    a, s = (v.view(-1, 1, 1, 1) for v in (rows.alpha, rows.sigma))
    leaf = rows.mean.detach().clone().requires_grad_()
    new = (rows.state + s**2 * leaf) / a
    old = (rows.state + s**2 * rows.old_mean) / a
    r = optimality(rows.advantage, 5.0)
    total = 0.0
    for share, x0_hat in ((r, new), (1 - r, 2 * old - new)):
        error = (x0_hat - rows.data).flatten(1)
        weight = 1 / error.detach().abs().mean(1)
        total = total + 5 * (share * weight * error.square().mean(1)).sum()
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(rows.mean.grad, expected, rtol=1e-12, atol=1e-12)


def test_weights_of_exact_predictions_stay_finite(generator):
    rows = noised(generator)
    a, s = (v.view(-1, 1, 1, 1) for v in (rows.alpha, rows.sigma))
    right = (a * rows.data - rows.state) / s**2
    rows = replace(rows, mean=right.clone().requires_grad_(), old_mean=right)
    loss = DiffusionNFT().loss(rows)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(rows.mean.grad).all())


# -- advantages ----------------------------------------------------------------------------------


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


def test_advantages_have_mean_0_within_a_prompt_and_do_not_see_scale_or_level(generator):
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    condition = torch.arange(12) // 2 % 3
    found = DiffusionNFT().advantages(rollout(rewards, condition))
    for prompt in range(3):
        assert abs(found[condition == prompt].mean()) < 1e-14
    shifted = 7.3 * rewards + tensor([3.0, -50.0, 0.4])[condition]
    again = DiffusionNFT().advantages(rollout(shifted, condition))
    # prompts' levels are taken out, and one factor is left for all prompts
    torch.testing.assert_close(again / again.norm(), found / found.norm(), rtol=1e-10, atol=1e-12)
    one = condition == 1
    centred = rewards[one] - rewards[one].mean()
    std = ((rewards - rewards.sum() / 12).square().sum() / 12).sqrt()  # the population's
    torch.testing.assert_close(found[one], centred / (std + 1e-4), rtol=1e-12, atol=0)


def test_advantages_are_those_that_the_published_tracker_gives():
    """Two prompts of two: means of each, numpy's standard deviation of all, plus 1e-4."""
    rewards, condition = tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 1, 1])
    advantage = DiffusionNFT().advantages(rollout(rewards, condition))
    published = np.array([-0.5, 0.5, -2.0, 2.0]) / (np.std(rewards.numpy()) + 1e-4)
    assert np.abs(advantage.numpy() - published).max() < 1e-15
    assert advantage[3].item() == pytest.approx(0.745976, abs=1e-6)  # 2 / (sqrt(7.1875) + 1e-4)


def test_equal_rewards_teach_nothing():
    equal = rollout(torch.full((4,), 0.1, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
    found = DiffusionNFT().advantages(equal)
    assert torch.equal(found, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(optimality(found, 5.0), torch.full((4,), 0.5, dtype=torch.float64))


def test_optimality_lies_between_0_and_1():
    found = optimality(tensor([-math.inf, -7.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0)
    torch.testing.assert_close(found, tensor([0.0, 0.0, 0.0, 0.5, 0.75, 1.0, 1.0]), rtol=0, atol=0)


def published_decay(optimiser_steps: int) -> float:
    """After an update, in the authors' code: 0.001 for each optimiser step so far, at most 0.5."""
    return min(0.001 * optimiser_steps, 0.5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampling_policy_keeps_as_much_of_itself_as_published(steps):
    """One optimiser step an update, or several with the rate times as large."""
    objective = DiffusionNFT(old_decay_rate=1e-3 * steps)
    for update in (0, 1, 99, 166, 499, 9000):
        expected = published_decay(steps * (update + 1))
        assert objective.old_decay(update) == pytest.approx(expected, rel=1e-12)
    assert DiffusionNFT().old_decay(0) == 0.001


def test_after_an_update_the_sampling_policy_is_that_share_of_its_old_self(small_trainer):
    made = small_trainer(DiffusionNFT(draws=2, old_decay_rate=0.2, most_old_decay=0.3))
    kept = [p.detach().clone() for p in made.parameters]
    for share in (0.2, 0.3, 0.3):
        list(made.updates(made.update + 1))
        for old, before, now in zip(made.old, kept, made.parameters, strict=True):
            torch.testing.assert_close(old, share * before + (1 - share) * now.detach())
            assert not torch.equal(before, now)
        kept = [p.clone() for p in made.old]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"beta": 0.0}, "beta"),
        ({"advantage_clip": math.inf}, "advantage_clip"),
        ({"velocity_weight": -1.0}, "velocity_weight"),
        ({"most_old_decay": 1.0}, "most_old_decay"),
        ({"old_decay_rate": -1e-3}, "old_decay_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"draws": 0}, "draws"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        DiffusionNFT(**settings)


# -- fixed point and bias, on Gaussian data ------------------------------------------------------

DATA = Gaussian(tensor([0.8, -0.5]), tensor([[0.9, 0.35], [0.35, 0.4]]))
SCHEDULE = VPLinear(0.1, 20.0)
STATES = tensor([[0.3, -0.2], [-1.4, 0.9], [1.8, 1.1]])
TIMES = (0.05, 0.2, 0.4, 0.7, 1.0)
BETA, CLIP = 0.4, 2.0


def posterior_rows(reward: Quadratic, s: float, x: Tensor, nodes: int = 24):
    """x_0 given x on a quadrature rule: rows of the same state, and their weights."""
    time = tensor(s)
    step = gaussian.transition(DATA, SCHEDULE, time, tensor(0.0))
    point, weight = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.cartesian_prod(tensor(point), tensor(point))
    weights = torch.cartesian_prod(tensor(weight), tensor(weight)).prod(1)
    root = torch.linalg.cholesky(step.covariance)
    data = step.matrix @ x + step.shift + grid @ root.T
    alpha, sigma = SCHEDULE.alpha(time), SCHEDULE.sigma(time)
    old = gaussian.score(DATA, SCHEDULE, time, x[None])[0]
    leaf = old.clone().requires_grad_()

    def all_of(value: Tensor) -> Tensor:
        return value.expand(len(data), *value.shape)

    rows = NoisedRows(
        mean=all_of(leaf),
        old_mean=all_of(old),
        reference_score=all_of(old),
        state=all_of(x),
        data=data,
        noise=(x - alpha * data) / sigma,
        alpha=all_of(alpha),
        sigma=all_of(sigma),
        reward=reward(data),
        advantage=reward(data),
    )
    return rows, weights / weights.sum(), leaf


def slope_of_expected_reward(reward: Quadratic, s: float, x: Tensor) -> Tensor:
    """grad_x E[r(x_0) | x], by the closed form of Gaussian posteriors."""
    step = gaussian.transition(DATA, SCHEDULE, tensor(s), tensor(0.0))
    return reward.before(step).gradient(x)


def descent(objective: DiffusionNFT, rows: NoisedRows, weights: Tensor, leaf: Tensor) -> Tensor:
    """Exact expectation of minus the loss's gradient in the score at x."""
    (found,) = torch.autograd.grad((objective.loss(rows) * weights).sum(), leaf)
    return -found


UNCLIPPED = 100.0  # wider than any reward here: r is affine in it, and quadrature exact


@pytest.mark.parametrize("s", TIMES)
def test_without_weights_the_fixed_point_is_the_rewards_conditional_slope(s):
    """score = score_old + (2 / beta) grad E_old[r | x], here for a quadratic reward."""
    reward = Quadratic(tensor([[0.9, 0.2], [0.2, -0.2]]), tensor([0.6, -0.3]), tensor(0.11))
    objective = DiffusionNFT(
        beta=BETA, advantage_clip=UNCLIPPED, velocity_weight=0.0, weighted=False
    )
    for x in STATES:
        rows, weights, leaf = posterior_rows(reward, s, x, nodes=4)
        slope = slope_of_expected_reward(reward, s, x) / (2 * UNCLIPPED)  # of the optimality
        away = descent(objective, rows, weights, leaf)
        best = rows.old_mean + (2 / BETA) * slope
        moved = replace(rows, mean=best + 0 * leaf + (leaf - leaf.detach()))
        assert descent(objective, moved, weights, leaf).norm() < 1e-11 * away.norm()


def test_for_a_linear_reward_the_fixed_point_is_the_noised_tilt():
    """The old law tilted by exp(2 r / beta): at every level the loss asks for its score."""
    reward = Quadratic(tensor([[0.0, 0.0], [0.0, 0.0]]), tensor([0.6, -0.3]), tensor(0.11))
    objective = DiffusionNFT(
        beta=BETA, advantage_clip=UNCLIPPED, velocity_weight=0.0, weighted=False
    )
    tilted = gaussian.tilt(DATA, reward, BETA * UNCLIPPED)  # r = 1/2 + reward / (2 UNCLIPPED)
    for s in TIMES:
        rows, weights, leaf = posterior_rows(reward, s, STATES[1], nodes=4)
        away = descent(objective, rows, weights, leaf)
        best = gaussian.score(tilted, SCHEDULE, tensor(s), STATES[1][None])
        moved = replace(rows, mean=best + (leaf - leaf.detach()).expand_as(rows.mean))
        assert descent(objective, moved, weights, leaf).norm() < 1e-10 * away.norm()


def test_the_first_step_improves_the_policy_and_the_weights_bend_it():
    """Angle to grad E[r | x]: 0 without weights; with them this many degrees.

    A change of the score that rises with grad V = grad E_old[r | x] everywhere raises the expected
    reward, by E int g^2 grad V . change dt at first order (performance difference).
    """
    reward = Quadratic(tensor([[0.0, 0.0], [0.0, 0.0]]), tensor([0.6, -0.3]), tensor(0.11))
    bent = []
    for s in TIMES:
        slope = slope_of_expected_reward(reward, s, STATES[0])
        angles = []
        for weighted in (False, True):
            objective = DiffusionNFT(
                beta=BETA, advantage_clip=UNCLIPPED, velocity_weight=0.0, weighted=weighted
            )
            rows, weights, leaf = posterior_rows(reward, s, STATES[0], nodes=64)
            step = descent(objective, rows, weights, leaf)
            cosine = (step @ slope / step.norm() / slope.norm()).item()
            angles.append(math.degrees(math.acos(min(1.0, cosine))))
        assert angles[0] < 1e-4  # round-off of an arc cosine at 1
        bent.append(angles[1])
    # at s = 0.05, 0.2, 0.4, 0.7, 1: the quadrature of a size, which has a kink, is good to 1 %
    assert bent == pytest.approx([0.69, 5.5, 7.4, 7.5, 7.5], rel=0.03)


def test_two_updates_of_the_real_loop(trains):
    made = trains(DiffusionNFT(draws=2))
    assert made.environment.reward_queries == 24
