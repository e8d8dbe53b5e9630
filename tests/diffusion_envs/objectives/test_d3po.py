"""Direct preference optimisation of single steps, against formulas written out here."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor
from torch.distributions import Normal

from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Quadratic
from diffusion_envs.objectives import D3PO, Rollout
from diffusion_envs.objectives.d3po import PreferenceRows
from diffusion_envs.samplers import DDIM
from tests.diffusion_envs.objectives import random_rows
from tests.diffusion_envs.objectives.random_rows import EVENT
from tests.diffusion_envs.objectives.small_runs import assert_runs_and_resumes
from tests.diffusion_envs.test_two_views import DATA, GAIN, SHIFT, START, TABLES

ROWS = 6
PIXELS = math.prod(EVENT)
SLOPE = torch.tensor([0.7, -0.4], dtype=torch.float64)  # of a linear reward


def rows(generator: torch.Generator, moved: float) -> PreferenceRows:
    """Three pairs whose policy is ``moved`` away from the sampling one."""
    chosen = torch.tensor([0.3, -2.0, 1.0, 1.5, -0.4, -0.4], dtype=torch.float64)
    return random_rows.rows(
        generator, moved, count=ROWS, reference=0.1, kind=PreferenceRows, preference=chosen
    )


def mean_log_ratio(r: PreferenceRows) -> Tensor:
    """log p_th(x') - log p_pre(x'), the mean over coordinates."""
    gain, std = (v.view(-1, 1, 1, 1) for v in (r.score_gain, r.std))
    after = gain * r.old_mean + std * r.noise
    own, pretrained = (
        Normal(gain * score, std).log_prob(after) for score in (r.mean, r.reference_score)
    )
    return (own - pretrained).flatten(1).mean(1)


@pytest.mark.parametrize("moved", [0.01, 0.3])
def test_the_loss_is_the_published_one(moved, generator):
    """-log sigmoid(beta (log clip rho_w - log clip rho_l)), rho of the mean over coordinates."""
    r = rows(generator, moved)
    ratios = mean_log_ratio(r).exp().clamp(0.9, 1.1).log()
    first = -torch.sigmoid(0.1 * (ratios[0] - ratios[1])).log()
    second = -torch.sigmoid(0.1 * (ratios[3] - ratios[2])).log()  # the second is preferred
    tie = torch.zeros_like(first)
    expected = torch.stack([first, first, second, second, tie, tie])
    torch.testing.assert_close(D3PO().loss(r), expected, rtol=0, atol=1e-12)


def test_the_settings_of_the_whole_step_replace_the_published_ones(generator):
    r = rows(generator, 0.1)
    ratios = (PIXELS * mean_log_ratio(r)).clamp(-2.5, 2.5)
    expected = -torch.sigmoid(0.7 * (ratios[0] - ratios[1])).log()
    got = D3PO(beta=0.7, clip=2.5).loss(r)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_published_loss_lies_within_a_percent_of_log_two_whatever_is_learned(generator):
    far = dataclasses.replace(rows(generator, 30.0), preference=torch.randn(ROWS).double())
    losses = D3PO().loss(far)
    assert losses.min() > 0.68321
    assert losses.max() < 0.70324
    edge = 0.1 * (math.log(1.1) - math.log(0.9))
    assert math.log1p(math.exp(-edge)) == pytest.approx(0.6832, abs=5e-5)
    assert math.log1p(math.exp(edge)) == pytest.approx(0.7032, abs=5e-5)


def test_outside_the_clip_the_gradient_is_zero_even_where_it_would_lead_back(generator):
    r = rows(generator, 0.5)
    objective = D3PO(clip_per_pixel=0.05)
    outside = (mean_log_ratio(r) > math.log(1.05)) | (mean_log_ratio(r) < math.log(0.95))
    assert (objective.clipped(r) == outside).all()
    objective.loss(r).sum().backward()
    assert r.mean.grad is not None
    moving = r.mean.grad.flatten(1).abs().amax(1) > 0
    tied = torch.tensor([False] * 4 + [True] * 2)
    assert outside.any()
    assert (moving == ~outside & ~tied).all()


def test_a_tie_has_no_gradient_and_order_alone_counts(generator):
    r = rows(generator, 0.1)
    objective = D3PO()
    assert r.preference is not None
    louder = dataclasses.replace(r, preference=100 * r.preference + 3)
    assert torch.equal(objective.loss(r), objective.loss(louder))
    swap = torch.tensor([1, 0, 3, 2, 5, 4])
    swapped = {
        f.name: value[swap]
        for f in dataclasses.fields(r)
        if isinstance(value := getattr(r, f.name), Tensor) and value.ndim
    }
    torch.testing.assert_close(objective.loss(dataclasses.replace(r, **swapped)), objective.loss(r))


# -- exact expectations ---------------------------------------------------------------------------


def test_the_first_gradient_is_that_of_the_reward_over_its_spread():
    """beta / sqrt(pi) grad E[r] / std(r): a linear reward, given the start, on a DDIM chain.

    At the start the loss's gradient is linear in the noise, so it may be taken at the conditional
    mean of the pair's noise given who wins: +- (direction of the reward) / sqrt(pi).
    """
    sampler, beta = DDIM(1.0).bind(TABLES["sd15"], 3), 0.37
    zero = torch.zeros(2, dtype=torch.float64)
    reward = Quadratic(torch.zeros(2, 2, dtype=torch.float64), SLOPE, zero[0])
    gain, shift = GAIN.clone(), SHIFT.clone().requires_grad_()
    steps = linear_policy.Steps.of(sampler)
    chain = linear_policy.chain(DATA, sampler.table, steps, gain, shift)
    expected_reward = reward.expectation(linear_policy.moments(chain, START)[-1])
    (true,) = torch.autograd.grad(expected_reward, shift)
    # d r / d (noise of step k), by the steps that follow
    slopes, carried = [], SLOPE
    for k in reversed(range(3)):
        slopes.append(sampler.std[k] * carried)
        carried = chain.matrix[k].mT @ carried
    slopes = torch.stack(slopes[::-1])
    spread = slopes.square().sum().sqrt()
    noise = slopes / spread / math.sqrt(math.pi)  # of the winner, [steps, 2]
    noises = torch.stack([noise, -noise], dim=1).flatten(0, 1)
    moved = torch.zeros(6, 2, dtype=torch.float64) + shift

    def wide(per_step: Tensor) -> Tensor:
        return per_step.repeat_interleave(2)

    r = PreferenceRows(
        mean=moved,
        old_mean=moved.detach(),
        reference_score=moved.detach(),
        noise=noises,
        advantage=wide(zero.new_zeros(3)),
        step_size=wide(sampler.integrated_g2),
        horizon=sampler.integrated_g2.sum(),
        score_gain=wide(sampler.score_gain),
        std=wide(sampler.std),
        kl_factor=1.0,
        preference=zero.new_tensor([1.0, 0.0] * 3),
    )
    loss = D3PO(beta=beta, clip=math.inf).loss(r).sum() / 2  # a pair's loss is given to both
    (found,) = torch.autograd.grad(loss, shift)
    expected = -beta / math.sqrt(math.pi) * true / spread
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def step_loss(shift: Tensor, spread: float, steps: int, nodes: int = 80) -> Tensor:
    """Expected loss of one of ``steps`` equal steps, moved by ``shift`` standard deviations.

    The reward is the sum of all noises, scaled to a standard deviation of ``spread`` given the
    start; choices follow sigmoid(r_w - r_l).
    """
    z, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    w = w / w.sum()
    slope = spread / math.sqrt(steps)
    here = math.sqrt(2) * z  # difference of this step's noises; the others' differ by as much each
    others = math.sqrt(2 * (steps - 1)) * z
    chosen = torch.tensor(expit(slope * (here[:, None] + others).numpy())) @ w
    ones = torch.ones(nodes, dtype=torch.float64)
    zeros = 0 * ones[:, None].repeat_interleave(2, 0)
    wide = ones.repeat_interleave(2)
    losses = []
    for preference in ([1.0, 0.0], [0.0, 1.0]):
        r = PreferenceRows(
            mean=zeros + shift,
            old_mean=zeros,
            reference_score=zeros,
            noise=torch.stack([here / 2, -here / 2], dim=1).flatten()[:, None],
            advantage=0 * wide,
            step_size=wide,
            horizon=ones[0],
            score_gain=wide,
            std=wide,
            kl_factor=1.0,
            preference=torch.tensor(preference, dtype=torch.float64).repeat(nodes),
        )
        losses.append(D3PO(beta=1.0, clip=math.inf).loss(r)[::2])
    return w @ (chosen * losses[0] + (1 - chosen) * losses[1])


@pytest.mark.parametrize(
    ("spread", "steps", "shortfall"),
    [(0.3, 1, 0.0), (0.3, 4, 0.0314), (1.0, 4, 0.2223), (3.0, 1, 0.0), (3.0, 4, 0.598)],
)
def test_steps_judged_alone_fall_short_of_the_tilt(spread, steps, shortfall):
    """The tilt by exp(r / beta) moves every step by the reward's slope; the loss stops before."""
    tilted, low, high = spread / math.sqrt(steps), 0.0, 2 * spread
    for _ in range(40):
        middle = (low + high) / 2
        shift = torch.tensor(middle, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(step_loss(shift, spread, steps), shift)
        low, high = (low, middle) if slope > 0 else (middle, high)
    assert 1 - low / tilted == pytest.approx(shortfall, abs=1e-4)


# -- the rest -------------------------------------------------------------------------------------


def test_pairs_share_prompt_and_start_and_no_advantage_is_used(generator):
    objective = D3PO()
    assert (objective.group, objective.shared_start, objective.needs_preferences) == (2, True, True)
    costs = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    states = torch.zeros(4, 4, 1).double()
    r = Rollout(
        states=states,
        means=states[:, 1:],
        actions=states[:, 1:],
        noises=states[:, 1:],
        reference_scores=states[:, 1:],
        costs=costs,
        values=None,
        rewards=costs[:, 0],
        step_sizes=costs[0],
        condition=torch.zeros(4, dtype=torch.int64),
    )
    assert torch.equal(objective.advantages(r), torch.zeros_like(costs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_per_pixel": 0.0}, "beta_per_pixel"),
        ({"clip_per_pixel": -0.1}, "clip_per_pixel"),
        ({"clip_per_pixel": 1.0}, "clip_per_pixel must be less than 1"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"clip": 0.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        D3PO(**settings)


def test_it_runs_in_the_loop_and_resumes_to_the_same_numbers():
    assert_runs_and_resumes(D3PO(learning_rate=1e-3), queries=12)
    assert_runs_and_resumes(D3PO(learning_rate=1e-3), queries=12, train_steps=2, minibatches=3)
