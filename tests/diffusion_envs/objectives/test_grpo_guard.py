"""GRPO-Guard, against formulas written out in numpy and the exact gradient of a solvable model."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs import exact
from diffusion_envs.exact import GaussianProblem
from diffusion_envs.noise_schedules import FlowTable
from diffusion_envs.objectives import GRPOGuard
from diffusion_envs.objectives.grpo_guard import GuardRows
from diffusion_envs.objectives.path_steps import Steps
from diffusion_envs.samplers import DDIM, FlowSDE
from tests.diffusion_envs.objectives import one_coordinate as one
from tests.diffusion_envs.objectives.random_rows import close, rows
from tests.diffusion_envs.objectives.resting_points import gained, resting_per_std
from tests.diffusion_envs.objectives.small_runs import share_gained, trainer

ROWS = 9


def guarded(generator: torch.Generator, moved: float) -> GuardRows:
    scale, weight = 0.2 + torch.rand(2, ROWS, generator=generator, dtype=torch.float64)
    return rows(generator, moved, kind=GuardRows, count=ROWS, scale=scale, weight=weight)


# -- the loss -------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_normalised_ratio(generator):
    """RatioNorm as the released code has it: the log-ratio plus its bias, times a scale."""
    r = guarded(generator, moved=0.1)
    gain = (r.score_gain / r.std).numpy()[:, None]
    assert r.reference_score is not None
    actions = (r.mean, r.old_mean, r.reference_score)
    new, old, pre = (gain * a.detach().numpy().reshape(ROWS, -1) for a in actions)
    z, a = r.noise.numpy().reshape(ROWS, -1), r.advantage.numpy()
    scale, weight = r.scale.numpy(), r.weight.numpy()
    log_ratio = (-0.5 * (old + z - new) ** 2 + 0.5 * z**2).sum(1)
    exponent = scale * (log_ratio + 0.5 * ((new - old) ** 2).sum(1))
    ratio, low, high = np.exp(exponent), math.exp(-0.1), math.exp(0.1)
    policy = np.maximum(-a * ratio, -a * np.clip(ratio, low, high))
    objective = GRPOGuard(kl_weight=0.7, clip=0.1)
    loss = objective.loss(r)
    expected = weight * policy + 0.7 * 0.5 * ((new - pre) ** 2).sum(1)
    close(loss.detach(), torch.from_numpy(expected))
    outside = (ratio < low) | (ratio > high)
    held = ((a > 0) & (ratio > high)) | ((a < 0) & (ratio < low))
    assert 0 < held.sum() < outside.sum() < ROWS
    close(objective.clipped(r), torch.from_numpy(outside.astype(float)))
    (found,) = torch.autograd.grad(loss.sum(), r.mean)
    rate = -(~held * weight * scale * ratio * a)[:, None] * z + 0.7 * (new - pre)
    close(found.flatten(1), torch.from_numpy(rate * gain))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("excess", "held"), [(-1e-9, False), (1e-9, True)])
def test_the_clip_is_on_the_normalised_log_ratio(sign, excess, held):
    """A shift of two standard deviations, scale 1/4: the exponent is z / 2."""
    z = sign * torch.tensor([2 * (0.4 + excess), -9.0], dtype=torch.float64)
    half = torch.full((2,), 0.25, dtype=torch.float64)
    r = one.rows(GuardRows, z, 2.0, torch.full((2,), sign * 0.3), scale=half, weight=half)
    slope = one.slope(GRPOGuard(clip=0.4), r)
    assert (slope[0] == 0) == held
    assert slope[1] != 0
    assert GRPOGuard(clip=0.4).clipped(r).tolist() == [float(held), 1.0]


# -- scales and weights ---------------------------------------------------------------------------


def tables(sampler) -> tuple[Tensor, Tensor]:
    """Scale and weight of every step, from rows that the objective makes."""
    rollout = trainer(GRPOGuard(group=4)).sample().rollout  # its type alone is read
    step = torch.arange(len(sampler.std))
    common = one.rows(one.Rows, step.double(), 0.0, step)
    made = GRPOGuard().rows(common, Steps(rollout, sampler, 0 * step, step, 1, None, None))
    return made.scale.double(), made.weight.double()


@pytest.mark.parametrize(
    "sampler",
    [DDIM(0.7).bind(exact.table(), 6), FlowSDE(0.7).bind(FlowTable(shift=3.0), 10)],
    ids=["ddim", "flow"],
)
def test_the_weights_are_std_over_time_with_mean_one(sampler):
    scale, weight = tables(sampler)
    expected = (sampler.std / sampler.std.mean(), sampler.std / sampler.grid.steps)
    torch.testing.assert_close(scale, expected[0], rtol=1e-6, atol=0)
    u = scale * weight
    torch.testing.assert_close(u, expected[1] / expected[1].mean(), rtol=1e-6, atol=0)
    assert u.mean().item() == pytest.approx(1.0, rel=1e-6)


def test_on_a_flow_the_velocitys_weight_does_not_depend_on_the_step():
    """std = sigma_t sqrt(h); what is left is 1 + sigma_t^2 (1 - t) / (2 t), for t < 1."""
    sampler = FlowSDE(0.7).bind(FlowTable(shift=3.0), 10)
    scale, weight = tables(sampler)
    t, h = sampler.noising_times[1:-1], sampler.grid.steps[1:]
    velocity = (sampler.gain * sampler.noising_times[:-1] / sampler.std)[1:]  # v = (x - x0) / t
    found = (scale * weight)[1:] * velocity
    variance = 0.7**2 * t / (1 - t)
    torch.testing.assert_close(sampler.std[1:], (variance * h).sqrt())
    expected = 1 + variance * (1 - t) / (2 * t)
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-6, atol=0)


def test_the_published_range_is_known_in_nats():
    std = FlowSDE(0.7).bind(FlowTable(shift=3.0), 10).std.mean().item()
    assert std == pytest.approx(0.42, abs=5e-3)
    assert 2e-6 * 16 * 64 * 64 / std == pytest.approx(0.31, abs=5e-3)
    assert GRPOGuard().clip == pytest.approx(0.31, abs=0.02)


# -- the gradient ---------------------------------------------------------------------------------


def own_weights(sampler) -> Tensor:
    u = sampler.std / sampler.grid.steps
    return u / u.mean()


@pytest.mark.parametrize(("eta", "steps"), [(1.0, 3), (0.6, 3), (1.0, 1)])
def test_at_the_sampling_policy_the_gradient_is_the_weighed_one(eta, steps, linear_gaussian):
    model = linear_gaussian(eta, steps)
    rollout, _ = model.rollout()
    returns = rollout.rewards[:, None].expand_as(rollout.costs)
    objective = GRPOGuard(clip=1e-6)
    expected = model.corrected(model.gain, model.shift, own_weights(model.sampler))
    found = model.estimated(objective.loss, returns, objective)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
    if steps == 1:
        assert (found - model.exact()).abs().max() < 1e-11 * found.abs().max()


@pytest.mark.parametrize(("steps", "size", "cosine"), [(3, 0.404, 0.934), (50, 0.1215, 0.994)])
def test_the_weights_bias_the_gradient_by_a_known_size(steps, size, cosine, linear_gaussian):
    model = linear_gaussian(1.0, steps)
    u, true = own_weights(model.sampler), model.exact()
    found = model.corrected(model.gain, model.shift, u)
    assert ((found - true).norm() / true.norm()).item() == pytest.approx(size, abs=5e-4)
    assert torch.cosine_similarity(found, true, dim=0).item() == pytest.approx(cosine, abs=5e-4)
    if steps == 50:
        assert [u.min().item(), u.max().item()] == pytest.approx([0.10, 1.58], abs=5e-3)
        assert u.argmin() == 49


def test_its_exponent_has_mean_zero_and_the_ratio_a_mean_above_one():
    ones = torch.ones_like(one.Z)
    r = one.rows(GuardRows, one.Z, 0.5, ones, scale=ones, weight=ones)
    exponent = GRPOGuard().normalised(r).detach()
    assert one.expected(exponent) == pytest.approx(0.0, abs=1e-9)
    assert one.expected(exponent.square()) == pytest.approx(0.25, abs=1e-9)
    assert one.expected(exponent.exp()) == pytest.approx(1.13, abs=5e-3)


@pytest.mark.parametrize(("shift", "rounded"), [(0.5, 1.42), (1.0, 3.3)])
def test_away_from_the_sampling_policy_it_is_no_importance_weight(shift, rounded):
    ones, growth = torch.ones_like(one.Z), math.exp(shift**2 / 2)
    found = [
        one.expected(
            one.slope(
                GRPOGuard(clip=100.0),
                one.rows(GuardRows, one.Z, shift, reward, scale=ones, weight=ones),
            )
        )
        for reward in (one.Z, 0.7 * ones)
    ]
    assert found == pytest.approx([(1 + shift**2) * growth, 0.7 * shift * growth], rel=1e-6)
    assert found[0] == pytest.approx(rounded, abs=6e-3)


def test_it_rests_at_a_known_share_of_what_can_be_gained():
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(exact.table(), 20)
    kl = (sampler.score_gain / sampler.std).square()
    price = problem.kl_weight * kl / own_weights(sampler)
    _, *policy = resting_per_std(problem, sampler, price)
    assert gained(problem, sampler, *policy) == pytest.approx(0.8316, abs=6e-5)


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"group": 1}, "group"),
        ({"clip": 0.0}, "clip"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"advantage_clip": 0.0}, "advantage_clip"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        GRPOGuard(**settings)


def test_it_trains_and_resumes(trains):
    done = trains(GRPOGuard(group=4, kl_weight=0.1), minibatches=3)
    assert done.environment.reward_queries == 2 * 12


def test_a_short_run_gains():
    objective = GRPOGuard(kl_weight=0.5, learning_rate=0.03)
    assert share_gained(objective, updates=15, minibatches=2) > 0.2
