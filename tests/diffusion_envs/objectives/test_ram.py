"""Reinforce adjoint matching: the formulas, and where its target leads on Gaussian data."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl.noise import stream
from diffusion_envs.denoising import noising_bridge
from diffusion_envs.exact import GaussianProblem, gaussian, table
from diffusion_envs.exact.gaussian import Gaussian, Quadratic
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import NoisedRows, ReinforceAdjointMatching, Rollout
from diffusion_envs.objectives.noised_data import NoisedLosses
from diffusion_envs.samplers import DDIM


def normals(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# -- the objective -------------------------------------------------------------------------------

ROWS, EVENT = 6, (3, 2)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noised(generator: torch.Generator) -> NoisedRows:
    """Any rows: the loss does not ask whether they come from a model."""
    alpha = torch.linspace(0.2, 0.95, ROWS, dtype=torch.float64)
    sigma = (1 - alpha.square()).sqrt()
    data, noise = normals(generator, 2, ROWS, *EVENT)
    return NoisedRows(
        mean=normals(generator, ROWS, *EVENT).requires_grad_(),
        old_mean=normals(generator, ROWS, *EVENT),
        reference_score=normals(generator, ROWS, *EVENT),
        state=alpha.view(-1, 1, 1) * data + sigma.view(-1, 1, 1) * noise,
        data=data,
        noise=noise,
        alpha=alpha,
        sigma=sigma,
        reward=normals(generator, ROWS),
        advantage=normals(generator, ROWS),
        bridge_cost=normals(generator, ROWS).square(),
        bridge_score=normals(generator, ROWS, *EVENT),
    )


def test_the_loss_is_the_published_one_up_to_the_weight_of_the_noise_level(generator):
    """|v_th - v_ref - R (epsilon - x_0 - v_th)|^2 of the flow, over (1 + sigma / alpha)^2."""
    rows = noised(generator)
    found = ReinforceAdjointMatching(kl_weight=0.7).loss(rows)
    for i in range(ROWS):
        a, s = rows.alpha[i].item(), rows.sigma[i].item()
        x, x0, e = (v[i].numpy() for v in (rows.state, rows.data, rows.noise))
        flow = []
        for score in (rows.mean, rows.reference_score):
            epsilon = -s * score[i].detach().numpy()
            flow.append(epsilon - (x - s * epsilon) / a)
        wanted = flow[1] + rows.advantage[i].item() / 0.7 * (e - x0 - flow[0])
        expected = ((flow[0] - wanted) ** 2).sum() / (1 + s / a) ** 2
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_the_target_is_held_fixed(generator):
    """d loss / d score = 2 sigma^2 (score - target), with and without the path cost."""
    for path_cost in (False, True):
        rows = noised(generator)
        ReinforceAdjointMatching(kl_weight=0.7, path_cost=path_cost).loss(rows).sum().backward()
        for i in range(ROWS):
            a, s = rows.alpha[i].item(), rows.sigma[i].item()
            own, reference, e = (
                v[i].detach().numpy() for v in (rows.mean, rows.reference_score, rows.noise)
            )
            wanted = reference + rows.advantage[i].item() / 0.7 * (-e / s - own)
            if path_cost:
                here = -0.5 * np.log(a**2) * ((own - reference) ** 2).sum()
                cost = rows.bridge_cost[i].item() - here
                wanted = wanted - cost * (rows.bridge_score[i].numpy() - own)
            expected = 2 * s**2 * (own - wanted)
            np.testing.assert_allclose(rows.mean.grad[i].numpy(), expected, rtol=1e-12, atol=1e-12)


def rollout(rewards: Tensor, condition: Tensor, data: Tensor | None = None) -> Rollout:
    data = rewards.new_zeros(len(rewards), 1) if data is None else data
    none = data.new_empty(len(data), 0, *data.shape[1:])
    return Rollout(
        states=data[:, None],
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


def test_a_samples_baseline_is_the_mean_of_the_others_of_its_prompt(generator):
    rewards, condition = normals(generator, 5), torch.tensor([0, 1, 0, 2, 0])
    found = ReinforceAdjointMatching().advantages(rollout(rewards, condition)).tolist()
    r = rewards.tolist()
    assert found[0] == pytest.approx(r[0] - (r[2] + r[4]) / 2, rel=1e-12)
    assert found[4] == pytest.approx(r[4] - (r[0] + r[2]) / 2, rel=1e-12)
    assert found[1] == pytest.approx(r[1] - (r[0] + r[2] + r[3] + r[4]) / 4, rel=1e-12)
    moved = ReinforceAdjointMatching().advantages(rollout(rewards + 3.7, condition))
    assert moved.tolist() == pytest.approx(found, rel=1e-10)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kl_weight": 0.0}, "kl_weight"),
        ({"learning_rate": -1.0}, "learning"),
        ({"draws": 0}, "draws"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        ReinforceAdjointMatching(**settings)


@pytest.mark.parametrize("path_cost", [False, True])
def test_two_updates_of_the_real_loop(path_cost, trains):
    made = trains(ReinforceAdjointMatching(draws=2, path_cost=path_cost))
    assert made.environment.reward_queries == 24


# -- the state between ---------------------------------------------------------------------------


def test_the_bridge_is_the_conditional_law_of_the_joint_one():
    """Y_0, Y', Y of standard noising with a free Y_0 of variance 1.7, conditioned by matrices."""
    alpha, ratio = 0.83, 0.6
    noise, more = 1 - alpha**2, 1 - ratio**2
    # Y_0 = sqrt(1.7) z0, Y' = alpha Y_0 + sqrt(noise) z1, Y = ratio Y' + sqrt(more) z2
    root = np.array(
        [
            [1.7**0.5, 0, 0],
            [alpha * 1.7**0.5, noise**0.5, 0],
            [ratio * alpha * 1.7**0.5, ratio * noise**0.5, more**0.5],
        ]
    )
    joint = root @ root.T
    ends = np.ix_([0, 2], [0, 2])
    gain = joint[1, [0, 2]] @ np.linalg.inv(joint[ends])
    variance = joint[1, 1] - gain @ joint[[0, 2], 1]
    for y0, y in ((0.4, -1.3), (-2.0, 0.7)):
        mean, std = noising_bridge(
            tensor(y0), tensor(y), tensor(alpha), tensor(noise**0.5), tensor(ratio)
        )
        assert mean.item() == pytest.approx(gain @ [y0, y], rel=1e-12)
        assert std.item() ** 2 == pytest.approx(variance, rel=1e-12)


def test_a_drawn_bridge_has_the_law_and_the_cost_that_it_should():
    """One sample, 20000 states between: moments of the score, and the expected cost."""
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(table(50), 5)
    environment = problem.environment(sampler, seed=0)
    parameters = environment.model.parameters
    with torch.no_grad():
        parameters[0][0] = tensor([[0.3, -0.1], [0.2, 0.4]])
        parameters[1][0] = tensor([0.5, -0.2])
    draws = 20_000
    one = torch.zeros(1)
    made = rollout(one, one.long(), torch.tensor([[0.9, -0.4]]))
    objective = ReinforceAdjointMatching(draws=draws, path_cost=True)
    update_losses = NoisedLosses(
        environment, objective, made, one, stream(3, "bridge"), nullcontext, batch=10**6
    )
    t = 30
    update_losses.timestep[:] = t
    update_losses.noise[:] = torch.tensor([0.6, -1.1])
    everything = torch.cartesian_prod(torch.arange(1), torch.arange(draws))
    log_abar = sampler.table.alphas_cumprod.log()
    with torch.no_grad():
        cost, score = update_losses._bridge(everything, log_abar, stream(4, "bridge"))
    # by hand: sum over the states before, each with its law, of g^2 h / 2 E|D x + c|^2
    a = sampler.table.alphas_cumprod.sqrt().numpy()
    gain, shift = (p[0].detach().double().numpy() for p in parameters)
    data, noise = np.array([0.9, -0.4]), np.array([0.6, -1.1])
    x = a[t] * data + np.sqrt(1 - a[t] ** 2) * noise
    expected, mean_score, depth = 0.0, np.zeros(2), -2 * np.log(a[t])
    for j in range(t):
        width = 2 * np.log(a[j] / a[j + 1]) - (2 * np.log(a[0]) if j == 0 else 0.0)
        ratio, v = a[t] / a[j], 1 - a[j] ** 2
        slope = ratio * v / (1 - a[t] ** 2)
        mean = a[j] * data + slope * (x - a[t] * data)
        variance = v * (1 - ratio**2) / (1 - a[t] ** 2)
        expected += 0.5 * width * (((gain @ mean + shift) ** 2).sum() + variance * (gain**2).sum())
        mean_score += width / depth * -(x - ratio * mean) / (1 - ratio**2)
    for found, wanted in ((cost[0], expected), *zip(score[0].T, mean_score, strict=True)):
        error = found.double().std().item() / draws**0.5
        assert abs(found.double().mean().item() - wanted) < 5 * error
        assert error < 0.02 * abs(wanted)


# -- the fixed point -----------------------------------------------------------------------------

DATA = Gaussian(tensor([0.8, -0.5]), tensor([[0.9, 0.35], [0.35, 0.4]]))
REWARD = Quadratic(tensor([[0.9, 0.2], [0.2, -0.2]]), tensor([0.6, -0.3]), tensor(0.11))
LINEAR = Quadratic(tensor([[0.0, 0.0], [0.0, 0.0]]), tensor([0.6, -0.3]), tensor(0.11))
KL_WEIGHT = 0.8
STATES = tensor([[0.3, -0.2], [-1.4, 0.9], [1.8, 1.1]])


def rows_at_the_optimum(levels: DDPMTable, t: int, reward: Quadratic, x: Tensor):
    """All (x_0, x') given x under the noised tilt, by quadrature: rows, and their weights.

    x' given x first, then x_0 given x' alone; what is averaged is cubic, two nodes are exact.
    """
    best = gaussian.tilt(DATA, reward, KL_WEIGHT)
    times = torch.arange(1, len(levels.alphas_cumprod) + 1, dtype=torch.float64)
    times = times / len(levels.alphas_cumprod)
    s, before, end = times[t], times[:t], tensor(0.0)
    back = gaussian.transition(best, levels, s.expand(t), before)
    point = tensor([-1.0, 1.0])
    pairs = torch.cartesian_prod(point, point)
    roots = torch.linalg.cholesky(back.covariance)
    between = (back.matrix @ x + back.shift)[:, None] + pairs @ roots.mT  # [t, 4, 2]
    last = gaussian.transition(best, levels, before, end.expand(t))
    ends = torch.einsum("tij,tkj->tki", last.matrix, between) + last.shift[:, None]
    data = ends[:, :, None] + (pairs @ torch.linalg.cholesky(last.covariance).mT)[:, None]
    between = between[:, :, None].expand_as(data)  # [t, 4, 4, 2]
    abar = levels.alphas_cumprod
    width = (abar[:t] / abar[1 : t + 1]).log()
    width[0] -= abar[0].log()
    own, reference = (gaussian.score_coefficients(law, levels, before) for law in (best, DATA))
    slope, offset = (one - other for one, other in zip(own, reference, strict=True))
    gap = torch.einsum("tij,tabj->tabi", slope, between) + offset[:, None, None]
    depth = -abar[t].log()
    kept = (abar[t] / abar[:t]).sqrt().view(-1, 1, 1, 1)
    score = -(x - kept * between) / (1 - kept.square())
    alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
    n = data[..., 0].numel()
    leaf = gaussian.score(best, levels, s, x[None])[0].clone().requires_grad_()
    data = data.reshape(n, 2)
    rows = NoisedRows(
        mean=leaf.expand(n, 2),
        old_mean=leaf.detach().expand(n, 2),
        reference_score=gaussian.score(DATA, levels, s, x[None]).expand(n, 2),
        state=x.expand(n, 2),
        data=data,
        noise=(x - alpha * data) / sigma,
        alpha=alpha.expand(n),
        sigma=sigma.expand(n),
        reward=reward(data),
        advantage=reward(data),
        bridge_cost=(0.5 * depth * gap.square().sum(-1)).reshape(n),
        bridge_score=score.reshape(n, 2),
    )
    weights = (width / depth).view(-1, 1, 1).expand(t, 4, 4).reshape(n) / 16
    return rows, weights, leaf


def error_of_the_target(levels: DDPMTable, t: int, reward: Quadratic, x: Tensor, **settings: Any):
    """How far the mean target is from the optimal score, over how far that is from the model's."""
    rows, weights, leaf = rows_at_the_optimum(levels, t, reward, x)
    objective = ReinforceAdjointMatching(kl_weight=KL_WEIGHT, **settings)
    loss = (objective.loss(rows) * weights).sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    moved = (leaf.detach() - rows.reference_score[0]).norm() * 2 * rows.sigma[0].square()
    return (slope.norm() / moved).item()


SHARES = (0.05, 0.2, 0.4, 0.7, 1.0)  # of the table


def test_with_a_linear_reward_the_optimum_is_a_fixed_point_with_or_without_path_cost():
    levels = table(200)
    for share in SHARES:
        for path_cost in (False, True):
            t = round(200 * share) - 1
            found = error_of_the_target(levels, t, LINEAR, STATES[0], path_cost=path_cost)
            assert found < 1e-10


def test_without_the_path_cost_the_optimum_is_no_fixed_point():
    """A quadratic reward: the target is off by so much of what the score is moved by."""
    levels = table(200)
    found = [
        [error_of_the_target(levels, round(200 * share) - 1, REWARD, x) for share in SHARES]
        for x in STATES
    ]
    # least near the data, where the cost to come is small
    assert [one[0] for one in found] == pytest.approx([0.018, 0.033, 0.032], rel=0.03)
    assert max(found[2]) == pytest.approx(0.424, rel=0.01)
    assert min(min(one[2:]) for one in found) > 0.2


def test_with_the_path_cost_the_optimum_is_the_fixed_point():
    """Up to the spacing of the table, at first order."""
    gaps = []
    for entries in (100, 200, 400):
        levels = table(entries)
        gaps.append(
            max(
                error_of_the_target(levels, round(entries * share) - 1, REWARD, x, path_cost=True)
                for share in SHARES
                for x in STATES
            )
        )
    assert gaps[2] < 0.004
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def test_subtracting_the_cost_from_the_reward_is_not_enough():
    """Then the slope of the bridge itself in the noised state is missing."""
    levels, x = table(200), STATES[1]
    rows, weights, leaf = rows_at_the_optimum(levels, 139, REWARD, x)
    rows = replace(rows, advantage=rows.reward - KL_WEIGHT * rows.bridge_cost)
    loss = (ReinforceAdjointMatching(kl_weight=KL_WEIGHT).loss(rows) * weights).sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    moved = (leaf.detach() - rows.reference_score[0]).norm() * 2 * rows.sigma[0].square()
    assert (slope.norm() / moved).item() == pytest.approx(0.178, rel=0.01)
