"""Evaluation sample by sample: prompts, noise and judges are where they belong."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffusion_envs.environment import Environment
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.runs.evaluation import HELD_OUT, WATCHED, evaluate

PROMPTS = ["one", "two", "three"]
SAMPLES = 7  # not a multiple of the prompts


class ByPrompt:
    """Brightness, plus a number of its own for each prompt."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        places = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        return images.mean((1, 2, 3)) + 10 * places


@pytest.fixture
def environment(small_trainer) -> Environment:
    made = small_trainer(ScoreAsAction()).environment
    made.reward = ByPrompt()
    return made


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_prompts_go_on_in_turn_whatever_the_batch(environment, batch):
    """Two and four are no multiples of the three prompts."""
    seen = evaluate(environment, SAMPLES, batch=batch)
    assert seen.prompts == [PROMPTS[i % 3] for i in range(SAMPLES)]
    expected = ByPrompt()(seen.images, seen.prompts)
    torch.testing.assert_close(seen.rewards, expected, rtol=1e-6, atol=1e-6)
    assert (seen.rewards / 10).floor().int().tolist() == [i % 3 for i in range(SAMPLES)]


def test_a_sample_is_the_same_in_every_batch(environment):
    whole, cut = (evaluate(environment, SAMPLES, batch=batch) for batch in (7, 3))
    torch.testing.assert_close(cut.images, whole.images, rtol=1e-5, atol=1e-5)
    assert (whole.images[0] - whole.images[3]).abs().max() > 0.01  # of one prompt: other noise


def test_judges_see_each_image_with_its_prompt(environment):
    """What a judge is told of every sample, against direct calls, one sample at a time."""
    judge = ByPrompt()
    environment.reward = lambda images, prompts: images.amax((1, 2, 3))
    seen = evaluate(environment, SAMPLES, judges={"judge": judge}, batch=3)
    for i in range(SAMPLES):
        alone = judge(seen.images[i : i + 1], seen.prompts[i : i + 1])
        torch.testing.assert_close(seen.judged["judge"][i : i + 1], alone, rtol=1e-6, atol=1e-6)
    assert len(set(seen.judged["judge"].tolist())) == SAMPLES


def test_no_noise_is_shared_by_training_evaluation_and_what_is_watched(environment):
    """Starts of the first samples; they are drawn from streams of their own."""

    def starts(stream: str) -> Tensor:
        condition = torch.arange(SAMPLES) % 3
        policy = ScoreAsAction().policy
        rollout = environment.sample(policy, range(SAMPLES), condition, stream=stream).rollout
        return torch.cat([rollout.states[:, :1], rollout.noises], dim=1).flatten(0, 1)

    every = torch.cat([starts(stream) for stream in ("train", HELD_OUT, WATCHED)]).flatten(1)
    gaps = (every[:, None] - every[None]).abs().amax(2) + torch.eye(len(every))
    assert gaps.min() > 1e-3


def test_evaluation_draws_from_the_held_out_stream(environment):
    seen = evaluate(environment, SAMPLES)
    condition = torch.arange(SAMPLES) % 3
    for stream, same in ((HELD_OUT, True), ("train", False)):
        sample = environment.sample(
            ScoreAsAction().policy, range(SAMPLES), condition, stream=stream
        )
        assert torch.allclose(sample.images, seen.images, atol=1e-5) == same


def test_denoised_images_are_judged_with_their_own_prompts(environment):
    """Two and more prompts, every node of every path, against the reward of the last image."""
    condition = torch.tensor([2, 0, 1, 2])
    sample = environment.sample(
        ScoreAsAction().policy, range(4), condition, stream="train", denoised=True
    )
    assert sample.denoised_rewards is not None
    places = (sample.denoised_rewards / 10).floor().int()  # brightness is in [0, 1]
    assert torch.equal(places, condition[:, None].expand(4, 5).int())
    assert torch.equal(sample.denoised_rewards[:, -1], sample.rollout.rewards)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_pictures_are_judged_in_chunks_with_the_same_rewards(environment, batch):
    asked = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append(len(images))
        return ByPrompt()(images, prompts)

    environment.reward, environment.batch = reward, batch
    condition = torch.tensor([2, 0, 1, 2])
    sample = environment.sample(
        ScoreAsAction().policy, range(4), condition, stream="train", denoised=True
    )
    assert max(asked) <= batch
    assert sum(asked) == environment.reward_queries == 4 * 5
    expected = ByPrompt()(sample.images, sample.prompts)
    torch.testing.assert_close(sample.rollout.rewards, expected, rtol=1e-6, atol=1e-6)
