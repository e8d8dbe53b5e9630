"""A server that fails in the middle of a run ends it with a checkpoint, from which it goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.rewards.serve import RewardServer
from diffusion_envs.runs import checkpoint
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.models.small_pipelines import small_pipeline
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = [
    pytest.mark.filterwarnings("default"),  # diffusers and transformers deprecate freely
    pytest.mark.slow,
]

SMALL: dict[str, Any] = {
    "prompts": ["a photo of a cat", "a photo of a ship"],
    "steps": 3,
    "updates": 3,
    "size": UpdateSize(samples=4, batch=8, value_epochs=1),
    "lora_rank": 2,
    "evaluation_samples": 4,
    "picture_every": 2,
    "progress": False,
    "device": "cpu",
}
RED = rewards.Colour("red")


class Failing:
    """Red, until a call in which the server does something else."""

    def __init__(self, at: int, does: Any) -> None:
        self.left, self.does = at, does

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        self.left -= 1
        return RED(images, prompts) if self.left else self.does(images)


def killing(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that kills its own process in the call that its environment names."""
    os.environ["LEFT"] = str(int(os.environ["LEFT"]) - 1)
    if os.environ["LEFT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return RED(images, prompts)


@contextmanager
def serving(reward: rewards.Reward) -> Iterator[RewardServer]:
    server = RewardServer(reward, name="redness", version="1", port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def remote(url: str) -> rewards.Remote:
    """Exact, so that what is scored there is what is scored here."""
    return rewards.Remote(url, format="float32", retries=1, backoff=0.01, timeout=60.0)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in found]


def assert_the_same(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    name = "pytorch_lora_weights.safetensors"
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few thousand weights: it is the runs that are compared."""
    folder = tmp_path_factory.mktemp("small") / "model"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose server never fails."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with serving(RED) as server:
        finetune(model, reward=remote(server.url), output=folder, **SMALL)
    return folder


# One evaluation is 1 request, an update 3 (final pictures, and twelve denoised ones in two parts):
# request 1 comes before the first update, 8 is for the pictures of the second, which is made again
# with them, and 10 is in the third.
@pytest.mark.parametrize(("at", "done"), [(1, 0), (8, 1), (10, 2)])
def test_a_failing_server_ends_the_run_which_goes_on_bit_for_bit(model, whole, tmp_path, at, done):
    folder = tmp_path / "run"

    def nan(images: Tensor) -> Tensor:
        return torch.full((len(images),), float("nan"))

    with (
        serving(Failing(at, nan)) as server,
        pytest.raises(
            rewards.RewardError,
            match=rf"reward redness at {server.url}, request {at}: answered with status 500: .*"
            "must be finite",
        ),
    ):
        finetune(model, reward=remote(server.url), output=folder, **SMALL)
    kept = checkpoint.latest(folder / "checkpoints")
    assert kept is not None
    assert kept.step == done
    with serving(RED) as server:  # on another port
        finetune(model, reward=remote(server.url), output=folder, resume=True, **SMALL)
    assert_the_same(folder, whole)


def test_a_server_that_is_killed_ends_the_run_which_goes_on_bit_for_bit(model, whole, tmp_path):
    folder = tmp_path / "run"
    words = [f"{__name__}:killing", "--port", "0", "--version", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "diffusion_envs.rewards.serve", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"LEFT": "5"},
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        with pytest.raises(
            rewards.RewardError,
            match=rf"reward {words[0]} at {url}, request 5: connection refused; gave up after 2",
        ):
            finetune(model, reward=remote(url), output=folder, **SMALL)
        assert process.wait(60) == -signal.SIGKILL
    kept = checkpoint.latest(folder / "checkpoints")
    assert kept is not None
    assert kept.step == 1  # of requests 2 to 4
    with serving(RED) as server:
        finetune(model, reward=remote(server.url), output=folder, resume=True, **SMALL)
    assert_the_same(folder, whole)


def test_another_reward_at_the_same_address_is_refused_when_the_run_goes_on(model, tmp_path):
    folder = tmp_path / "run"
    with (
        serving(Failing(3, lambda images: None)) as server,
        pytest.raises(rewards.RewardError, match="request 3"),
    ):
        finetune(model, reward=remote(server.url), output=folder, **SMALL)
    with (
        serving(rewards.Colour("blue")) as server,
        pytest.raises(ValueError, match="reward is not the one that this run was started"),
    ):
        finetune(model, reward=remote(server.url), output=folder, resume=True, **SMALL)
