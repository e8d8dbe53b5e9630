"""Rewards without weights of others, and those around rewards, on a device: the CPU's numbers."""

import pytest
import torch

from diffusion_envs import rewards
from tests.device.counting import counting
from tests.device.memory import NAME
from tests.diffusion_envs.rewards.test_shipped import CASES, COMPOSED

OWN = {name: case for name, case in (CASES | COMPOSED).items() if "text" not in name}


@pytest.mark.parametrize("name", OWN)
def test_scores_and_gradients_are_those_of_the_cpu(name, generator):
    case = OWN[name]
    images = torch.rand(5, 3, 32, 32, generator=generator)
    results = {}
    for device in ("cpu", NAME):
        leaf = images.to(device).requires_grad_()
        scores = rewards.score(case.reward, leaf.detach(), case.prompts)
        slope = torch.zeros(1)
        if getattr(case.reward, "differentiable", False):
            valued = rewards.differentiable_score(case.reward, leaf, case.prompts)
            assert valued.device == leaf.device
            (slope,) = torch.autograd.grad(valued.sum(), leaf)
        results[device] = scores, slope.cpu()
    # the same arithmetic on the same memory: the simulated device computes as the CPU does
    for ours, theirs in zip(results[NAME], results["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["limited", "cached", "weighted, differentiable"])
def test_what_is_around_a_reward_answers_on_its_device(name, generator):
    images = torch.rand(5, 3, 32, 32, generator=generator).to(NAME)
    case = OWN[name]
    for _ in range(2):  # the second time from memory, if there is one
        assert case.reward(images, list(case.prompts)).device == images.device


def test_each_part_of_a_sum_waits_as_it_does_alone(generator):
    images = torch.rand(5, 3, 32, 32, generator=generator).to(NAME)
    prompts = ["a cat"] * 5

    def waits(reward: rewards.Reward) -> int:
        with counting() as counts:
            rewards.score_in_parts(reward, images, prompts)
        return counts.synchronised

    colour, jpeg = rewards.Colour(), rewards.JpegCompressibility()
    both = rewards.Weighted({"red": (colour, 1.0), "jpeg": (jpeg, 0.1)})
    assert waits(both) == waits(colour) + waits(jpeg)
