"""Rewards that are networks, on a device: the CPU's scores and gradients, and one wait."""

import pytest
import torch

from tests.device.counting import counting
from tests.device.memory import NAME
from tests.diffusion_envs.rewards.learned import CASES

WAITS = 1  # the range of the pictures is read; whatever their number


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_scores_and_gradients_are_those_of_the_cpu(case, tmp_path):
    generator = torch.Generator().manual_seed(5)
    state = case.state(generator)
    images, prompts = torch.rand(4, 3, 41, 58, generator=generator), list(case.prompts)
    results = {}
    for device in ("cpu", NAME):
        (tmp_path / device).mkdir()
        reward = case.make(case.write(tmp_path / device, state), batch=3)
        leaf = images.to(device).requires_grad_()
        scores = reward(leaf, prompts)
        assert scores.device == leaf.device
        (slope,) = torch.autograd.grad(scores.sum(), leaf)
        vectors = reward.embedding(images.to(device))
        results[device] = [value.detach().cpu() for value in (scores, slope, vectors)]
    # the same arithmetic on the same memory: the simulated device computes as the CPU does
    for ours, theirs in zip(results[NAME], results["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * case.unit)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("batch", [1, 16])
def test_scoring_waits_for_the_device_once(case, batch, tmp_path):
    generator = torch.Generator().manual_seed(5)
    folder = case.write(tmp_path, case.state(generator))
    images, prompts = torch.rand(4, 3, 41, 58, generator=generator).to(NAME), list(case.prompts)
    reward = case.make(folder, batch=batch)
    reward(images, prompts)  # reads and sends the network
    with counting() as counts:
        reward(images, prompts)
    assert counts.synchronised == WAITS, counts.lines()
