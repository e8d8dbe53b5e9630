"""DDPO, against formulas written out here and the exact gradient of a solvable model."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from diffusion_envs.objectives import DDPO, DDPOScoreFunction, Rollout, Rows
from diffusion_envs.objectives.protocol import per_prompt
from tests.diffusion_envs.objectives.random_rows import close, column, rows

ROWS = 7


def log_ratio(r: Rows) -> Tensor:
    """log N(x'; new) - log N(x'; old), by torch's own densities."""
    new, old = (column(r.score_gain) * m for m in (r.mean, r.old_mean))
    after = old.detach() + column(r.std) * r.noise
    pair = (Normal(m, column(r.std)).log_prob(after) for m in (new, old))
    return (next(pair) - next(pair)).flatten(1).sum(1)


# -- losses ---------------------------------------------------------------------------------------


def test_the_clipped_loss_is_the_published_maximum(generator):
    r = rows(generator, moved=0.03)
    with torch.no_grad():
        ratio = log_ratio(r).exp()
        low, high = math.exp(-0.1), math.exp(0.1)
        expected = torch.maximum(-r.advantage * ratio, -r.advantage * ratio.clamp(low, high))
        assert 0 < ((ratio < low) | (ratio > high)).sum() < ROWS  # both branches
    close(DDPO(clip=0.1).loss(r).detach(), expected)


def test_the_score_function_loss_has_the_gradient_of_the_log_density(generator):
    r = rows(generator, moved=0.2)
    (expected,) = torch.autograd.grad((-r.advantage * log_ratio(r)).sum(), r.mean)
    (found,) = torch.autograd.grad(DDPOScoreFunction().loss(r).sum(), r.mean)
    close(found, expected)


def test_at_equal_policies_both_have_one_gradient(generator):
    r = rows(generator, moved=0.0)
    found = [
        torch.autograd.grad(one.loss(r).sum(), r.mean)[0] for one in (DDPO(), DDPOScoreFunction())
    ]
    close(*found)
    close(found[0], -column(r.advantage * r.score_gain / r.std) * r.noise)


def test_a_clip_per_pixel_is_times_the_coordinates(generator):
    r = rows(generator, moved=0.0)
    close(DDPO(clip_per_pixel=1e-4).half_width(r), torch.full((ROWS,), 12e-4, dtype=torch.float64))
    assert DDPO().clip == pytest.approx(1e-4 * 4 * 64 * 64, rel=1e-2)  # what was published


# -- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [DDPO(), DDPOScoreFunction()], ids=["IS", "SF"])
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_with_the_reward_as_advantage_the_gradient_is_exact(objective, eta, linear_gaussian):
    model = linear_gaussian(eta)
    rollout, _ = model.rollout()
    returns = rollout.rewards[:, None].expand_as(rollout.costs)
    expected = model.exact()
    found = model.estimated(objective.loss, returns)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


def test_for_one_step_importance_weights_are_exact_at_any_policy(linear_gaussian):
    """Unclipped; the start's law is the same for all policies."""
    model = linear_gaussian(1.0, 1)
    std = model.sampler.std / model.sampler.score_gain
    moved = dataclasses.replace(
        model, gain=model.gain + 0.1 * std, shift=model.shift + 0.2 * std * torch.ones(2).double()
    )
    rollout, weights = model.rollout(nodes=10)
    leaves = moved.gain.clone().requires_grad_(), moved.shift.clone().requires_grad_()
    expected, gaps = moved.exact(), []
    for objective in (DDPO(clip=100.0), DDPOScoreFunction()):
        losses = objective.loss(model.rows(rollout, rollout.rewards[:, None], *leaves))
        found = torch.autograd.grad(-(losses * weights).sum(), leaves)
        gap = torch.cat([g.flatten() for g in found]) - expected
        gaps.append((gap.norm() / expected.norm()).item())
    assert gaps[0] < 1e-8
    assert gaps[1] > 1e-2  # without the weights


@pytest.mark.parametrize("steps", [3, 50])
def test_for_several_steps_the_old_states_bias_the_gradient_in_first_order(steps, linear_gaussian):
    """What importance weights of single steps leave, for a shift of the score by ``size``."""
    model = linear_gaussian(1.0, steps)

    def gap(size: float) -> float:
        moved = dataclasses.replace(model, shift=model.shift + size)
        true = moved.exact()
        return ((model.corrected(moved.gain, moved.shift) - true).norm() / true.norm()).item()

    assert gap(0.1) == pytest.approx(0.31, abs=0.01)
    nats = 0.5 * model.sampler.integrated_g2.sum().item() * 2 * 0.1**2
    assert nats == pytest.approx(0.054, abs=0.001)  # of path KL
    assert gap(0.002) / gap(0.001) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("shift", "share"), [(0.25, 1.0), (0.5, 0.98), (1.0, 0.36), (-1.0, 1.0)])
def test_the_clip_takes_a_known_share_of_the_gradient(shift, share):
    """The mean of a step is ``shift`` standard deviations up a linear reward's slope.

    With the reward z the gradient in the mean is E (z - shift) z rho = 1, less what is clipped:
    z > u, and the negative z < l, if z grows with the ratio.
    """
    z = torch.linspace(-14, 14, 400001, dtype=torch.float64)
    one = torch.ones_like(z)
    mean = torch.full((len(z), 1), shift, dtype=torch.float64, requires_grad=True)
    rows = Rows(
        mean=mean,
        old_mean=torch.zeros_like(mean),
        reference_score=torch.zeros_like(mean),
        noise=z[:, None],
        advantage=z,
        step_size=one,
        horizon=one.sum(),
        score_gain=one,
        std=one,
        kl_factor=1.0,
    )
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    (slope,) = torch.autograd.grad(-DDPO().loss(rows).sum(), mean)
    found = torch.trapezoid(slope[:, 0] * density, z).item()
    expected = 1.0
    if shift > 0:  # in closed form: int (z - m) z phi(z - m) dz = Phi - (z - m + m) phi
        low, high = -1.64 / shift + shift / 2, 1.64 / shift + shift / 2

        def integral(x: float) -> float:
            y = x - shift
            bell = math.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + math.erf(y / math.sqrt(2))) - x * bell

        expected = integral(high) - integral(min(low, 0.0))
    assert found == pytest.approx(expected, abs=1e-3)
    assert found == pytest.approx(share, abs=5e-3)


def test_standardising_gaussian_rewards_scales_the_gradient_by_a_known_factor():
    """mean_i A_i z_i of n rewards z of one prompt: sqrt(1 - 1/n) c4(n) in expectation.

    On every draw it is |z - mean| / sqrt(n), and the norm is chi-distributed: its mean is an
    integral over one variable, here by the trapezoidal rule.
    """
    for n, rounded in ((2, 0.56), (4, 0.80), (16, 0.95)):
        direction = torch.linspace(-1, 1, n, dtype=torch.float64).sin()
        direction = (direction - direction.mean()) / (direction - direction.mean()).norm()
        radius = torch.linspace(0, 12, 40001, dtype=torch.float64)  # its density vanishes there
        log_density = (n - 2) * radius.clamp_min(1e-300).log() - radius.square() / 2
        density = log_density.exp()
        density /= torch.trapezoid(density, radius)
        mean_radius = torch.trapezoid(density * radius, radius)
        z = 0.7 + mean_radius * direction  # what follows is linear in the radius
        advantage = DDPO().advantages(bare(z))[:, 0]
        found = (advantage * (z - 0.7)).mean().item()
        c4 = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
        # 1e-6 beside a standard deviation of mean_radius / sqrt(n) is 2e-6 of it at most
        assert found == pytest.approx(math.sqrt(1 - 1 / n) * c4, rel=3e-6)
        assert found == pytest.approx(rounded, abs=5e-3)


# -- advantages -----------------------------------------------------------------------------------


def bare(rewards: Tensor, condition: list[int] | None = None, steps: int = 3) -> Rollout:
    """A roll-out of which only rewards and prompts are looked at."""
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
        condition=torch.tensor(condition or [0] * len(rewards)),
    )


REWARDS = torch.tensor([0.3, 2.0, -1.0, 5.0, 5.5, 9.0, 4.0], dtype=torch.float64)
PROMPTS = [0, 0, 0, 1, 1, 2, 1]


def by_hand(values: Tensor) -> Tensor:
    gap = values - values.sum() / len(values)
    return gap / ((gap.square().sum() / len(values)).sqrt() + 1e-6)  # as the authors' code


@pytest.mark.parametrize("min_count", [2, 3])
@pytest.mark.parametrize("kind", [DDPO, DDPOScoreFunction])
def test_advantages_are_standardised_within_prompts(kind, min_count):
    found = kind(min_count=min_count).advantages(bare(REWARDS, PROMPTS))
    assert found.shape == (7, 3)
    first, second = [0, 1, 2], [3, 4, 6]
    for members in (first, second):
        expected = by_hand(REWARDS[members])[:, None].expand(-1, 3)
        torch.testing.assert_close(found[members], expected, rtol=1e-12, atol=0)
    alone = by_hand(REWARDS)[5]  # the only one of its prompt: judged by the whole roll-out
    torch.testing.assert_close(found[5], alone.expand(3), rtol=1e-12, atol=0)


def test_prompts_with_fewer_paths_than_asked_are_judged_by_all():
    found = DDPO(min_count=4).advantages(bare(REWARDS, PROMPTS))[:, 0]
    torch.testing.assert_close(found, by_hand(REWARDS), rtol=1e-12, atol=0)


def test_advantages_are_those_that_the_published_tracker_gives():
    """Its numbers for rewards 1, 2, 4, 8 of one prompt: numpy's default is the population's."""
    advantage = DDPO().advantages(bare(torch.tensor([1.0, 2.0, 4.0, 8.0]).double()))[:, 0]
    rewards = np.array([1.0, 2.0, 4.0, 8.0])
    published = (rewards - np.mean(rewards)) / (np.std(rewards) + 1e-6)
    assert np.abs(advantage.numpy() - published).max() < 1e-15
    assert advantage[3].item() == pytest.approx(1.585258, abs=1e-6)  # 4.25 / sqrt(7.1875)
    sample = (rewards - rewards.mean()) / rewards.std(ddof=1)
    assert sample[3] / advantage[3].item() == pytest.approx(0.866, abs=1e-3)


def test_advantages_are_clipped():
    rewards = torch.zeros(100, dtype=torch.float64)
    rewards[7] = 1.0
    assert DDPO(advantage_clip=5.0).advantages(bare(rewards)).max() == 5.0


def stds(rewards: Tensor) -> Tensor:
    """Standard deviation of every path's three of a prompt; 1 where it is 0."""
    groups = rewards.view(2, 3)
    std = (groups - groups.sum(1, keepdim=True) / 3).square().mean(1).sqrt()
    return std.where(std > 1e-9, 1.0).repeat_interleave(3)[:, None]


@given(
    st.lists(st.integers(-9, 9), min_size=6, max_size=6),
    st.floats(0.5, 4.0),
    st.floats(-3.0, 3.0),
)
def test_advantages_do_not_depend_on_the_rewards_unit_and_origin(values, scale, shift):
    rewards = torch.tensor(values, dtype=torch.float64)
    before, after = (
        # in units of the standard deviation itself, without the 1e-6 that is not of the unit
        DDPO().advantages(bare(r, [0, 0, 0, 1, 1, 1])) * (1 + 1e-6 / stds(r))
        for r in (rewards, shift + scale * rewards)
    )
    torch.testing.assert_close(before, after, rtol=0, atol=1e-9)
    for prompt in (slice(0, 3), slice(3, 6)):
        assert abs(before[prompt, 0].sum().item()) < 1e-9


@given(st.integers(2, 60), st.floats(-300, 300, width=32))
def test_equal_rewards_teach_nothing(paths, value):
    rewards = torch.full((paths,), value, dtype=torch.float32)
    assert per_prompt(rewards, torch.zeros(paths, dtype=torch.int64), 1e-6).abs().max() == 0


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (DDPO, {"clip": 0.0}, "clip"),
        (DDPO, {"clip_per_pixel": -1e-4}, "clip_per_pixel"),
        (DDPO, {"advantage_clip": math.inf}, "advantage_clip"),
        (DDPO, {"min_count": 1}, "min_count"),
        (DDPOScoreFunction, {"learning_rate": math.nan}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(kind, settings, name):
    with pytest.raises(ValueError, match=name):
        kind(**settings)


def test_the_score_function_is_used_once_a_rollout(small_trainer):
    for size in ({"epochs": 2}, {"minibatches": 3}):
        with pytest.raises(ValueError, match=r"DDPOScoreFunction.*epochs=1 and minibatches=1"):
            small_trainer(DDPOScoreFunction(), **size)


@pytest.mark.parametrize("objective", [DDPO(), DDPOScoreFunction()], ids=["IS", "SF"])
def test_it_trains_and_resumes(objective, trains):
    done = trains(objective)
    assert done.environment.reward_queries == 2 * 12


def test_several_steps_a_rollout_stay_in_the_trusted_range_more_if_it_is_narrow(small_trainer):
    moved = []
    for clip in (1e-3, 10.0):
        made = small_trainer(dataclasses.replace(DDPO(), clip=clip, learning_rate=1e-2), epochs=8)
        moved.append(made.step()["ratio_max"])
    assert moved[0] < moved[1]
