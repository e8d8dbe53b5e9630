import pytest
import torch

from diffusion_envs.rewards.image_reward import ImageReward
from tests.diffusion_envs.rewards import plain_blip

PROMPTS = ["A cat, on a Sofa", "red dogs", "", "cat " * 40]
ROWS = [["a", "cat", ",", "on", "a", "so", "##fa"], ["red", "dog", "##s"], [], ["cat"] * 40]


@pytest.fixture(scope="module")
def tensors():
    return plain_blip.state(torch.Generator().manual_seed(16))


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    return plain_blip.write(tmp_path_factory.mktemp("image-reward"), tensors)


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 41, 58, generator=generator)


def test_scores_are_those_of_the_formulas(tensors, folder, images):
    expected = plain_blip.scores(tensors, images, ROWS)
    scores = ImageReward(folder)(images, PROMPTS)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
