"""GRPO, against formulas written out here and the exact gradient of a solvable model."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion_envs import exact, rewards
from diffusion_envs.exact import GaussianProblem, linear_policy
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import GRPO, Rollout
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.requirements import require_inputs
from tests.diffusion_envs.objectives.conftest import tensor
from tests.diffusion_envs.objectives.random_rows import column, rows
from tests.diffusion_envs.objectives.resting_points import gained, resting_per_std
from tests.diffusion_envs.test_two_views import (
    DATA,
    GAIN,
    REWARD,
    SHIFT,
    START,
    TABLES,
    VIEW_B,
    exact_gradient,
    flat,
)

ROWS = 7


def test_the_loss_is_the_clipped_maximum_and_the_gaussian_kl(generator):
    r = rows(generator, moved=0.1)
    with torch.no_grad():
        scores = (r.mean, r.old_mean, r.reference_score)
        new, old, pre = (Normal(column(r.score_gain) * s, column(r.std)) for s in scores)
        after = old.mean + old.stddev * r.noise
        ratio = (new.log_prob(after) - old.log_prob(after)).flatten(1).sum(1).exp()
        low, high = math.exp(-0.1), math.exp(0.1)
        expected = torch.maximum(-r.advantage * ratio, -r.advantage * ratio.clamp(low, high))
        expected = expected + 0.7 * kl_divergence(new, pre).flatten(1).sum(1)
        assert 0 < ((ratio < low) | (ratio > high)).sum() < ROWS  # both branches
    found = GRPO(kl_weight=0.7, clip=0.1).loss(r).detach()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# -- the gradient ---------------------------------------------------------------------------------


def chosen(rollout: Rollout, paths: Tensor) -> Rollout:
    """These paths, in this order."""
    return dataclasses.replace(
        rollout,
        **{
            name: getattr(rollout, name)[paths]
            for name in ("states", "means", "actions", "noises", "reference_scores")
        },
        costs=rollout.costs[paths],
        values=None,
        rewards=rollout.rewards[paths],
        condition=rollout.condition[paths],
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_groups_of_two_have_half_the_gradient_over_the_spread(shared, eta, linear_gaussian):
    """All pairs of quadrature paths, with one start or two; two nodes have equal weights."""
    model = linear_gaussian(eta, 2)
    rollout, weights = model.rollout()
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))
    start = rollout.states[:, 0]
    pairs = torch.cartesian_prod(torch.arange(len(start)), torch.arange(len(start)))
    if shared:
        pairs = pairs[(start[pairs[:, 0]] == start[pairs[:, 1]]).all(1)]
    groups = chosen(rollout, pairs.flatten())
    objective = GRPO(group=2, shared_start=shared, whole_batch_std=True, kl_weight=0.3)
    leaves = model.gain.clone().requires_grad_(), model.shift.clone().requires_grad_()
    losses = objective.loss(model.rows(groups, objective.advantages(groups), *leaves))
    found = torch.autograd.grad(-2 * losses.mean(), leaves)  # 2 steps a path
    std = groups.rewards.std(correction=0) + 1e-4
    kl = (model.sampler.score_gain / model.sampler.std).square()
    reward = model.exact()
    cost = model.exact(0.3 * kl, frozen=True) - reward
    expected = 0.5 * reward / std + cost
    gap = torch.cat([g.flatten() for g in found]) - expected
    assert gap.abs().max() < 1e-11 * expected.abs().max()


def test_what_the_kl_will_cost_elsewhere_is_left_out(linear_gaussian):
    model = linear_gaussian(1.0)
    kl = (model.sampler.score_gain / model.sampler.std).square()
    reward = model.exact()
    true, frozen = (model.exact(kl, frozen=f) - reward for f in (False, True))
    assert ((frozen - true).norm() / true.norm()).item() == pytest.approx(0.42, abs=0.01)


def test_ddims_kl_near_the_data_is_many_times_the_sdes():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    sampler = DDIM(1.0).bind(DDPMTable((1 - betas).cumprod(0), spacing="trailing"), 50)
    ratio = (sampler.score_gain / sampler.std).square() / sampler.integrated_g2
    assert ratio.argmax() == 49
    assert ratio.max().item() == pytest.approx(21, rel=0.01)
    assert 1 < ratio.min().item() < 1.1


def test_the_last_step_that_both_projects_leave_out_has_little_of_the_gradient():
    """1.6 % at 50 steps; and DanceGRPO's 0.6 of the steps before it are 29."""
    sampler = DDIM(1.0).bind(TABLES["sd15"], 50)
    steps, leaves = linear_policy.Steps.of(sampler), (GAIN.clone(), SHIFT.clone())
    frozen = linear_policy.chain(DATA, sampler.table, steps, *leaves)
    free = [x.requires_grad_() for x in (GAIN.clone(), SHIFT.clone())]
    moving = linear_policy.chain(DATA, sampler.table, steps, *free)
    law = START
    for k in range(49):
        law = frozen[k].after(law)
    last = flat(torch.autograd.grad(REWARD.expectation(moving[49].after(law)), free))
    whole = exact_gradient(dataclasses.replace(VIEW_B, kl_weight=0.0), sampler)
    assert (last.norm() / whole.norm()).item() == pytest.approx(0.0162, abs=5e-5)
    assert int(0.6 * (50 - 1)) == 29


# -- advantages -----------------------------------------------------------------------------------

REWARDS = torch.tensor([0.3, 2.0, -1.0, 5.0, 5.5, 9.0], dtype=torch.float64)


def bare(rewards: Tensor, steps: int = 3) -> Rollout:
    """A roll-out of which only rewards are looked at."""
    empty = torch.zeros(len(rewards), steps, 1, dtype=rewards.dtype)
    return Rollout(
        states=torch.zeros(len(rewards), steps + 1, 1, dtype=rewards.dtype),
        means=empty,
        actions=empty,
        noises=empty,
        reference_scores=empty,
        costs=empty[..., 0],
        values=None,
        rewards=rewards,
        step_sizes=torch.ones(steps, dtype=rewards.dtype),
        condition=torch.zeros(len(rewards), dtype=torch.int64),
    )


def divisor(values: Tensor) -> Tensor:
    """Standard deviation of the population plus 1e-4, as Flow-GRPO's tracker has it."""
    return ((values - values.sum() / len(values)).square().sum() / len(values)).sqrt() + 1e-4


def divisor_of(rewards: Tensor, whole: bool) -> Tensor:
    """Standard deviation of every path's group, or of all; 1 where it is 0."""
    groups = [rewards] * 2 if whole else rewards.view(2, 3)
    stds = torch.stack([divisor(g) - 1e-4 for g in groups])
    return stds.where(stds > 1e-9, 1.0).repeat_interleave(3)[:, None]


@pytest.mark.parametrize("whole", [False, True])
def test_advantages_are_those_of_the_group(whole):
    found = GRPO(group=3, whole_batch_std=whole).advantages(bare(REWARDS))
    assert found.shape == (6, 3)
    for members in (slice(0, 3), slice(3, 6)):
        own = REWARDS[members]
        expected = (own - own.sum() / 3) / divisor(REWARDS if whole else own)
        expected = expected[:, None].expand(3, 3)
        torch.testing.assert_close(found[members], expected, rtol=1e-12, atol=0)


@given(
    st.lists(st.integers(-9, 9), min_size=6, max_size=6),
    st.booleans(),
    st.floats(0.5, 4.0),
    st.floats(-3.0, 3.0),
)
def test_advantages_do_not_depend_on_unit_and_origin_of_rewards(values, whole, scale, shift):
    rewards = torch.tensor(values, dtype=torch.float64)
    objective = GRPO(group=3, whole_batch_std=whole)
    before, after = (
        # in units of the standard deviation itself, without the 1e-4 that is not of the unit
        objective.advantages(bare(r)) * (1 + 1e-4 / divisor_of(r, whole))
        for r in (rewards, shift + scale * rewards)
    )
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    assert before[:, 0].view(2, 3).sum(1).abs().max() < 1e-9


def test_dancegrpos_advantages_are_a_known_share_of_these():
    """Sample standard deviation plus 1e-8 there: sqrt(1 - 1/n) of ours."""
    rewards = torch.linspace(-1, 2, 16, dtype=torch.float64).square()
    dance = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    ours = GRPO(group=16).advantages(bare(rewards))[:, 0]
    torch.testing.assert_close(
        dance / ours, torch.full_like(ours, (15 / 16) ** 0.5), rtol=2e-4, atol=0
    )
    assert float(dance[0] / ours[0]) == pytest.approx(0.968, abs=5e-4)


@given(st.integers(2, 20), st.booleans(), st.floats(-300, 300, width=32))
def test_equal_rewards_teach_nothing(group, whole, value):
    rewards = torch.full((2 * group,), value, dtype=torch.float32)
    found = GRPO(group=group, whole_batch_std=whole).advantages(bare(rewards))
    assert found.abs().max() == 0


def test_advantages_are_clipped():
    rewards = torch.zeros(100, dtype=torch.float64)
    rewards[7] = 1.0
    assert GRPO(group=100).advantages(bare(rewards)).max() == 5.0


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"group": 1}, "group"),
        ({"clip": 0.0}, "clip"),
        ({"clip_per_pixel": -1e-4}, "clip_per_pixel"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"advantage_clip": 0.0}, "advantage_clip"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        GRPO(**settings)


@pytest.mark.parametrize("shared", [False, True])
def test_it_trains_and_resumes(shared, trains):
    done = trains(GRPO(group=4, shared_start=shared), minibatches=3)
    assert done.environment.reward_queries == 2 * 12
    rollout = done.sample().rollout
    groups = rollout.states[:, 0].unflatten(0, (3, 4))
    assert bool((groups == groups[:, :1]).all()) == shared
    assert bool((rollout.condition.view(3, 4).diff(dim=1) == 0).all())


def test_samples_must_fill_whole_groups(small_trainer):
    with pytest.raises(ValueError, match="group"):
        small_trainer(GRPO(group=5))


def test_it_rests_at_a_known_share_of_what_can_be_gained():
    """Where the standard deviation, in which the KL is weighed, is that of the policy at rest."""
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(exact.table(), 20)
    kl = (sampler.score_gain / sampler.std).square()
    std, *policy = resting_per_std(problem, sampler, problem.kl_weight * kl)
    assert std == pytest.approx(0.267, abs=1e-3)
    assert gained(problem, sampler, *policy) == pytest.approx(0.7937, abs=6e-5)


def test_pretrained_scores_are_needed_where_a_kl_is_charged():
    assert GRPO(kl_weight=0.1).needs_reference
    assert not GRPO(kl_weight=0.0).needs_reference


# -- ranks, and parts of the reward ---------------------------------------------------------------


def with_parts(rewards: Tensor, parts: Tensor, **weights: float) -> Rollout:
    return dataclasses.replace(bare(rewards), reward_parts=parts, part_weights=weights)


def test_ranks_are_centred_of_unit_variance_and_ties_share_theirs():
    rewards = tensor([3.0, 1.0, 2.0, 1e9, 5.0, 5.0, 5.0, 4.0])
    one, other = GRPO(group=4, advantage="ranks").advantages(bare(rewards))[:, 0].view(2, 4)
    # places 0, 1, 2, 3: mean 3/2, variance 5/4; then 2, 2, 2, 0: mean 3/2, variance 3/4
    places = tensor([2.0, 0.0, 1.0, 3.0]) - 1.5
    torch.testing.assert_close(one, places / 1.25**0.5, rtol=1e-12, atol=1e-12)
    tied = tensor([2.0, 2.0, 2.0, 0.0]) - 1.5
    torch.testing.assert_close(other, tied / 0.75**0.5, rtol=1e-12, atol=1e-12)
    assert GRPO(group=4, advantage="ranks").advantages(bare(tensor([7.0] * 4))).abs().max() == 0


def test_ranks_know_no_units(generator):
    rewards = torch.randn(24, dtype=torch.float64, generator=generator)
    objective = GRPO(group=8, advantage="ranks")
    plain = objective.advantages(bare(rewards))
    torch.testing.assert_close(objective.advantages(bare((3 * rewards).exp())), plain)
    for total in plain[:, 0].view(3, 8).sum(1).tolist():
        assert abs(total) < 1e-12


def test_ranks_climb_the_probability_of_exceeding_another_path(generator):
    # x ~ N(0, 1), r = exp(x): d/dmu P(x > x') = 1 / (2 sqrt(pi)), the density of x - x' at 0
    n, groups = 4, 100_000
    x = torch.randn(groups * n, dtype=torch.float64, generator=generator)
    advantage = GRPO(group=n, advantage="ranks").advantages(bare(x.exp(), steps=1))[:, 0]
    by_group = (advantage * x).view(groups, n).mean(1)  # grad log p = x; groups are independent
    expected = math.sqrt(12 * (n - 1) / (n + 1)) / (2 * math.sqrt(math.pi))
    # the mildest mistake: (n - 1) / n for (n - 1) / (n + 1) under the root, +12 %
    error = by_group.std().item() / groups**0.5
    assert 5 * error < 0.05 * expected, "blind"  # 5 errors: a false alarm of 6e-7
    assert abs(by_group.mean().item() - expected) < 5 * error


@pytest.mark.parametrize("whole", [False, True])
def test_of_one_part_the_advantage_is_the_plain_one(whole, generator):
    rewards = torch.randn(24, dtype=torch.float64, generator=generator)
    settings = {"group": 8, "whole_batch_std": whole, "advantage_clip": 1e9}
    plain = GRPO(**settings).advantages(bare(rewards))
    for weight, sign in ((0.3, 1), (-20.0, -1)):
        rollout = with_parts(weight * rewards, rewards[:, None], one=weight)
        parts = GRPO(**settings, advantage="parts").advantages(rollout)
        torch.testing.assert_close(parts, sign * plain, rtol=1e-12, atol=1e-12)


def test_every_part_is_standardised_in_its_group_before_they_are_added(generator):
    parts = torch.randn(24, 2, dtype=torch.float64, generator=generator) * tensor([1e4, 0.1])
    rollout = with_parts(parts.sum(1), parts, first=0.6, second=-2.0)
    objective = GRPO(group=8, advantage="parts", advantage_clip=1e9)
    expected = []
    for group in parts.view(3, 8, 2):
        mean = group.sum(0) / 8
        std = ((group - mean).square().sum(0) / 8).sqrt()
        scaled = (group - mean) / (std + 1e-4)
        expected.append((0.6 * scaled[:, 0] - 2.0 * scaled[:, 1]) / (0.6**2 + 2.0**2) ** 0.5)
    torch.testing.assert_close(
        objective.advantages(rollout)[:, 0], torch.cat(expected), rtol=1e-10, atol=1e-10
    )


def test_a_part_that_says_nothing_in_a_group_leaves_it_to_the_others():
    parts = tensor([[1.0, 3.0], [1.0, 4.0], [2.0, 5.0], [1.0, 5.0]])
    advantages = GRPO(group=2, advantage="parts").advantages(
        with_parts(parts.sum(1), parts, flat=1.0, steep=1.0)
    )[:, 0]
    expected = tensor([-1.0, 1.0, 1.0, -1.0]) / 2**0.5  # but for offsets of 1e-4 beside 1/2
    torch.testing.assert_close(advantages, expected, rtol=3e-4, atol=0)


def test_parts_are_asked_only_of_a_reward_that_has_some():
    objective, colour = GRPO(advantage="parts"), rewards.Colour()
    with pytest.raises(ValueError, match=r"compares each part of a reward, and Colour has none"):
        require_inputs(objective, colour, None, None)
    require_inputs(objective, rewards.Weighted({"red": (colour, 1.0)}), None, None)
    require_inputs(GRPO(), colour, None, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage": "best"}, "advantage must be 'standardised', 'ranks' or 'parts', got 'best'"),
        ({"advantage": "ranks", "whole_batch_std": True}, "use whole_batch_std=False"),
    ],
)
def test_advantages_that_are_none_are_refused(settings, words):
    make = inspect.unwrap(GRPO.__init__)  # without the checks of types that tests add
    with pytest.raises(ValueError, match=words):
        make(object.__new__(GRPO), **settings)


@pytest.mark.parametrize("advantage", ["ranks", "parts"])
def test_a_run_with_either_advantage_goes_on(small_trainer, advantage):
    sum_of_two = {"red": (rewards.Colour(), 1.0), "green": (rewards.Colour("green"), -3.0)}
    objective = GRPO(group=4, learning_rate=0.02, advantage=advantage)
    trainer = small_trainer(objective, reward=rewards.Weighted(sum_of_two))
    before = [p.detach().clone() for p in trainer.parameters]
    for line in trainer.updates(2):
        assert line["gradient_norm"] > 0
    assert any(bool((p != b).any()) for p, b in zip(trainer.parameters, before, strict=True))
