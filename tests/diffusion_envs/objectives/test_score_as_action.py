"""The losses of the three objectives, against formulas written out here."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ctrl import DeterministicPolicy, GaussianPolicy
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import (
    Objective,
    Rollout,
    ScoreAsAction,
    ScoreAsActionReleased,
    ScoreAsActionSampled,
)
from diffusion_envs.objectives.score_as_action import DrawnRows
from diffusion_envs.samplers import DDIM
from tests.diffusion_envs.objectives.small_runs import trainer

ROWS, EVENT = 5, (3, 2, 2)


def rows(generator: torch.Generator, moved: float) -> DrawnRows:
    """Rows whose current policy is ``moved`` away from the sampling one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(ROWS, *EVENT)
    std = 0.3 + normal(ROWS).square()
    return DrawnRows(
        mean=(old + moved * normal(ROWS, *EVENT)).requires_grad_(),
        old_mean=old,
        reference_score=normal(ROWS, *EVENT),
        action=old + 0.7 * normal(ROWS, *EVENT),
        noise=normal(ROWS, *EVENT),
        advantage=normal(ROWS),
        step_size=0.1 + normal(ROWS).square(),
        horizon=torch.tensor(4.3, dtype=torch.float64),
        score_gain=0.2 + normal(ROWS).square(),
        std=std,
        action_std=torch.full((ROWS,), 0.7, dtype=torch.float64),
        kl_factor=1.37,
    )


def per_row(x: Tensor) -> Tensor:
    """A column that broadcasts over events."""
    return x.view(-1, 1, 1, 1)


def test_transition_log_ratio_is_the_ratio_of_densities_of_the_next_state(generator):
    r = rows(generator, moved=0.4)
    old_next, new_next = (per_row(r.score_gain) * m for m in (r.old_mean, r.mean))
    after = old_next + per_row(r.std) * r.noise
    new, old = (Normal(m, per_row(r.std)).log_prob(after) for m in (new_next, old_next))
    expected = (new - old).flatten(1).sum(1)
    torch.testing.assert_close(ScoreAsAction().log_ratio(r), expected, rtol=1e-10, atol=1e-10)
    mean_over_pixels = ScoreAsActionReleased().log_ratio(r)
    torch.testing.assert_close(
        mean_over_pixels, expected / math.prod(EVENT), rtol=1e-10, atol=1e-10
    )


def test_drawn_log_ratio_is_the_ratio_of_the_policies_densities(generator):
    r = rows(generator, moved=0.4)
    new, old = (Normal(m, 0.7).log_prob(r.action) for m in (r.mean, r.old_mean))
    expected = (new - old).flatten(1).sum(1)
    got = ScoreAsActionSampled().log_ratio(r)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [ScoreAsAction, ScoreAsActionSampled])
def test_gradient_at_equal_policies_is_the_theorems(kind, generator):
    """-advantage * grad log density + kl_weight * grad path KL, whatever the clip."""
    objective = kind(kl_weight=0.3, clip=0.01)
    r = rows(generator, moved=0.0)
    objective.loss(r).sum().backward()
    if kind is ScoreAsAction:
        score_function = per_row(r.score_gain / r.std) * r.noise
    else:
        score_function = (r.action - r.old_mean) / 0.7**2
    gap = r.mean.detach() - r.reference_score
    expected = -per_row(r.advantage) * score_function
    expected = expected + 0.3 * 1.37 * per_row(r.step_size) * gap
    assert r.mean.grad is not None
    torch.testing.assert_close(r.mean.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [ScoreAsAction, ScoreAsActionSampled])
def test_a_decision_outside_the_trusted_range_moves_no_further(kind, generator):
    objective = kind(kl_weight=0.0, clip=1e-6)
    r = rows(generator, moved=0.5)
    log_ratio = objective.log_ratio(r).detach()
    r = dataclasses.replace(r, advantage=log_ratio.sign())  # good and grown, or bad and shrunk
    objective.loss(r).sum().backward()
    assert r.mean.grad is not None
    assert r.mean.grad.abs().max() == 0


@pytest.mark.parametrize("kind", [ScoreAsAction, ScoreAsActionSampled])
def test_without_a_kl_weight_no_pretrained_scores_are_asked_for(kind, generator):
    r = rows(generator, moved=0.5)
    without = dataclasses.replace(r, reference_score=None)
    objective = kind(kl_weight=0.0)
    assert not objective.needs_reference
    ratio = objective.log_ratio(r).exp()
    width = objective.half_width(r)
    trusted = objective.log_ratio(r).clamp(-width, width).exp()
    expected = -torch.minimum(ratio * r.advantage, trusted * r.advantage)
    torch.testing.assert_close(objective.loss(without), expected)


def test_trusted_range_of_a_path_does_not_depend_on_the_number_of_steps(generator):
    r = rows(generator, moved=0.0)
    objective = ScoreAsAction(clip=0.4)
    for steps in (10, 1000):
        sizes = torch.full((ROWS,), 4.3 / steps, dtype=torch.float64)
        width = objective.half_width(dataclasses.replace(r, step_size=sizes))
        # independent steps: the squares of their spreads add up to that of the path
        torch.testing.assert_close((steps * width.square()).sqrt(), torch.full_like(width, 0.4))


def test_the_older_clip_per_pixel_is_converted_to_the_whole_step(generator):
    r = rows(generator, moved=0.0)
    width = ScoreAsAction(clip_per_pixel=1e-4).half_width(r)
    torch.testing.assert_close(width, torch.full_like(width, 1e-4 * math.prod(EVENT)))


def rollout(generator: torch.Generator, paths: int = 6) -> Rollout:
    steps = 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scores = normal(paths, steps, *EVENT)
    return Rollout(
        states=normal(paths, steps + 1, *EVENT),
        means=scores,
        actions=scores,
        noises=scores,
        reference_scores=scores,
        costs=normal(paths, steps).square(),
        values=normal(paths, steps + 1),
        rewards=normal(paths),
        step_sizes=torch.tensor([0.3, 0.9, 1.7, 0.2], dtype=torch.float64),
        condition=torch.zeros(paths, dtype=torch.int64),
    )


@pytest.mark.parametrize("kind", [ScoreAsAction, ScoreAsActionSampled])
def test_advantages_without_forgetting_are_returns_minus_values(kind, generator):
    r = rollout(generator)
    assert r.values is not None
    got = kind(kl_weight=0.3, gae_rate=0.0).advantages(r)
    for k in range(4):
        gain = r.values[:, -1] - 0.3 * r.costs[:, k:].sum(1) - r.values[:, k]
        torch.testing.assert_close(got[:, k], gain - gain.mean(), rtol=1e-10, atol=1e-10)


def test_advantages_with_infinite_forgetting_are_temporal_differences(generator):
    r = rollout(generator)
    assert r.values is not None
    got = ScoreAsAction(kl_weight=0.3, gae_rate=math.inf).advantages(r)
    gain = r.values.diff(dim=1) - 0.3 * r.costs
    torch.testing.assert_close(got, gain - gain.mean(0), rtol=1e-10, atol=1e-10)


def test_released_advantages_are_standardised_value_differences(generator):
    got = ScoreAsActionReleased().advantages(rollout(generator))
    torch.testing.assert_close(got.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(got.std(0), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_views_act_as_they_say():
    def mean(t: Tensor, x: Tensor) -> Tensor:
        return x

    def sigma(t: Tensor) -> Tensor:
        return torch.tensor(0.5)

    assert isinstance(ScoreAsAction().policy(mean, sigma), DeterministicPolicy)
    drawn = ScoreAsActionSampled(exploration=0.3).policy(mean, sigma)
    assert isinstance(drawn, GaussianPolicy)
    assert float(drawn.std_at(torch.tensor(0.1))) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", [ScoreAsAction, ScoreAsActionSampled, ScoreAsActionReleased])
def test_objectives_meet_the_protocol(kind):
    assert isinstance(kind(), Objective)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (ScoreAsAction, {"kl_weight": -1.0}, "kl_weight"),
        (ScoreAsAction, {"kl_weight": math.nan}, "kl_weight"),
        (ScoreAsAction, {"kl_weight": math.inf}, "kl_weight"),
        (ScoreAsAction, {"gae_rate": -0.1}, "gae_rate"),
        (ScoreAsAction, {"clip": 0.0}, "clip"),
        (ScoreAsAction, {"clip_per_pixel": -1e-4}, "clip_per_pixel"),
        (ScoreAsAction, {"learning_rate": math.nan}, "learning_rate"),
        (ScoreAsActionSampled, {"exploration": 0.0}, "exploration"),
        (ScoreAsActionReleased, {"advantage_clip": 0.0}, "advantage_clip"),
        (ScoreAsActionReleased, {"clip_per_pixel": 0.0}, "clip_per_pixel"),
        (ScoreAsActionReleased, {"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(kind, settings, name):
    with pytest.raises(ValueError, match=name):
        kind(**settings)


def test_the_defaults_are_those_of_the_image_leaderboard_and_of_the_published_recipe():
    settings = {"kl_weight": 0.1, "gae_rate": 0.5, "clip": 1.0, "denoised": True}
    settings["learning_rate"] = 3e-3
    assert ScoreAsAction() == ScoreAsAction(**settings, clip_per_pixel=None)
    assert ScoreAsActionSampled() == ScoreAsActionSampled(**settings, exploration=0.3)
    released = {"clip_per_pixel": 1.5e-5, "advantage_clip": 5.0, "learning_rate": 5e-5}
    assert ScoreAsActionReleased() == ScoreAsActionReleased(**released)


def test_what_each_objective_asks_of_the_loop():
    view_b, view_a, released = ScoreAsAction(), ScoreAsActionSampled(), ScoreAsActionReleased()
    assert view_b.needs_value is view_a.needs_value is released.needs_value is True
    assert (view_b.needs_density, view_a.needs_density) == (True, False)
    assert released.needs_reference is False
    assert ScoreAsAction(kl_weight=0.0).needs_reference is False
    assert view_b.needs_reference is view_a.needs_reference is True
    assert view_b.denoised_rewards is released.denoised_rewards is True
    assert ScoreAsAction(denoised=False).denoised_rewards is False
    assert ScoreAsAction(kl_weight=0.3).cost_weight == 0.3


def test_released_advantages_are_clipped_and_survive_a_constant_value(generator):
    r = rollout(generator)
    plain = ScoreAsActionReleased(advantage_clip=100.0).advantages(r)
    clipped = ScoreAsActionReleased(advantage_clip=0.4).advantages(r)
    assert plain.max() > 0.4 > -0.4 > plain.min()
    torch.testing.assert_close(clipped, plain.clamp(-0.4, 0.4))
    rising = torch.arange(5, dtype=torch.float64).expand(6, 5)
    nearly = rising + 1e-8 * torch.tensor([1.0, -1.0] * 3).double()[:, None] * (rising == 1)
    gains = nearly.diff(dim=1)[:, 0] - 1
    expected = (gains - gains.mean()) / (gains.std() + 1e-8)
    found = ScoreAsActionReleased().advantages(dataclasses.replace(r, values=nearly))
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-6, atol=0)
    assert not found[:, 2:].any()


# -- what the loop does otherwise than the released run -------------------------------------------


def test_a_critic_that_is_fitted_first_hardly_changes_the_released_advantages():
    """Values start from the reward of the denoised image: correlation of before with after."""
    run = trainer(ScoreAsActionReleased(learning_rate=1e-3), seed=0, samples=192, value_epochs=4)
    list(run.updates(1))
    sample, objective = run.sample(), run.objective
    assert isinstance(objective, ScoreAsActionReleased)
    before = objective.advantages(sample.rollout)
    run.critic.improve(sample.rollout, sample.denoised_rewards, run.update)
    with torch.no_grad():
        values = run.critic.values(sample.rollout, sample.denoised_rewards)
    after = objective.advantages(dataclasses.replace(sample.rollout, values=values))
    assert not torch.equal(before, after)
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.97


def test_the_first_half_of_the_steps_has_three_quarters_of_the_critics_weight():
    """By int g^2; the released run weighs all steps alike."""
    table = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    sampler = DDIM(1.0).bind(DDPMTable((1 - table).cumprod(0), spacing="trailing"), 50)
    share = sampler.integrated_g2[:25].sum() / sampler.integrated_g2.sum()
    assert share.item() == pytest.approx(0.761, abs=5e-4)


@pytest.mark.parametrize(("paths", "rounded"), [(4, 0.69), (16, 0.92)])
def test_standardising_few_paths_scales_the_released_gradient(paths, rounded, generator):
    """mean_i A_i z_i is (1 - 1/m) std(z) on every draw; E std(z) = c4(m) for normal z."""
    z = torch.randn(paths, generator=generator, dtype=torch.float64)
    values = torch.zeros(paths, 5, dtype=torch.float64)
    values[:, -1] = z
    one = dataclasses.replace(rollout(generator, paths), values=values, rewards=z)
    advantage = ScoreAsActionReleased().advantages(one)[:, -1]
    assert (advantage * z).mean().item() == pytest.approx(
        (1 - 1 / paths) * z.std().item(), rel=1e-6
    )
    c4 = math.sqrt(2 / (paths - 1)) * math.gamma(paths / 2) / math.gamma((paths - 1) / 2)
    assert (1 - 1 / paths) * c4 == pytest.approx(rounded, abs=5e-3)


@pytest.mark.parametrize("moved", [0.0, 1e-6, 0.4])
def test_the_released_loss_is_the_clipped_ratio_of_mean_log_densities(moved, generator):
    r = rows(generator, moved)
    released = ScoreAsActionReleased()
    ratio = released.log_ratio(r).exp()
    trusted = ratio.clamp(math.exp(-1.5e-5), math.exp(1.5e-5))
    expected = -torch.minimum(ratio * r.advantage, trusted * r.advantage)
    torch.testing.assert_close(released.loss(r), expected, rtol=1e-12, atol=0)
