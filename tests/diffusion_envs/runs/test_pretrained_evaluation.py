"""The pretrained model's evaluation is stored whole or not, and of the run's own reward."""

import dataclasses
import re
import resource
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.runs import evaluation
from diffusion_envs.runs.checkpoint import CheckpointError
from diffusion_envs.runs.evaluation import Evaluation, evaluate_pretrained

PROMPTS = ["a cat", "a ship", "a frog"]
JUDGES = {"blue": rewards.Colour("blue")}


def bright(images: Any, prompts: Any) -> Any:
    return images.mean((1, 2, 3))


class World:
    """An environment as far as it is asked here; the evaluations that are made are counted."""

    def __init__(self, monkeypatch, reward: Any = bright) -> None:
        self.made, self.asked = 0, []
        self.images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        self.environment = object.__new__(Environment)
        self.environment.model = SimpleNamespace(device=torch.device("cpu"))
        self.environment.reward, self.environment.prompts = reward, PROMPTS
        self.environment.score_images = self.score_images
        monkeypatch.setattr(evaluation, "evaluate", self.evaluate)

    def score_images(self, reward: Any, images: Any, prompts: Any) -> Any:
        self.asked.append(len(images))
        return rewards.score(reward, images, prompts)

    def evaluate(
        self,
        environment: Any,
        samples: int,
        *,
        judges: Any,
        batch: int,
        pretrained: bool,
        accelerator: Any,
    ):
        assert pretrained
        self.made += 1
        prompts = [PROMPTS[i % 3] for i in range(samples)]
        return Evaluation(
            rewards=rewards.score(environment.reward, self.images, prompts),
            judged={n: rewards.score(judge, self.images, prompts) for n, judge in judges.items()},
            path_kl=torch.zeros(samples),
            chain_kl=torch.zeros(samples),
            images=self.images,
            prompts=prompts,
        )

    def before(self, folder: Any, judges: Any = JUDGES) -> Evaluation:
        path = folder / "evaluation" / "before.safetensors"
        return evaluate_pretrained(self.environment, 5, path, judges=judges, batch=2)


def test_it_is_made_once_and_read_after_that(tmp_path, monkeypatch):
    world = World(monkeypatch)
    made, read = world.before(tmp_path), world.before(tmp_path)
    assert world.made == 1
    assert world.asked == [2, 2, 1, 5]  # the reward in the batches of a roll-out, the judge at once
    for name in ("rewards", "path_kl", "images"):
        assert torch.equal(getattr(made, name), getattr(read, name))
    assert torch.equal(made.judged["blue"], read.judged["blue"])
    assert made.prompts == read.prompts == ["a cat", "a ship", "a frog", "a cat", "a ship"]
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["before.safetensors"]


@pytest.mark.parametrize("kept", [0, 7, 200, -100])
def test_a_truncated_file_is_made_anew(kept, tmp_path, monkeypatch):
    world = World(monkeypatch)
    made = world.before(tmp_path)
    path = tmp_path / "evaluation" / "before.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    again = world.before(tmp_path)
    assert world.made == 2
    assert torch.equal(made.images, again.images)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_full_disk_is_told_and_leaves_nothing(limit, tmp_path, monkeypatch):
    world = World(monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"before\.safetensors: .* Free space"):
            world.before(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert list((tmp_path / "evaluation").iterdir()) == []
    world.before(tmp_path)


@pytest.mark.parametrize("constant", [0.01, 1.0, -0.3])
def test_another_reward_is_noticed_and_the_first_difference_named(constant, tmp_path, monkeypatch):
    world = World(monkeypatch)
    world.before(tmp_path)

    def other(images: Any, prompts: Any) -> Any:  # it differs on ships only
        return bright(images, prompts) + constant * torch.tensor([p == "a ship" for p in prompts])

    world.environment.reward = other
    then, now = (bright(world.images[1:2], []).item() + c for c in (0, constant))
    message = (
        f"reward is not the one .* picture 1 ('a ship') .* {then:.6g} then and scores {now:.6g}"
    )
    with pytest.raises(ValueError, match=re.sub(r"([()])", r"\\\1", message)):
        world.before(tmp_path)
    assert world.made == 1


def test_another_judge_is_noticed(tmp_path, monkeypatch):
    world = World(monkeypatch)
    world.before(tmp_path)
    with pytest.raises(ValueError, match="judge blue is not the one that this run"):
        world.before(tmp_path, {"blue": rewards.Colour("red")})


@pytest.mark.parametrize("rounding", [1 + 1e-5, 1 - 3e-4])
def test_another_rounding_is_the_same_reward(rounding, tmp_path, monkeypatch):
    world = World(monkeypatch)
    world.before(tmp_path)
    world.environment.reward = lambda images, prompts: rounding * bright(images, prompts)
    world.before(tmp_path)


def test_a_random_reward_is_let_through_for_nothing_can_be_known(tmp_path, monkeypatch, generator):
    def noisy(images: Any, prompts: Any) -> Any:
        return bright(images, prompts) + torch.randn(len(images), generator=generator)

    world = World(monkeypatch, noisy)
    world.before(tmp_path)
    world.before(tmp_path)
    assert world.made == 1


def test_a_file_of_another_number_of_samples_is_made_anew(tmp_path, monkeypatch):
    world = World(monkeypatch)
    world.before(tmp_path)
    path = tmp_path / "evaluation" / "before.safetensors"
    world.images = world.images[:4]
    fewer = evaluate_pretrained(world.environment, 4, path, judges=JUDGES, batch=2)
    assert world.made == 2
    assert len(fewer.rewards) == 4
    assert dataclasses.is_dataclass(fewer)
