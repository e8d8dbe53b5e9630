"""DPOK, against formulas written out here; its two biases, exactly."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion_envs.objectives import DPOK, Rows
from diffusion_envs.samplers import DDIM
from diffusion_envs.schedule import DDPMTable

ROWS, EVENT = 7, (3, 2, 2)


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def rows(generator: torch.Generator, moved: float) -> Rows:
    """Rows whose current policy is ``moved`` away from the sampling one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(ROWS, *EVENT)
    return Rows(
        mean=(old + moved * normal(ROWS, *EVENT)).requires_grad_(),
        old_mean=old,
        reference_score=old + 0.3 * normal(ROWS, *EVENT),
        action=old,
        noise=normal(ROWS, *EVENT),
        advantage=normal(ROWS),
        step_size=0.1 + normal(ROWS).square(),
        horizon=torch.tensor(4.3, dtype=torch.float64),
        score_gain=0.2 + normal(ROWS).square(),
        std=0.3 + normal(ROWS).square(),
        action_std=torch.zeros(ROWS, dtype=torch.float64),
        kl_factor=1.37,
        sigma=0.1 + normal(ROWS).square(),
    )


def laws(r: Rows) -> tuple[Normal, Normal, Normal]:
    """Of the next state under the current, the sampling and the pretrained policy."""
    scores = (r.mean, r.old_mean, r.reference_score)
    new, old, pre = (Normal(column(r.score_gain) * s, column(r.std)) for s in scores)
    return new, old, pre


def log_ratio(r: Rows) -> Tensor:
    new, old, _ = laws(r)
    after = old.mean + old.stddev * r.noise
    return (new.log_prob(after) - old.log_prob(after)).flatten(1).sum(1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_the_loss_is_the_formula(exact, generator):
    r = rows(generator, moved=0.03)
    found = DPOK(reward_weight=3.0, kl_weight=0.7, clip=0.1, exact_kl=exact).loss(r).detach()
    with torch.no_grad():
        ratio = log_ratio(r).exp().clamp(math.exp(-0.1), math.exp(0.1))
        if exact:
            new, _, pre = laws(r)
            penalty = kl_divergence(new, pre).flatten(1).sum(1)
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


@pytest.mark.parametrize(("moved", "share"), [(0.5, 0.98), (-0.5, 0.98), (1.0, 0.36), (-1.0, 0.36)])
def test_the_truncation_takes_a_known_share_of_the_gradient(moved, share):
    """Of a step whose mean went ``moved`` of its standard deviations along a linear reward's slope.

    With the reward z the gradient in the mean is E (z - moved) z rho = 1, less what is outside.
    """
    z = torch.linspace(-14, 14, 400001, dtype=torch.float64)
    one = torch.ones_like(z)
    mean = torch.full((len(z), 1), moved, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(len(z), 1, dtype=torch.float64)
    rows = Rows(
        mean=mean,
        old_mean=zero,
        reference_score=zero,
        action=zero,
        noise=z[:, None],
        advantage=z,
        step_size=one,
        horizon=one.sum(),
        score_gain=one,
        std=one,
        action_std=0 * one,
        kl_factor=1.0,
        sigma=one,
    )
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    objective = DPOK(reward_weight=1.0, kl_weight=0.0)
    (slope,) = torch.autograd.grad(-objective.loss(rows).sum(), mean)
    found = torch.trapezoid(slope[:, 0] * density, z).item()

    def integral(x: float) -> float:  # of (z - m) z phi(z - m)
        y = x - moved
        bell = math.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + math.erf(y / math.sqrt(2))) - x * bell

    low, high = sorted((sign * 1.64 / moved + moved / 2) for sign in (1, -1))
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
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        DPOK(**settings)


@pytest.mark.parametrize("exact", [False, True])
def test_it_trains_and_resumes(exact, trains):
    done = trains(DPOK(learning_rate=1e-3, exact_kl=exact), minibatches=2)
    assert done.environment.reward_queries == 2 * 12  # values come from the network alone
