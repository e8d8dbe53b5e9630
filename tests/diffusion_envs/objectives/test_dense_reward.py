"""Plackett-Luce likelihoods of discounted paths, against formulas written out here."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs.exact import linear_policy
from diffusion_envs.objectives import DenseReward
from diffusion_envs.objectives.dense_reward import JoinedRows, plackett_luce
from diffusion_envs.samplers import DDIM
from tests.diffusion_envs.objectives.small_runs import assert_runs_and_resumes, trainer
from tests.diffusion_envs.test_two_views import DATA, GAIN, SHIFT, TABLES

GROUPS, STEPS, MEMBERS, EVENT = 2, 3, 4, (3, 2)
PIXELS = math.prod(EVENT)
PREFERENCE = torch.tensor([[0.3, -2.0, 1.0, 1.5], [0.2, 7.0, 0.2, -1.0]], dtype=torch.float64)


def rows(generator: torch.Generator, moved: float) -> JoinedRows:
    """Two groups of four paths at three steps; two of the second group are tied."""
    n = GROUPS * STEPS * MEMBERS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(n, *EVENT)
    return JoinedRows(
        mean=(old + moved * normal(n, *EVENT)).requires_grad_(),
        old_mean=old,
        reference_score=old + 0.1 * normal(n, *EVENT),
        noise=normal(n, *EVENT),
        advantage=normal(n),
        step_size=0.1 + normal(n).square(),
        horizon=torch.tensor(4.3, dtype=torch.float64),
        score_gain=0.2 + normal(n).square(),
        std=0.3 + normal(n).square(),
        kl_factor=1.37,
        preference=PREFERENCE[:, None].expand(GROUPS, STEPS, MEMBERS).flatten(),
        joined=STEPS,
    )


def mean_log_ratios(r: JoinedRows) -> np.ndarray:
    """log p_th(x') - log p_pre(x'), the mean over coordinates, [groups, steps, members]."""
    mean, old, reference, noise = (
        x.detach().flatten(1).numpy() for x in (r.mean, r.old_mean, r.reference_score, r.noise)
    )
    gain, std = r.score_gain.numpy()[:, None], r.std.numpy()[:, None]
    after = gain * old + std * noise
    own, pretrained = (((after - gain * m) / std) ** 2 for m in (mean, reference))
    return (0.5 * (pretrained - own)).mean(1).reshape(GROUPS, STEPS, MEMBERS)


def likelihood(logits: np.ndarray, preference: np.ndarray) -> float:
    """Probability that items are drawn without replacement in the preferred order."""
    left = sorted(range(len(logits)), key=lambda i: -preference[i])
    found = 1.0
    while left:
        found *= math.exp(logits[left[0]]) / sum(math.exp(logits[i]) for i in left)
        left.pop(0)
    return found


@pytest.mark.parametrize("compared", [2, 3, 4])
@pytest.mark.parametrize("moved", [0.01, 0.3])
def test_the_loss_is_the_mean_over_all_lists_of_the_published_one(compared, moved, generator):
    r = rows(generator, moved)
    logits = 10 * np.clip(mean_log_ratios(r), -0.02, 0.02).mean(1)
    expected = []
    for group in range(GROUPS):
        lists = list(itertools.combinations(range(MEMBERS), compared))
        total = 0.0
        for one in map(list, lists):
            asked = PREFERENCE[group].numpy()[one]
            if len(set(asked)) == compared:  # no tie
                total -= math.log(likelihood(logits[group][one], asked))
        expected += [total / len(lists)] * (STEPS * MEMBERS)
    got = DenseReward(members=MEMBERS, compared=compared, clip_per_pixel=0.02).loss(r)
    torch.testing.assert_close(
        got.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def with_random_order(ordered: Tensor, other: Tensor) -> Tensor:
    """Expected loss of a tie whose order a coin decides: the public code's way."""
    return 0.5 * (ordered + other)


def test_ties_of_the_published_code_pull_less_than_a_thousandth_of_a_choice():
    """Random order pulls two logits together by tanh(d / 2) / 2; ours has no gradient."""
    width = 10 * 1e-4  # beta_per_pixel * clip_per_pixel: the largest logit
    for gap in (0.3 * width, 2 * width):
        logits = torch.tensor([gap, 0.0], dtype=torch.float64, requires_grad=True)
        one, other = (plackett_luce(logits, torch.tensor(o).double()) for o in ([1, 0], [0, 1]))
        (tie,) = torch.autograd.grad(with_random_order(one, other), logits)
        assert float(tie[0]) == pytest.approx(math.tanh(gap / 2) / 2, rel=1e-9)
        assert float(tie[0]) < 1e-3 * 0.5  # a choice pulls by 1/2 where logits are equal


def test_a_tie_has_no_gradient_and_no_loss(generator):
    r = dataclasses.replace(rows(generator, 0.1), preference=torch.zeros(24).double())
    loss = DenseReward(members=MEMBERS).loss(r)
    loss.sum().backward()
    assert r.mean.grad is not None
    assert loss.abs().max() == r.mean.grad.abs().max() == 0


def test_one_draw_of_steps_for_all_groups_has_the_same_mean_and_more_variance(generator):
    """As published, against one for each group, over all draws of a step with its probability."""
    r = rows(generator, 0.3)
    objective = DenseReward(members=MEMBERS, discount=0.6, beta=0.7, clip=math.inf)
    p = objective.step_probabilities(STEPS)
    assert p is not None
    with torch.no_grad():
        alone = dataclasses.replace(r, joined=1)  # a loss of each (group, step)
        losses = objective.loss(alone).view(GROUPS, STEPS, MEMBERS)[..., 0]
    shared = losses.mean(0)  # [step]
    own = (losses[0][:, None] + losses[1]) / 2  # [step of one group, step of the other]
    means = (p * shared).sum(), (p[:, None] * p * own).sum()
    torch.testing.assert_close(*means, rtol=1e-12, atol=0)
    variances = [(p * (x - (p * x).sum()).square()).sum() for x in losses]
    variance = (p[:, None] * p * (own - means[1]).square()).sum()
    torch.testing.assert_close(variance, sum(variances) / GROUPS**2, rtol=1e-9, atol=0)
    # of groups that are alike, where sharing costs all that drawing apart saves
    alike = (losses[:1].expand(2, -1), losses[:1])
    both, one = ((p * (x.mean(0) - means_of(p, x)).square()).sum() for x in alike)
    torch.testing.assert_close(both, one, rtol=1e-12, atol=0)
    apart = (losses[0][:, None] + losses[0]) / 2
    assert (p[:, None] * p * (apart - means_of(p, losses[:1])).square()).sum() == pytest.approx(
        float(one) / GROUPS, rel=1e-9
    )


def means_of(p: Tensor, losses: Tensor) -> Tensor:
    """Mean over steps and groups."""
    return (p * losses.mean(0)).sum()


def test_a_published_pair_lies_within_a_thousandth_of_log_two(generator):
    far = dataclasses.replace(rows(generator, 30.0), preference=torch.arange(24).double())
    losses = DenseReward(members=2, compared=2).loss(dataclasses.replace(far, joined=1))
    assert losses.min() > 0.6921
    assert losses.max() < 0.6942


def test_outside_the_clip_the_gradient_is_zero(generator):
    r = rows(generator, 0.5)
    objective = DenseReward(members=MEMBERS, clip_per_pixel=0.05)
    inside = torch.tensor(np.abs(mean_log_ratios(r)) < 0.05).flatten()
    assert (objective.clipped(r) == ~inside).all()
    objective.loss(r).sum().backward()
    assert r.mean.grad is not None
    assert inside.any()
    assert ((r.mean.grad.flatten(1).abs().amax(1) > 0) == inside).all()


def test_the_settings_of_the_whole_step_replace_those_of_the_mean(generator):
    r = rows(generator, 0.1)
    one = DenseReward(members=MEMBERS, beta_per_pixel=4.2, clip_per_pixel=0.1)
    other = DenseReward(members=MEMBERS, beta=4.2 / PIXELS, clip=0.1 * PIXELS)
    torch.testing.assert_close(one.loss(r), other.loss(r), rtol=1e-12, atol=0)


def test_likelihoods_of_all_orders_add_up_to_one(generator):
    logits = torch.randn(4, generator=generator, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(4)))).double()
    total = (-plackett_luce(logits.expand(24, 4), orders)).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


# -- exact expectations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "turned", "size"), [(20, 4.935, 0.9388), (50, 8.387, 0.7860)], ids=["20", "50"]
)
def test_the_first_gradient_is_the_rewards_with_discounted_steps(steps, turned, size):
    """beta / sqrt(pi) sum_k p_k grad_k E[r] / std(r), against the mean of grad_k for p = 1 / N.

    A linear reward, given the start; the loss's gradient is linear in the noise there, so it may be
    taken at the conditional mean of the noise given who wins.
    """
    sampler, beta = DDIM(1.0).bind(TABLES["sd15"], steps), 0.37
    chain = linear_policy.chain(
        DATA, sampler.table, linear_policy.Steps.of(sampler), 0 * GAIN, 0 * SHIFT
    )
    carried, slopes = torch.tensor([0.7, -0.4], dtype=torch.float64), []
    for k in reversed(range(steps)):
        slopes.append(carried)  # of the reward in the state after step k
        carried = chain.matrix[k].mT @ carried
    slope = torch.stack(slopes[::-1])
    gradients = sampler.score_gain[:, None] * slope  # of E[r] in the score of step k
    noisy = sampler.std[:, None] * slope
    spread = noisy.square().sum().sqrt()
    noise = noisy / spread / math.sqrt(math.pi)
    objective = DenseReward(members=2, discount=0.9, beta=beta, clip=math.inf)
    probabilities = objective.step_probabilities(steps)
    assert probabilities is not None
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(2 * steps, 2).double(), torch.ones(2 * steps).double()
    r = JoinedRows(
        mean=zero + shift,
        old_mean=zero,
        reference_score=zero,
        noise=torch.stack([noise, -noise], dim=1).flatten(0, 1),
        advantage=0 * one,
        step_size=one,
        horizon=one[0],
        score_gain=sampler.score_gain.repeat_interleave(2),
        std=sampler.std.repeat_interleave(2),
        kl_factor=1.0,
        preference=torch.tensor([1.0, 0.0] * steps, dtype=torch.float64),
        joined=1,
    )
    loss = (objective.loss(r) * probabilities.repeat_interleave(2)).sum() / 2  # all one-step draws
    (found,) = torch.autograd.grad(loss, shift)
    discounted = (probabilities[:, None] * gradients).sum(0)
    expected = -beta / math.sqrt(math.pi) * discounted / spread
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    alike = gradients.mean(0)
    cosine = torch.cosine_similarity(discounted, alike, dim=0)
    assert math.degrees(math.acos(float(cosine))) == pytest.approx(turned, abs=2e-3)
    assert float(discounted.norm() / alike.norm()) == pytest.approx(size, abs=2e-4)


def test_whole_paths_judged_together_are_at_rest_at_the_tilt():
    """Two steps, no discount, Bradley-Terry choices: no shortfall, unlike steps judged alone."""
    z, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(60))
    w = w / w.sum()
    here, there = (math.sqrt(2) * v.flatten() for v in torch.meshgrid(z, z, indexing="ij"))
    weight, slope = torch.outer(w, w).flatten(), 0.8
    chosen = torch.sigmoid(slope * (here + there))
    noise = torch.stack([here, -here, there, -there], dim=1).flatten()[:, None] / 2
    one = torch.ones(len(noise), dtype=torch.float64)
    objective = DenseReward(members=2, discount=1.0, beta=2.0, clip=math.inf)  # 1 a step
    for moved, sign in ((0.9 * slope, -1), (slope, 0), (1.1 * slope, 1)):
        shift = torch.tensor(moved, dtype=torch.float64, requires_grad=True)
        total = torch.zeros((), dtype=torch.float64)
        for probability, first in ((chosen, 1.0), (1 - chosen, 0.0)):
            r = JoinedRows(
                mean=0 * noise + shift,
                old_mean=0 * noise,
                reference_score=0 * noise,
                noise=noise,
                advantage=0 * one,
                step_size=one,
                horizon=one[0],
                score_gain=one,
                std=one,
                kl_factor=1.0,
                preference=torch.tensor([first, 1 - first] * 2 * 3600, dtype=torch.float64),
                joined=2,
            )
            total = total + (weight * probability * objective.loss(r)[::4]).sum()
        (slope_there,) = torch.autograd.grad(total, shift)
        if sign:
            assert float(slope_there) * sign > 1e-3
        else:
            assert abs(float(slope_there)) < 1e-12


def test_half_of_the_weight_lies_on_the_first_seven_of_fifty_steps():
    weights = DenseReward().step_probabilities(50)
    assert weights is not None
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(weights[:7].sum()) == pytest.approx(0.524, abs=1e-3)
    assert (weights[1:] / weights[:-1] - 0.9).abs().max() < 1e-12
    assert DenseReward(discount=1.0).step_probabilities(4) is None  # all alike: no repetition


def test_the_loop_draws_steps_with_these_probabilities(generator):
    run = trainer(DenseReward(members=2, discount=0.6))
    update_losses: Any = run.losses(run.sample().rollout)
    drawn = update_losses._steps(40_000, 2, generator)
    share = torch.stack([(drawn == k).double().mean() for k in range(4)])
    expected = DenseReward(discount=0.6).step_probabilities(4)
    assert expected is not None
    assert (share - expected).abs().max() < 5 * (0.25 / 80_000) ** 0.5
    # of two groups, each its own: equal as often as independent draws are
    same = (drawn[::2, 0] == drawn[1::2, 0]).double().mean()
    assert (same - expected.square().sum()).abs() < 5 * (0.25 / 20_000) ** 0.5
    assert ((drawn[:, 0] == drawn[:, 1]).double().mean() - expected.square().sum()).abs() < 0.013


def test_a_gradient_does_not_depend_on_the_pieces_that_the_loop_cuts(generator):
    found = []
    for batch in (1000, 1):
        run = trainer(DenseReward(members=3, beta=0.5, clip=math.inf), batch=batch)
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.fill_(0.05)
        update_losses = run.losses(run.sample().rollout)
        for loss in update_losses.losses(torch.arange(4), torch.Generator().manual_seed(3)):
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None]))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


# -- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 1}, "compared must be at least 2 and at most members"),
        ({"compared": 1}, "compared"),
        ({"compared": 6}, "compared"),
        ({"discount": 0.0}, "discount"),
        ({"discount": 1.1}, "discount"),
        ({"discount": math.nan}, "discount"),
        ({"beta_per_pixel": -1.0}, "beta_per_pixel"),
        ({"clip_per_pixel": 0.0}, "clip_per_pixel"),
        ({"beta": 0.0}, "beta"),
        ({"clip": -1.0}, "clip"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DenseReward(**settings)


def test_it_runs_in_the_loop_and_resumes_to_the_same_numbers():
    assert_runs_and_resumes(DenseReward(members=3, learning_rate=1e-3), queries=12, train_steps=2)
    assert_runs_and_resumes(DenseReward(members=6, compared=3, learning_rate=1e-3), queries=12)
