"""What the critic is fitted to, against sums by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ctrl.noise import stream
from diffusion_envs.objectives import DDPO, DPOK, TDPO, DxMI, ScoreAsAction, TDPOReset
from diffusion_envs.training import critic
from diffusion_envs.training.critic import Critic
from diffusion_envs.training.value_network import linear_weights


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_it_is_fitted_to_the_reward_less_what_this_step_and_the_later_ones_cost(
    kl_weight, small_trainer
):
    """One pass over all states at once: the loss that it tells is that before its first step."""
    made = small_trainer(ScoreAsAction(kl_weight=kl_weight), value_batch=10_000)
    with torch.no_grad():
        made.parameters[1].fill_(0.2)  # away from the pretrained model: the steps cost
    sample = made.sample()
    rollout = sample.rollout
    rewards, h = (v.double().numpy() for v in (rollout.rewards, rollout.step_sizes))
    assert rollout.values is not None
    values = rollout.values.double().numpy()
    costs = np.zeros((12, 4))
    if kl_weight > 0:
        costs = rollout.costs.double().numpy()
        assert (costs > 1e-3).all()
    expected = 0.0
    for i in range(12):
        for k in range(4):
            to_go = rewards[i] - kl_weight * sum(costs[i, k:])
            expected += h[k] * (values[i, k] - to_go) ** 2 / (12 * h.sum())
    told = made.critic.improve(rollout, sample.denoised_rewards, 0)["value_loss"]
    assert told == pytest.approx(expected, rel=1e-4)  # float32


def test_there_is_one_only_where_the_objective_needs_it(small_trainer):
    for objective in (ScoreAsAction(), DPOK(), TDPO(), DxMI()):
        assert small_trainer(objective).critic is not None
    made = small_trainer(DDPO())
    assert made.critic is None
    assert made.state()["critic"] is None
    (line,) = made.updates(1)
    assert "value_loss" not in line


def test_its_first_weights_are_those_of_the_seed(small_trainer):
    one, again = (small_trainer(DPOK()).critic.network.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    made = small_trainer(DPOK())
    other = replace(made.environment, seed=made.environment.seed + 1)
    network = Critic(other, made.objective, made.size, made.accelerator, "train").network
    assert any(not torch.equal(one[name], new) for name, new in network.state_dict().items())


def test_its_optimiser_has_the_rate_of_the_sizes(small_trainer):
    made = small_trainer(DPOK(), value_learning_rate=3.7e-4)
    (group,) = made.critic.optimiser.param_groups
    assert (group["lr"], group["weight_decay"]) == (3.7e-4, 0.01)


def test_its_values_at_the_nodes_are_those_of_the_roll_out(small_trainer):
    """Without denoised rewards V is the network alone, also where an objective asks for it."""
    made = small_trainer(DPOK(), value_epochs=3)
    list(made.updates(1))
    rollout = made.sample().rollout
    assert rollout.values is not None
    paths = torch.arange(12)
    for node in range(4):
        asked = made.critic.at(rollout)(torch.full((12,), node), rollout.states[:, node], paths)
        torch.testing.assert_close(asked, rollout.values[:, node], rtol=1e-5, atol=1e-5)
    assert rollout.values[:, :-1].std() > 0


def test_its_weights_are_those_it_was_made_with(small_trainer):
    made = small_trainer(ScoreAsAction(kl_weight=0.0))
    list(made.updates(2))
    sample = made.sample()
    rollout, first = sample.rollout, sample.denoised_rewards
    assert first is not None
    with torch.no_grad():
        alone = made.critic.values(rollout, None)
        made.critic.weights = linear_weights
        values = made.critic.values(rollout, first)
    s = made.environment.steps.noising_times[:-1].to(first)
    expected = (1 - s) * first[:, :-1] + s * alone[:, :-1]
    torch.testing.assert_close(values[:, :-1], expected)
    assert torch.equal(values[:, -1], rollout.rewards)


def test_what_it_draws_is_named_by_stream_update_epoch_and_process(small_trainer, monkeypatch):
    """No two shuffles, and no reset, share their random numbers."""
    made = small_trainer(TDPOReset(reset_every=1), value_epochs=2)
    names: list[tuple[Any, ...]] = []

    def named(seed: int, *name: Any) -> torch.Generator:
        names.append((seed, *name))
        return stream(seed, *name)

    monkeypatch.setattr(critic, "stream", named)
    list(made.updates(2))
    expected = []
    for update in range(2):
        expected += [(41, "train", "value rows", update, epoch, 0) for epoch in range(2)]
        expected += [(41, "train", "maintain", update)]
    assert names == expected


@pytest.mark.parametrize("value_batch", [10_000, 10])
def test_where_the_end_is_fitted_too_it_is_charged_as_long_as_the_last_step(
    value_batch, small_trainer
):
    """Written out, after two updates; in pieces the loss told is the mean over all paths."""
    made = small_trainer(DxMI(), value_batch=10_000)
    list(made.updates(2))
    made.critic.size = replace(made.size, value_batch=value_batch)
    for group in made.critic.optimiser.param_groups:
        group["lr"] = group["weight_decay"] = 0.0  # no piece changes what the next one is told
    sample = made.sample()
    rollout, paths = sample.rollout, torch.arange(12)
    with torch.no_grad():
        end = made.critic.at(rollout)(torch.full((12,), 4), rollout.states[:, -1], paths)
    assert rollout.values is not None
    values, ends, rewards, h = (
        v.double().numpy() for v in (rollout.values, end, rollout.rewards, rollout.step_sizes)
    )
    assert ends.std() > 0
    expected = 0.0
    for i in range(12):
        for k in range(4):
            expected += h[k] * (values[i, k] - rewards[i]) ** 2 / (12 * h.sum())
        expected += h[3] * (ends[i] - rewards[i]) ** 2 / (12 * h.sum())
    told = made.critic.improve(rollout, sample.denoised_rewards, 2)["value_loss"]
    assert told == pytest.approx(expected, rel=1e-4)  # float32
