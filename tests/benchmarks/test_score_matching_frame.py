"""The frame of reward score matching: what is known exactly of some methods comes out."""

import pytest
import torch

from benchmarks.exact_laws import change_coefficients
from benchmarks.score_matching_frame import PROBLEM, Options, gradients, measured, slopes
from diffusion_envs.exact import table
from diffusion_envs.objectives import DDPO, AdjointMatching, TiltedRegression
from diffusion_envs.samplers import DDIM

OPTIONS = Options(samples=960, steps=6)
SAMPLER = DDIM(1.0).bind(table(), OPTIONS.steps)


def test_on_fine_steps_the_optimums_slope_is_that_of_the_tilts_score():
    sampler = DDIM(1.0).bind(table(), 999)
    matrix, shift = slopes(sampler)["V*"]
    change = change_coefficients(PROBLEM, sampler.alpha[:-1])
    for found, expected in zip((matrix, shift), change, strict=True):
        wanted = PROBLEM.kl_weight * expected
        assert (found - wanted)[300:].abs().max() < 0.02 * wanted.abs().max()


def test_adjoint_matching_is_the_path_kls_own_regression():
    """Minus its gradient is int g^2 (grad V / kl_weight - change)."""
    one = measured(AdjointMatching(kl_weight=PROBLEM.kl_weight, path_kl=True), OPTIONS)
    assert one["value"] == "E[r]"
    assert one["cosine"] == pytest.approx(1, abs=1e-3)
    g2 = SAMPLER.integrated_g2
    assert one["weight"] == pytest.approx(
        [float(x / g2.sum()) for x in g2.view(3, 2).sum(1)], abs=0.01
    )
    assert one["pull"] == pytest.approx(1, abs=0.02)
    assert one["rows"] < 1


def test_charged_with_the_chains_kl_it_pulls_harder():
    one = measured(AdjointMatching(kl_weight=PROBLEM.kl_weight), OPTIONS)
    price = (SAMPLER.score_gain / SAMPLER.std).square()
    assert one["pull"] == pytest.approx(float(price.sum() / SAMPLER.integrated_g2.sum()), rel=0.02)


def test_nothing_keeps_a_policy_gradient_without_a_kl_near():
    assert abs(measured(DDPO(), OPTIONS)["pull"]) < 1e-5  # float32 of scores that were shifted


def test_tilted_regression_is_minus_the_losss_own_gradient_in_every_row():
    """(w - 1) score_gain / std z at the pretrained model, by hand."""
    objective = TiltedRegression(kl_weight=PROBLEM.kl_weight)
    rows = gradients(objective, SAMPLER, 48)
    environment = PROBLEM.environment(SAMPLER, 0)
    rollout = environment.sample(
        objective.policy, range(48), torch.zeros(48, dtype=torch.int64), stream="frame"
    ).rollout
    weight = (rollout.rewards / PROBLEM.kl_weight).softmax(0) * 48
    scale = (SAMPLER.score_gain / SAMPLER.std).float()
    expected = ((weight - 1)[:, None] * scale)[:, :, None] * rollout.noises
    # rows come in another order, a path's loss is the sum over its steps
    found, expected = rows.gradient.flatten().sort().values, expected.flatten().sort().values
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)
