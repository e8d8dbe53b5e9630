"""Differences of rewards that float32 makes by itself teach no method anything."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from diffusion_envs.objectives import (
    DDPO,
    GRPO,
    PCPO,
    TDPO,
    DiffusionNFT,
    FlowDPPO,
    GRPOGuard,
    ScoreAsActionReleased,
)
from diffusion_envs.preferences import FromReward
from diffusion_envs.rewards.rounding import (
    SPACINGS,
    all_alike,
    floored_std,
    ranks,
    rounding,
    standardised,
)
from diffusion_envs.training.value_network import ResidualValueOfVectors
from tests.diffusion_envs.objectives.test_ddpo import bare

EPS = torch.finfo(torch.float32).eps
OFFSETS = (0.0, 1e-8, 1e-6, 1e-4)  # that methods add to a standard deviation
# One spacing is at most eps |r|, the outlier lies 7/8 of it from the mean, and the sum of eight
# errs by at most seven roundings, each half a spacing of the sum. Without a floor: sqrt(7).
ALMOST_NONE = (7 / 8 + 7 / 2) / SPACINGS
METHODS = {
    "DDPO": DDPO(advantage_clip=1e9),
    "GRPO": GRPO(group=8, advantage_clip=1e9),
    "GRPO, std of all": GRPO(group=8, advantage_clip=1e9, whole_batch_std=True),
    "FlowDPPO": FlowDPPO(group=8, advantage_clip=1e9),
    "GRPOGuard": GRPOGuard(group=8, advantage_clip=1e9),
    "PCPO": PCPO(group=8, advantage_clip=1e9),
    "DiffusionNFT": DiffusionNFT(advantage_clip=1e9),
    "TDPO": TDPO(),
    "ScoreAsActionReleased": ScoreAsActionReleased(advantage_clip=1e9),
}


def residue(value: float, spacings: int = 1) -> Tensor:
    """Seven equal rewards, and one that is so many spacings larger."""
    rewards = torch.full((8,), value)
    for _ in range(spacings):
        rewards[3] = torch.nextafter(rewards[3], torch.tensor(math.inf))
    return rewards


def advantages(method: str, rewards: Tensor, noise: float = 0.0) -> Tensor:
    """Of one prompt; a value network, where one is asked for, says 0 and some noise."""
    rollout = bare(rewards)
    generator = torch.Generator().manual_seed(0)
    values = noise * torch.randn(len(rewards), 4, generator=generator)
    values[:, -1] = rewards
    return METHODS[method].advantages(dataclasses.replace(rollout, values=values))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("value", [0.35, -7.0, 1e-6, 3e5])
def test_a_last_digit_is_no_advantage_whatever_the_offset(value, offset):
    rewards = residue(value)
    assert len(set(rewards.tolist())) == 2
    assert standardised(rewards, offset).abs().max() <= ALMOST_NONE
    assert standardised(rewards.flip(0), offset).abs().max() <= ALMOST_NONE


@pytest.mark.parametrize("value", [0.35, 3e5])  # beside which no offset is large
@pytest.mark.parametrize("method", METHODS)
def test_no_method_learns_from_a_last_digit(method, value):
    # in ScoreAsActionReleased V is 0 but at the end, so that its differences are the rewards
    assert advantages(method, residue(value)).abs().max() <= ALMOST_NONE


def test_the_noise_of_a_value_network_is_not_blown_up_where_rewards_say_nothing():
    assert advantages("TDPO", residue(0.35), noise=1e-3).abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_a_genuine_difference(method):
    rewards = torch.tensor([0.35] * 7 + [0.36])
    # 7/8 d over a standard deviation of sqrt(7)/8 d is sqrt(7), less by offsets of up to 1e-4
    expected = 7**0.5
    largest = advantages(method, rewards)[7].max().item()
    assert 0.9 * expected < largest < 1.01 * expected


@pytest.mark.parametrize("times", [10, 1e3])
def test_standard_deviations_far_above_rounding_are_untouched_to_the_bit(times):
    step = times * SPACINGS * EPS
    rewards = 0.35 * (1 + step * torch.tensor([[0.0, 3.0, -2.0, 1.0], [5.0, 0.0, 1.0, 1.0]]))
    plain = rewards.std(-1, correction=0, keepdim=True)
    assert torch.equal(floored_std(rewards), plain)
    for offset in OFFSETS:
        expected = (rewards - rewards.mean(-1, keepdim=True)) / (plain + offset)
        assert torch.equal(standardised(rewards, offset), expected)


def test_equal_rewards_have_no_advantage_at_all():
    rewards = torch.full((3, 7), 0.35)  # whose mean in float32 is another number
    rewards[2] = 0.0
    for offset in OFFSETS:
        assert standardised(rewards, offset).abs().max() == 0
        assert standardised(rewards[:, :1], offset).abs().max() == 0


def test_rewards_are_alike_up_to_the_stated_multiple_of_their_spacing():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    rewards[0, 1] -= 0.99 * SPACINGS * EPS
    rewards[1, 1] -= 1.01 * SPACINGS * EPS
    assert all_alike(rewards).tolist() == [True, False, False, True]
    torch.testing.assert_close(rounding(rewards)[2], torch.tensor([SPACINGS * EPS]))


def test_ranks_are_mean_ranks():
    rewards = torch.tensor([[3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 2.0, 1.0], [4.0, 4.0, 4.0, 4.0]])
    assert ranks(rewards).tolist() == [[2, 0, 1, 3], [1, 1, 3, 1], [1.5] * 4]


def test_ranks_and_preferences_tie_by_rounding_and_keep_every_genuine_order():
    assert ranks(residue(0.35)).unique().tolist() == [3.5]
    rewards = torch.cat([residue(0.35), 0.35 + 0.01 * torch.arange(1.0, 9.0)])
    preferred = FromReward()(torch.zeros(16, 3, 1, 1), [""] * 16, rewards, range(16), 16)
    for i, j in itertools.pairwise(range(16)):
        assert (preferred[i] == preferred[j]) == (j < 8)
        assert preferred[i] <= preferred[j]


def test_a_value_network_is_not_scaled_by_a_last_digit():
    network = ResidualValueOfVectors(2, 1, generator=torch.Generator())
    network.calibrate(residue(0.35))
    assert network.scale.item() == 1
    network.calibrate(torch.tensor([0.35, 0.36, 0.37]))
    torch.testing.assert_close(network.scale, torch.tensor(0.01), rtol=1e-4, atol=0)
