"""TDPO and TDPO-R: losses, the exact gradient, what the critic sees, and what a reset touches."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from diffusion_envs.objectives import DPOK, TDPO, Rollout, Rows, TDPOReset
from diffusion_envs.objectives.tdpo import active_neurons, reset_neurons
from diffusion_envs.training.value_network import ResidualValue, ResidualValueOfVectors

ROWS, EVENT = 7, (3, 2, 2)


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def test_the_loss_is_the_published_maximum(generator):
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = normal(ROWS, *EVENT)
    r = Rows(
        mean=old + 0.1 * normal(ROWS, *EVENT),
        old_mean=old,
        reference_score=normal(ROWS, *EVENT),
        noise=normal(ROWS, *EVENT),
        advantage=normal(ROWS),
        step_size=0.1 + normal(ROWS).square(),
        horizon=torch.tensor(4.3, dtype=torch.float64),
        score_gain=0.2 + normal(ROWS).square(),
        std=0.3 + normal(ROWS).square(),
        kl_factor=1.37,
    )
    new, before = (Normal(column(r.score_gain) * s, column(r.std)) for s in (r.mean, r.old_mean))
    after = before.mean + before.stddev * r.noise
    ratio = (new.log_prob(after) - before.log_prob(after)).flatten(1).sum(1).exp()
    low, high = math.exp(-0.1), math.exp(0.1)
    assert 0 < ((ratio < low) | (ratio > high)).sum() < ROWS  # both branches
    expected = torch.maximum(-r.advantage * ratio, -r.advantage * ratio.clamp(low, high))
    torch.testing.assert_close(TDPO(clip=0.1).loss(r), expected, rtol=1e-12, atol=1e-12)


# -- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_the_gradient_is_the_exact_one_over_the_spread_whatever_the_critic(eta, linear_gaussian):
    """Quadrature paths have equal weights: their mean and spread are those of the advantage."""
    model = linear_gaussian(eta)
    rollout, weights = model.rollout()
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))
    alpha, sigma = (v[:-1].view(1, -1, 1) for v in (model.sampler.alpha, model.sampler.sigma))
    guesses = (rollout.states[:, :-1] + sigma.square() * rollout.means) / alpha
    promised = torch.cat([model.reward(guesses), rollout.rewards[:, None]], 1)
    spreads = []
    for values in (promised, torch.zeros_like(promised), rollout.values):
        advantages = TDPO().advantages(dataclasses.replace(rollout, values=values))
        spreads.append((rollout.rewards[:, None] - values[:, :-1]).std())
        expected = model.exact() / spreads[-1]
        found = model.estimated(TDPO().loss, advantages)
        assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
    assert spreads[2] < spreads[1]  # a better critic makes longer steps of one reward


# -- advantages -----------------------------------------------------------------------------------


def bare(rewards: Tensor, values: Tensor) -> Rollout:
    """A roll-out of which only rewards and values are looked at."""
    paths, steps = values.shape[0], values.shape[1] - 1
    empty = torch.zeros(paths, steps, 1, dtype=rewards.dtype)
    return Rollout(
        states=torch.zeros(paths, steps + 1, 1, dtype=rewards.dtype),
        means=empty,
        actions=empty,
        noises=empty,
        reference_scores=empty,
        costs=empty[..., 0],
        values=values,
        rewards=rewards,
        step_sizes=torch.ones(steps, dtype=rewards.dtype),
        condition=torch.zeros(paths, dtype=torch.int64),
    )


def test_advantages_are_standardised_over_paths_and_steps(generator):
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    found = TDPO().advantages(bare(rewards, values)).numpy()
    gains = rewards.numpy()[:, None] - values.numpy()[:, :3]
    expected = (gains - gains.mean()) / gains.std(ddof=1)
    assert abs(found - expected).max() < 1e-12
    assert found.mean(0).std() > 0.01  # over both together, not step by step


@given(st.integers(0, 1000), st.floats(0.1, 50.0), st.floats(-30.0, 30.0))
def test_advantages_do_not_depend_on_unit_and_origin_of_rewards(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    one = TDPO().advantages(bare(rewards, values))
    other = TDPO().advantages(bare(scale * rewards + shift, scale * values + shift))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_equal_rewards_teach_nothing_whatever_the_critic_says(generator):
    values = torch.randn(5, 4, generator=generator)
    found = TDPO().advantages(bare(torch.full((5,), 100.1), values))
    assert found.abs().max() == 0


# -- what the critic sees -------------------------------------------------------------------------


def test_the_critic_sees_denoised_states_and_nothing_is_asked_for_it(small_trainer):
    made = small_trainer(TDPO())
    made.update = 1  # no calibration
    with torch.no_grad():
        made.parameters[1].fill_(0.1)  # away from the pretrained model, whose guesses differ
    sample = made.sample()
    assert sample.rollout.reference_scores is None  # no KL is charged
    assert made.environment.reward_queries == 12
    assert sample.denoised_rewards is None
    rollout, sampler = sample.rollout, made.environment.sampler
    times, states, _ = made.critic.shown(rollout)
    states = states.unflatten(0, (12, 5))
    for k in range(4):
        abar = float(sampler.alpha_bar[k])
        guess = (rollout.states[:, k] + (1 - abar) * rollout.means[:, k]) / math.sqrt(abar)
        torch.testing.assert_close(states[:, k], guess, rtol=1e-5, atol=1e-5)
    assert torch.equal(states[:, 4], rollout.states[:, 4])
    torch.testing.assert_close(times[:5].double(), sampler.noising_times, rtol=0, atol=1e-6)
    noisy = small_trainer(DPOK()).critic.shown(rollout)[1]
    assert torch.equal(noisy.unflatten(0, (12, 5)), rollout.states)


# -- resets ---------------------------------------------------------------------------------------


def pictures(generator: torch.Generator) -> tuple[ResidualValue, tuple[Tensor, ...]]:
    value = ResidualValue(3, 5, generator=generator, width=12)
    shown = (
        torch.rand(6, generator=generator),
        torch.randn(6, 3, 4, 4, generator=generator),
        torch.randn(6, 5, generator=generator),
    )
    return value, shown


def vectors(generator: torch.Generator) -> tuple[ResidualValueOfVectors, tuple[Tensor, ...]]:
    value = ResidualValueOfVectors(3, 5, generator=generator, width=12)
    shown = tuple(torch.rand(6, *shape, generator=generator) for shape in ((), (3,), (5,)))
    return value, shown


def test_a_few_samples_name_nearly_all_neurons_that_all_name(generator):
    """A fresh critic, ``dormant`` 0: one sample of 64, ten nodes each, beside all."""
    value = ResidualValue(4, 16, generator=generator)
    shown = (
        torch.rand(640, generator=generator),
        torch.randn(640, 4, 8, 8, generator=generator),
        torch.randn(640, 16, generator=generator),
    )
    few, all_of_them = (
        torch.cat(active_neurons(value, tuple(x[:count] for x in shown), 0.0))
        for count in (10, 640)
    )
    assert bool((all_of_them | ~few).all())  # ever positive on some: ever positive on all
    assert 0.97 < few.sum() / all_of_them.sum() <= 1
    assert all_of_them.double().mean() > 0.99


DORMANT = torch.tensor([0, 3, 7])


def with_dormant(value: nn.Module) -> None:
    """Three neurons of every hidden layer that no argument of order 1 makes positive."""
    for layer in value.chain[:-1]:
        with torch.no_grad():
            layer.bias[DORMANT] = -200.0


def trained(value: nn.Module, shown: tuple[Tensor, ...]) -> torch.optim.Optimizer:
    """An optimiser with moments everywhere; the network as it was before."""
    kept = {name: p.detach().clone() for name, p in value.named_parameters()}
    optimiser = torch.optim.AdamW(value.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        sum(p.square().sum() + p.sum() for p in value.parameters()).backward()
        optimiser.step()
    with torch.no_grad():
        for name, p in value.named_parameters():
            p.copy_(kept[name])
    return optimiser


def test_active_neurons_are_those_with_positive_pre_activations(generator):
    value, shown = vectors(generator)
    with_dormant(value)
    times, states, context = shown
    phases = times[:, None] * value.frequencies
    seen = torch.cat([states, context, times[:, None], phases.sin(), phases.cos()], 1)
    first = seen @ value.enter.weight.T + value.enter.bias
    x = functional.silu(first)
    second = x @ value.hidden.weight.T + value.hidden.bias + x
    expected = [(layer > 0).any(0) for layer in (first, second)]
    found = active_neurons(value, shown, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(mask[DORMANT].any() for mask in found)
    assert all(mask.sum() >= 5 for mask in found)
    assert not value.hidden._forward_pre_hooks  # nothing is left behind


def test_the_threshold_is_a_share_of_the_layers_mean(generator):
    value, shown = vectors(generator)
    times, states, context = shown
    phases = times[:, None] * value.frequencies
    seen = torch.cat([states, context, times[:, None], phases.sin(), phases.cos()], 1)
    activity = functional.silu(seen @ value.enter.weight.T + value.enter.bias).relu().mean(0)
    found = active_neurons(value, shown, 0.8)[0]
    assert torch.equal(found, activity > 0.8 * activity.mean())
    assert 0 < found.sum() < len(found)


@pytest.mark.parametrize("kind", [pictures, vectors])
def test_a_reset_changes_exactly_the_active_neurons(kind, generator):
    value, shown = kind(generator)
    with_dormant(value)
    optimiser = trained(value, shown)
    before = {name: p.detach().clone() for name, p in value.named_parameters()}
    step = {name: optimiser.state[p]["step"].clone() for name, p in value.named_parameters()}
    active = active_neurons(value, shown, 0.0)
    TDPOReset(reset_every=3).maintain(value, optimiser, lambda: shown, 2, generator)
    names = {id(layer): name for name, layer in value.named_children()}
    chain = [names[id(layer)] for layer in value.chain]
    for name, p in value.named_parameters():
        layer, _, what = name.partition(".")
        touched = torch.zeros_like(p, dtype=torch.bool)
        if layer in chain:
            k = chain.index(layer)
            if k < len(active):  # into or of its own neurons
                touched[active[k]] = True
            if k > 0 and what == "weight":  # out of the neurons of the layer before
                touched[:, active[k - 1]] = True
        assert torch.equal(p[~touched], before[name][~touched]), name
        if what == "bias":
            assert bool((p[touched] == 0).all()), name
        else:
            assert bool((p[touched] != before[name][touched]).all()), name
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = optimiser.state[p][moment]
            assert bool((kept[touched] == 0).all()), name
            assert bool((kept[~touched] != 0).all()), name
        assert torch.equal(optimiser.state[p]["step"], step[name])


def test_new_weights_have_the_stated_spread(generator):
    value = ResidualValue(3, 5, generator=generator, width=64)
    everything = [torch.ones(64, dtype=torch.bool)] * 4
    reset_neurons(value.chain, everything, torch.optim.AdamW(value.parameters()), generator)
    for layer in value.chain[1:3]:  # 36864 weights each, of fan-in 576
        weights = layer.weight.flatten() * (64 * 9 + 1)
        # five standard errors of a normal sample's mean and standard deviation
        assert abs(weights.mean().item()) < 5 / len(weights) ** 0.5
        assert abs(weights.std().item() - 1) < 5 / (2 * len(weights)) ** 0.5


def test_a_reset_can_be_repeated_and_differs_between_updates():
    found = []
    for seed in (5, 5, 6):
        value, shown = pictures(torch.Generator().manual_seed(1))
        draw = torch.Generator().manual_seed(seed)
        TDPOReset(reset_every=1).maintain(
            value, torch.optim.AdamW(value.parameters()), lambda shown=shown: shown, 0, draw
        )
        found.append(torch.cat([p.detach().flatten() for p in value.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("update", [0, 1, 3])
def test_between_resets_nothing_is_looked_at(update, generator):
    value, _ = pictures(generator)
    before = [p.detach().clone() for p in value.parameters()]

    def never() -> tuple[Tensor, ...]:
        raise AssertionError

    optimiser = torch.optim.AdamW(value.parameters())
    TDPOReset(reset_every=3).maintain(value, optimiser, never, update, generator)
    assert all(torch.equal(a, b) for a, b in zip(value.parameters(), before, strict=True))


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (TDPO, {"clip": 0.0}, "clip"),
        (TDPO, {"clip_per_pixel": -1e-4}, "clip_per_pixel"),
        (TDPO, {"learning_rate": math.nan}, "learning_rate"),
        (TDPOReset, {"reset_every": 0}, "reset_every"),
        (TDPOReset, {"dormant": -0.1}, "dormant"),
        (TDPOReset, {"clip": math.inf}, "clip"),
    ],
)
def test_bad_settings_are_refused_by_name(kind, settings, name):
    with pytest.raises(ValueError, match=name):
        kind(**settings)


@pytest.mark.parametrize("objective", [TDPO(), TDPOReset(reset_every=2)], ids=["TDPO", "TDPO-R"])
def test_it_trains_and_resumes(objective, trains):
    done = trains(objective, minibatches=2)
    assert done.environment.reward_queries == 2 * 12


def test_the_loop_resets_when_it_says(small_trainer):
    """The two runs differ first after the second update: the critic was reset at its end."""
    runs = [small_trainer(o) for o in (TDPO(), TDPOReset(reset_every=2))]
    for update in (1, 2):
        for made in runs:
            list(made.updates(update))
        plain, reset = (list(made.critic.network.parameters()) for made in runs)
        same = all(torch.equal(a, b) for a, b in zip(plain, reset, strict=True))
        assert same == (update == 1)
    adapters = zip(*(made.parameters for made in runs), strict=True)
    assert all(torch.equal(a, b) for a, b in adapters)  # the policy is not touched


def test_the_published_number_of_optimiser_steps_costs_no_more_network_calls(small_trainer):
    """2 optimiser steps for each of the sampler's 4, of as many rows as one pass has in all."""
    seen = {}
    for name, size in {
        "one pass": {},
        "as published": {"epochs": 4, "minibatches": 2, "train_steps": 1},
        "few paths": {"minibatches": 12},
    }.items():
        made = small_trainer(TDPO(), **size)
        steps = []
        made.optimiser.optimiser.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        made.update = 1  # without the preflight's calls
        made.step()
        seen[name] = len(steps), made.environment.model.calls
    assert [steps for steps, _ in seen.values()] == [1, 8, 12]
    assert len({calls for _, calls in seen.values()}) == 1
