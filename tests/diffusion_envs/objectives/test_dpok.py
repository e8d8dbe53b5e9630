"""DPOK, against formulas written out here; its two biases, exactly."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion_envs import exact
from diffusion_envs.exact import GaussianProblem, gaussian
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import DPOK
from diffusion_envs.objectives.dpok import NoiseLevelRows
from diffusion_envs.samplers import DDIM, BoundDDIM
from tests.diffusion_envs.objectives.random_rows import close, column, rows
from tests.diffusion_envs.objectives.resting_points import gained, resting

ROWS = 7


def laws(r: NoiseLevelRows) -> tuple[Normal, Normal, Normal]:
    """Laws of the next state under the current, the sampling and the pretrained policy."""
    scores = (r.mean, r.old_mean, r.reference_score)
    new, old, pre = (Normal(column(r.score_gain) * s, column(r.std)) for s in scores)
    return new, old, pre


def log_ratio(r: NoiseLevelRows) -> Tensor:
    new, old, _ = laws(r)
    after = old.mean + old.stddev * r.noise
    return (new.log_prob(after) - old.log_prob(after)).flatten(1).sum(1)


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["noise", "exact_kl", "path_kl"])
def test_the_loss_is_the_formula(which, generator):
    r = rows(generator, moved=0.03)
    settings = {} if which == "noise" else {which: True}
    found = DPOK(reward_weight=3.0, kl_weight=0.7, clip=0.1, **settings).loss(r).detach()
    with torch.no_grad():
        ratio = log_ratio(r).exp().clamp(math.exp(-0.1), math.exp(0.1))
        if which == "exact_kl":
            new, _, pre = laws(r)
            penalty = kl_divergence(new, pre).flatten(1).sum(1)
        elif which == "path_kl":
            gap = (r.mean - r.reference_score).flatten(1)
            penalty = 0.5 * 1.37 * r.step_size * gap.square().sum(1)
        else:
            noises = (-column(r.sigma) * s for s in (r.mean, r.reference_score))
            penalty = (next(noises) - next(noises)).square().flatten(1).sum(1)
    close(found, -3.0 * r.advantage * ratio + 0.7 * penalty)


def test_outside_the_range_there_is_no_gradient_in_either_direction(generator):
    r = rows(generator, moved=0.5)
    objective = DPOK(clip=1e-6, kl_weight=0.0)
    for sign in (1.0, -1.0):
        one = dataclasses.replace(r, advantage=sign * r.advantage.abs())
        (slope,) = torch.autograd.grad(objective.loss(one).sum(), r.mean)
        assert slope.abs().max() == 0


def test_inside_the_range_the_gradient_is_the_ratios(generator):
    r = rows(generator, moved=0.02)
    expected = -10.0 * (log_ratio(r).exp() * r.advantage).sum()
    (expected,) = torch.autograd.grad(expected, r.mean)
    (found,) = torch.autograd.grad(DPOK(clip=9.0, kl_weight=0.0).loss(r).sum(), r.mean)
    close(found, expected)


# -- the gradient ---------------------------------------------------------------------------------


def weights(sampler) -> tuple[Tensor, Tensor]:
    """Twice the weight of |change of score|^2 at every step: of the noise's square, of the KL."""
    return 2 * sampler.sigma[:-1].square(), (sampler.score_gain / sampler.std).square()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_the_gradient_is_exact_for_frozen_states_whatever_the_baseline(exact, eta, linear_gaussian):
    model = linear_gaussian(eta)
    objective = DPOK(reward_weight=1.7, kl_weight=0.3, exact_kl=exact)
    rollout, _ = model.rollout()
    cost = 0.3 / 1.7 * weights(model.sampler)[exact]
    expected = 1.7 * model.exact(cost, frozen=True)
    for values in (rollout.values, 0.3 * rollout.values.square().clamp(max=0), rollout.values + 5):
        seen = dataclasses.replace(rollout, values=values)
        found = model.estimated(objective.loss, objective.advantages(seen))
        assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize(("exact", "off"), [(False, 0.34), (True, 0.42)])
def test_the_cost_of_going_elsewhere_is_left_out(exact, off, linear_gaussian):
    """Relative to the gradient of the whole penalty, |frozen - true| / |true|."""
    model = linear_gaussian(1.0)
    cost = weights(model.sampler)[exact]
    of_reward = model.exact()
    true, frozen = (model.exact(cost, frozen=f) - of_reward for f in (False, True))
    assert ((frozen - true).norm() / true.norm()).item() == pytest.approx(off, abs=0.01)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_with_the_path_kl_the_gradient_is_whole_whatever_the_baseline(eta, linear_gaussian):
    model = linear_gaussian(eta)
    objective = DPOK(reward_weight=1.7, kl_weight=0.3, path_kl=True)
    rollout, _ = model.rollout()
    cost = 0.3 / 1.7 * model.sampler.kl_factor * model.sampler.integrated_g2
    expected = 1.7 * model.exact(cost)
    for values in (rollout.values, 0.3 * rollout.values.square().clamp(max=0), rollout.values + 5):
        seen = dataclasses.replace(rollout, values=values)
        found = model.estimated(objective.loss, objective.advantages(seen))
        assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


# -- where it rests -------------------------------------------------------------------------------


def prices(problem: GaussianProblem, sampler: BoundDDIM) -> dict[str, Tensor]:
    """Price of half a square of the score's change, by the penalty."""
    noise, kl = weights(sampler)
    path = sampler.kl_factor * sampler.integrated_g2
    return {k: problem.kl_weight * v for k, v in (("noise", noise), ("kl", kl), ("path", path))}


@pytest.mark.parametrize(
    ("steps", "penalty", "charged", "share"),
    [
        (20, "noise", False, 0.6045),
        (20, "kl", False, 0.8124),
        (20, "path", False, 0.9781),
        (20, "path", True, 1.0),
        (100, "noise", False, 0.2130),
        (100, "kl", False, 0.9559),
    ],
)
def test_it_rests_at_a_known_share_of_what_can_be_gained(steps, penalty, charged, share):
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(exact.table(), steps)
    gain, shift, _ = resting(problem, sampler, prices(problem, sampler)[penalty], charged)
    assert gained(problem, sampler, gain, shift) == pytest.approx(share, abs=6e-5)


def test_whoever_maximises_the_reward_alone_ends_far_below_the_pretrained_model():
    """The largest E[r] on 20 steps, by the policy nearest the pretrained model."""
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(exact.table(), 20)
    nearly_free = 1e-8 * sampler.kl_factor * sampler.integrated_g2
    gain, shift, _ = resting(problem, sampler, nearly_free, charged=True)
    noise = 0.5 * torch.trace(problem.quadratic.curvature) * sampler.std[-1].square()
    largest = problem.quadratic(
        torch.linalg.solve(problem.quadratic.curvature, problem.quadratic.slope)
    )
    found = problem.outcome_of(gain, shift, sampler).reward
    assert found == pytest.approx((largest - noise).item(), abs=1e-6)
    assert gained(problem, sampler, gain, shift) == pytest.approx(-13.17, abs=0.01)


@pytest.mark.parametrize("penalty", ["noise", "kl", "path"])
def test_there_its_expected_gradient_is_zero_at_every_state(penalty):
    """The loss itself, by quadrature; half a percent away from there it is not."""
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(exact.table(), 20)
    objective = DPOK(
        reward_weight=1.0,
        kl_weight=problem.kl_weight,
        exact_kl=penalty == "kl",
        path_kl=penalty == "path",
    )
    price = prices(problem, sampler)[penalty]
    gain, shift, values = resting(problem, sampler, price, charged=penalty == "path")
    slope, offset = gaussian.score_coefficients(
        problem.data, sampler.table, sampler.noising_times[:-1]
    )
    point = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    noise = torch.cartesian_prod(point, point)  # moments of degree three: exact

    def step(k: int, x: Tensor, scale: float) -> Tensor:
        reference = slope[k] @ x + offset[k]
        score = (reference + scale * (gain[k] @ x + shift[k])).requires_grad_()
        after = sampler.mean(torch.full((4,), k), x.expand(4, 2), score.detach().expand(4, 2))
        n = torch.ones(4, dtype=torch.float64)
        rows = NoiseLevelRows(
            mean=score.expand(4, 2),
            old_mean=score.detach().expand(4, 2),
            reference_score=reference.expand(4, 2),
            noise=noise,
            advantage=values[k + 1](after + sampler.std[k] * noise) - values[k](x),
            step_size=sampler.integrated_g2[k] * n,
            horizon=sampler.integrated_g2.sum(),
            score_gain=sampler.score_gain[k] * n,
            std=sampler.std[k] * n,
            kl_factor=sampler.kl_factor,
            sigma=sampler.sigma[k] * n,
        )
        (found,) = torch.autograd.grad(objective.loss(rows).mean(), score)
        return found / (price[k] * (score - reference).detach().norm())

    for k in (0, 7, 19):
        for x in (torch.tensor([0.3, -0.2]).double(), torch.tensor([-1.4, 0.9]).double()):
            assert step(k, x, 1.0).norm() < 1e-11
            assert step(k, x, 1.005).norm() > 0.004


@pytest.mark.parametrize(("shift", "share"), [(0.5, 0.98), (-0.5, 0.98), (1.0, 0.36), (-1.0, 0.36)])
def test_the_truncation_takes_a_known_share_of_the_gradient(shift, share):
    """The mean of a step is ``shift`` standard deviations along a linear reward's slope.

    With the reward z the gradient in the mean is E (z - shift) z rho = 1, less what is outside.
    """
    z = torch.linspace(-14, 14, 400001, dtype=torch.float64)
    one = torch.ones_like(z)
    mean = torch.full((len(z), 1), shift, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(len(z), 1, dtype=torch.float64)
    rows = NoiseLevelRows(
        mean=mean,
        old_mean=zero,
        reference_score=zero,
        noise=z[:, None],
        advantage=z,
        step_size=one,
        horizon=one.sum(),
        score_gain=one,
        std=one,
        kl_factor=1.0,
        sigma=one,
    )
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    objective = DPOK(reward_weight=1.0, kl_weight=0.0)
    (slope,) = torch.autograd.grad(-objective.loss(rows).sum(), mean)
    found = torch.trapezoid(slope[:, 0] * density, z).item()

    def integral(x: float) -> float:  # of (z - m) z phi(z - m)
        y = x - shift
        bell = math.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + math.erf(y / math.sqrt(2))) - x * bell

    low, high = sorted((sign * 1.64 / shift + shift / 2) for sign in (1, -1))
    assert found == pytest.approx(integral(high) - integral(low), abs=1e-3)
    assert found == pytest.approx(share, abs=5e-3)


def test_the_published_penalty_weighs_steps_otherwise_than_the_kl():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    table = DDPMTable((1 - betas).cumprod(0), spacing="trailing")
    noise, kl = weights(DDIM(1.0).bind(table, 50))
    nats = kl / noise  # per |change of noise|^2
    assert nats.min().item() == pytest.approx(0.070, rel=0.01)
    assert nats.max().item() == pytest.approx(10.1, rel=0.01)
    assert nats.mean().item() == pytest.approx(1 / 3.2, rel=0.02)
    assert (nats.max() / nats.min()).item() == pytest.approx(145, rel=0.01)
    assert (nats[-5:].sum() / nats.sum()).item() == pytest.approx(0.73, abs=0.01)


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"clip": -0.1}, "clip"),
        ({"clip_per_pixel": 0.0}, "clip_per_pixel"),
        ({"reward_weight": 0.0}, "reward_weight"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_weight": math.inf}, "kl_weight"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"exact_kl": True, "path_kl": True}, "exact_kl and path_kl"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        DPOK(**settings)


@pytest.mark.parametrize("settings", [{}, {"exact_kl": True}, {"path_kl": True}])
def test_it_trains_and_resumes(settings, trains):
    done = trains(DPOK(learning_rate=1e-3, **settings), minibatches=2)
    assert done.environment.reward_queries == 2 * 12  # values come from the network alone


def test_pretrained_scores_are_needed_where_a_penalty_is_charged():
    assert DPOK(kl_weight=0.1).needs_reference
    assert not DPOK(kl_weight=0.0).needs_reference
