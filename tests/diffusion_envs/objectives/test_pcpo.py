"""PCPO, against formulas written out in numpy and the exact gradient of a solvable model."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs import exact
from diffusion_envs.exact import GaussianProblem
from diffusion_envs.objectives import PCPO, Rows
from diffusion_envs.objectives.pcpo import CreditRows, native_weights
from diffusion_envs.samplers import DDIM
from tests.diffusion_envs.objectives import one_coordinate as one
from tests.diffusion_envs.objectives.random_rows import close, rows
from tests.diffusion_envs.objectives.resting_points import gained, resting_per_std
from tests.diffusion_envs.objectives.small_runs import share_gained
from tests.diffusion_envs.test_two_views import TABLES

ROWS = 7


def credited(generator: torch.Generator, moved: float) -> CreditRows:
    credit = 0.2 + torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return rows(generator, moved, kind=CreditRows, credit=credit)


def arrays(r: Rows) -> tuple[np.ndarray, ...]:
    """(shift in standard deviations, noise, advantage, shift from the pretrained), a row each."""
    scale = (r.score_gain / r.std).numpy()[:, None]
    assert r.reference_score is not None
    new, old, pre = (
        m.detach().numpy().reshape(ROWS, -1) for m in (r.mean, r.old_mean, r.reference_score)
    )
    noise = r.noise.numpy().reshape(ROWS, -1)
    return scale * (new - old), noise, r.advantage.numpy(), scale * (new - pre)


# -- the loss -------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_hinge_in_the_log_ratio(generator):
    r = credited(generator, moved=0.1)
    shift, noise, advantage, away = arrays(r)
    log_ratio = (-0.5 * (noise - shift) ** 2 + 0.5 * noise**2).sum(1)
    hinge = np.maximum(0, 0.1 * abs(advantage) - advantage * log_ratio)
    on = hinge > 0
    assert 0 < on.sum() < ROWS  # both branches
    credit = r.credit.numpy()
    # the published form, less a constant of the roll-out
    expected = credit * (hinge - 0.1 * abs(advantage) - advantage) + 0.7 * 0.5 * (away**2).sum(1)
    loss = PCPO(kl_weight=0.7, clip=0.1).loss(r)
    close(loss.detach(), torch.from_numpy(expected))
    (found,) = torch.autograd.grad(loss.sum(), r.mean)
    rate = -(credit * on * advantage)[:, None] * (noise - shift) + 0.7 * away
    rate = rate * (r.score_gain / r.std).numpy()[:, None]
    close(found.flatten(1), torch.from_numpy(rate))


def test_within_the_hinge_it_is_minus_a_times_one_plus_the_log_ratio(generator):
    r = credited(generator, moved=0.1)
    shift, noise, advantage, _ = arrays(r)
    log_ratio = (shift * noise - 0.5 * shift**2).sum(1)
    expected = -r.credit.numpy() * advantage * (1 + log_ratio)
    close(PCPO(clip=100.0).loss(r).detach(), torch.from_numpy(expected))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("excess", "held"), [(-1e-9, False), (1e-9, True)])
def test_only_a_step_that_is_good_enough_is_held(sign, excess, held):
    """A mean one standard deviation away: the log-ratio is z - 1/2."""
    z = torch.tensor([sign * (0.4 + excess) + 0.5, -sign * 9.0 + 0.5], dtype=torch.float64)
    r = one.rows(CreditRows, z, 1.0, torch.full((2,), sign * 0.3), credit=torch.ones(2).double())
    slope = one.slope(PCPO(clip=0.4), r)
    assert (slope[0] == 0) == held
    assert slope[1] != 0  # far away on the other side
    assert PCPO(clip=0.4).clipped(r).tolist() == [float(held), 1.0]


def test_a_clip_per_pixel_is_times_the_coordinates(generator):
    found = PCPO(clip_per_pixel=1e-3).half_width(credited(generator, moved=0.0))
    close(found, torch.full((ROWS,), 12e-3, dtype=torch.float64))


# -- step weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_the_native_weights_are_the_papers_for_ddim(eta):
    """C(t) / sigma_t, with C(t) from cumulative products, as the notes write it."""
    sampler = DDIM(eta).bind(TABLES["sd15"], 10)
    signal = sampler.alpha.square().numpy()  # cumulative product of alphas
    before, after = signal[:-1], signal[1:]
    step = before / after
    variance = eta**2 * (1 - after) / (1 - before) * (1 - step)
    c = np.sqrt(1 - before) / np.sqrt(step) - np.sqrt(1 - after - variance)
    np.testing.assert_allclose(native_weights(sampler).numpy(), c / np.sqrt(variance), rtol=1e-9)


def test_the_native_weights_of_stable_diffusion_are_known():
    w = native_weights(DDIM(1.0).bind(TABLES["sd15"], 50))
    assert [w.min().item(), w.mean().item(), w[-1].item()] == pytest.approx(
        [0.37, 0.53, 4.50], abs=5e-3
    )
    assert w.argmax() == 49


@pytest.mark.parametrize("uniform", [False, True])
def test_credit_makes_the_weights_uniform(uniform, linear_gaussian):
    model = linear_gaussian(1.0, 3)
    rollout, _ = model.rollout()
    advantages = rollout.rewards[:, None].expand_as(rollout.costs)
    made = model.own_rows(
        PCPO(uniform_weights=uniform), rollout, advantages, model.gain, model.shift
    )
    weights = native_weights(model.sampler)
    found = made.credit.view(-1, 3) * weights
    close(found, (weights.mean() if uniform else weights).expand_as(found))


# -- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_at_the_sampling_policy_the_gradient_is_the_weighed_one(eta, linear_gaussian):
    model = linear_gaussian(eta)
    rollout, _ = model.rollout()
    returns = rollout.rewards[:, None].expand_as(rollout.costs)
    weights = native_weights(model.sampler)
    for uniform, own in ((False, torch.ones(3)), (True, weights.mean() / weights)):
        objective = PCPO(uniform_weights=uniform, clip=1e-3)
        expected = model.corrected(model.gain, model.shift, own)
        found = model.estimated(objective.loss, returns, objective)
        assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
    plain = PCPO(uniform_weights=False)
    gap = model.estimated(plain.loss, returns, plain) - model.exact()
    assert gap.abs().max() < 1e-11 * model.exact().abs().max()


@pytest.mark.parametrize(("steps", "length", "cosine"), [(3, 2.76, 0.984), (50, 1.243, 0.99974)])
def test_uniform_weights_bias_the_gradient_by_a_known_size(steps, length, cosine, linear_gaussian):
    model = linear_gaussian(1.0, steps)
    weights = native_weights(model.sampler)
    true = model.exact()
    found = model.corrected(model.gain, model.shift, weights.mean() / weights)
    assert (found.norm() / true.norm()).item() == pytest.approx(length, abs=5e-3)
    assert torch.cosine_similarity(found, true, dim=0).item() == pytest.approx(cosine, abs=5e-4)
    if steps == 50:
        assert ((found - true).norm() / true.norm()).item() == pytest.approx(0.24, abs=5e-3)


def slope_of(reward: Tensor, shift: float, clip: float) -> float:
    credit = torch.ones_like(one.Z)
    return one.expected(
        one.slope(PCPO(clip=clip), one.rows(CreditRows, one.Z, shift, reward, credit=credit))
    )


def test_away_from_the_sampling_policy_there_is_no_importance_weight():
    """Linear rewards: right. Quadratic: 0, where the slope is 2 shift. Constant: a pull back."""
    z, shift = one.Z, 0.5
    assert slope_of(z, shift, 100.0) == pytest.approx(1.0, abs=1e-9)
    assert slope_of(z.square() - 1, shift, 100.0) == pytest.approx(0.0, abs=1e-9)
    assert slope_of(0.7 + 0 * z, shift, 100.0) == pytest.approx(-0.7 * shift, abs=1e-9)


@pytest.mark.parametrize(("shift", "share"), [(0.5, 0.98), (1.0, 0.36)])
def test_the_hinge_takes_a_known_share_of_the_gradient(shift, share):
    """Held are z > clip / shift + shift / 2 and the negative z < shift / 2 - clip / shift."""
    found = slope_of(one.Z, shift, 1.64)
    z, middle = one.Z, shift / 2
    kept = (z <= middle + 1.64 / shift) & ((z >= 0) | (z >= middle - 1.64 / shift))
    assert found == pytest.approx(one.expected(z * (z - shift) * kept), abs=1e-4)
    assert found == pytest.approx(share, abs=5e-3)


def test_it_rests_at_a_known_share_of_what_can_be_gained():
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(exact.table(), 20)
    kl = (sampler.score_gain / sampler.std).square()
    weights = sampler.score_gain / (sampler.std * sampler.sigma[:-1])
    credit = weights.mean() / weights
    _, *policy = resting_per_std(problem, sampler, problem.kl_weight * kl / credit)
    assert gained(problem, sampler, *policy) == pytest.approx(-0.3094, abs=6e-5)
    assert [credit.min().item(), credit.max().item()] == pytest.approx([0.13, 1.92], abs=5e-3)
    assert (credit > 1).sum() == 18


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"group": 1}, "group"),
        ({"clip": 0.0}, "clip"),
        ({"clip_per_pixel": -1e-4}, "clip_per_pixel"),
        ({"kl_weight": math.nan}, "kl_weight"),
        ({"advantage_clip": 0.0}, "advantage_clip"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        PCPO(**settings)


def test_it_trains_and_resumes(trains):
    done = trains(PCPO(group=4, kl_weight=0.1), minibatches=3)
    assert done.environment.reward_queries == 2 * 12


def test_a_short_run_gains():
    assert share_gained(PCPO(kl_weight=1.0, learning_rate=0.03), updates=15) > 0.2
