"""What the critic is fitted to, against sums by hand."""

import numpy as np
import pytest
import torch

from diffusion_envs.objectives import DDPO, DPOK, TDPO, DxMI, ScoreAsAction


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
    told = made.critic.improve(rollout, sample.denoised_rewards, 0)
    assert told == pytest.approx(expected, rel=1e-4)  # float32


def test_there_is_one_only_where_the_objective_needs_it(small_trainer):
    for objective in (ScoreAsAction(), DPOK(), TDPO(), DxMI()):
        assert small_trainer(objective).critic is not None
    made = small_trainer(DDPO())
    assert made.critic is None
    assert made.state()["critic"] is None
    (line,) = made.updates(1)
    assert "value_loss" not in line
