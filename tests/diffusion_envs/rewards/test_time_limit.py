"""A reward that hangs ends a run in good order, wherever it is asked, and the process can end."""

import contextvars
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_envs import objectives, rewards, sd15
from diffusion_envs.rewards import RewardError, Weighted, limited, within
from diffusion_envs.rewards.daemon_threads import DaemonThreads
from diffusion_envs.runs.evaluation import evaluate, require_same_rewards
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.over_optimisation import metrics
from diffusion_envs.runs.settings import describe, differences
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.update_size import UpdateSize

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 5).view(3, 3, 4, 5)
PROMPTS = ["a cat", "a ship", "a frog"]
LATE = 0.05  # seconds: what hangs is late after any time
AMPLE = 60.0  # and what does not is not


class Hanging:
    """A reward that hangs from its n-th call until the test is over."""

    differentiable = True

    def __init__(self, released: threading.Event, at: int = 1) -> None:
        self.released, self.left, self.daemons = released, at, []

    def _hang(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.daemons.append(threading.current_thread().daemon)
            self.released.wait()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self._hang()
        return images.mean((1, 2, 3))

    def embedding(self, images: Tensor) -> Tensor:
        self._hang()
        return images.flatten(1)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set when the test ends, so that no thread outlives it."""
    released = threading.Event()
    yield released
    released.set()


def test_what_is_late_is_named_with_its_pictures_and_the_time(released):
    hanging = Hanging(released)
    with pytest.raises(RewardError, match=r"Hanging on pictures 7 to 9: no answer within 0\.05 s"):
        limited(LATE, rewards.score, range(7, 10))(hanging, IMAGES, PROMPTS)
    assert hanging.daemons == [True]
    with pytest.raises(RewardError, match=r"Hanging on picture 4: no answer"):
        limited(LATE, rewards.score, [4, 4, 4])(hanging, IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r"Hanging on pictures 0 to 2: no answer"):
        limited(LATE, rewards.differentiable_score)(hanging, IMAGES, PROMPTS)


def test_a_part_of_a_sum_is_named(released):
    total = Weighted({"red": (rewards.Colour("red"), 1.0), "slow": (Hanging(released), 1.0)})
    with pytest.raises(RewardError, match="slow of Weighted"):
        rewards.score_in_parts(total, IMAGES, PROMPTS, limited(LATE, rewards.score, range(3)))


def test_without_a_limit_there_is_no_thread():
    asked = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append(threading.current_thread())
        return images.mean((1, 2, 3))

    limited(None, rewards.score, range(3))(reward, IMAGES, PROMPTS)
    assert asked == [threading.current_thread()]
    assert limited(None, rewards.score) is rewards.score


def test_what_is_in_time_is_as_without_a_limit():
    word = contextvars.ContextVar("word", default="")
    word.set("here")

    def told(images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert word.get() == "here"
        return images.mean((1, 2, 3))

    with torch.no_grad():
        assert not within(AMPLE, torch.is_grad_enabled, "it", IMAGES)
    asked = limited(AMPLE, rewards.score)(told, IMAGES, PROMPTS)
    assert torch.equal(asked, rewards.score(told, IMAGES, PROMPTS))

    def slope(ask: rewards.Scorer) -> Tensor:
        leaf = IMAGES.clone().requires_grad_()
        values = ask(lambda images, prompts: images.square().sum((1, 2, 3)), leaf, PROMPTS)
        return torch.autograd.grad(values.sum(), leaf)[0]

    timed = limited(AMPLE, rewards.differentiable_score)
    assert torch.equal(slope(timed), slope(rewards.differentiable_score))


def test_errors_come_out_as_without_a_limit():
    def failing(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise TimeoutError("of its own")

    told = []
    for seconds in (None, AMPLE):
        with pytest.raises(RewardError, match="raised TimeoutError") as raised:
            limited(seconds, rewards.score)(failing, IMAGES, PROMPTS)
        told.append(str(raised.value))
    assert told[0] == told[1]
    with pytest.raises(TimeoutError, match="of its own"):
        within(AMPLE, partial(failing, IMAGES, PROMPTS), "it", IMAGES)
    with pytest.raises(SystemExit):
        within(AMPLE, sys.exit, "it", IMAGES)


def test_a_signal_arrives_while_a_reward_is_waited_for(released):
    class Asked(Hanging):
        def _hang(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)  # once the main thread waits, or just before
            super()._hang()

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            limited(AMPLE, rewards.score)(Asked(released), IMAGES, PROMPTS)
    finally:
        signal.signal(signal.SIGINT, former)


def test_calls_come_in_order_and_what_has_not_begun_can_be_dropped(released):
    threads, order = DaemonThreads(), []
    began = threading.Event()

    def call(k: int) -> int:
        order.append(k)
        if k == 3:
            began.set()
            released.wait()
        return k

    futures = [threads.submit(partial(call, k)) for k in range(5)]
    assert [future.result() for future in futures[:3]] == [0, 1, 2]
    began.wait()
    threads.close()
    assert futures[4].cancelled()
    released.set()
    assert futures[3].result() == 3
    assert order == [0, 1, 2, 3]


def test_several_calls_are_made_at_once_but_no_more_than_asked():
    threads, both = DaemonThreads(2), threading.Barrier(2)
    futures = [threads.submit(lambda: both.wait(AMPLE)) for _ in range(4)]
    assert sorted(future.result() for future in futures) == [0, 0, 1, 1]  # two by two
    threads.close()


SCRIPT = """
import sys, threading, torch
from diffusion_envs import rewards
from diffusion_envs.rewards import RewardError, limited

def hanging(images, prompts):
    threading.Event().wait()

for reward in (hanging, rewards.Remote(sys.argv[1])):
    try:
        limited(0.3, rewards.score)(reward, torch.zeros(1, 3, 4, 4), ["a cat"])
    except RewardError as error:
        print(str(error).partition(" (")[0], flush=True)
"""


@pytest.mark.slow
def test_the_process_ends_while_a_reward_and_a_server_hang():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, url], capture_output=True, text=True, timeout=60
        )
    assert ended.stdout.splitlines() == [
        f"reward {name} on picture 0: no answer within 0.3 s" for name in ("hanging", "Remote")
    ], ended.stderr
    assert ended.returncode == 0


# -- in a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return sd15.StableDiffusion("tiny").load(device=torch.device("cpu"), batch=4, seed=0)


def environment_of(model, reward, seconds: float | None = LATE):
    return make_environment(
        model,
        sampler=DDIM(),
        steps=2,
        reward=reward,
        prompts=["a photo of a cat"],
        seed=0,
        batch=2,
        reward_timeout=seconds,
    )


def test_wherever_a_run_asks_a_reward_there_is_a_limit(model, released):
    red = rewards.Colour("red")
    seen = evaluate(environment_of(model, red), 4)
    hanging = partial(Hanging, released)
    with pytest.raises(RewardError, match="Hanging on pictures 2 to 3"):
        evaluate(environment_of(model, hanging(at=2)), 4)
    with pytest.raises(RewardError, match="Hanging on pictures 0 to 3"):
        evaluate(environment_of(model, red), 4, judges={"slow": hanging()})
    environment = environment_of(model, hanging(at=2))
    with pytest.raises(RewardError, match="Hanging on pictures 2 to 3"):
        require_same_rewards(seen, environment, {}, 2, Path("before.safetensors"))
    states = torch.zeros(2, *model.event)
    with pytest.raises(RewardError, match="Hanging on pictures 0 to 1"):
        environment_of(model, hanging()).differentiable_reward(states, torch.tensor([0, 0]))
    with pytest.raises(RewardError, match=r"embedding of Hanging \(slow\) on 4 pictures: no answ"):
        metrics(seen, seen, {"slow": hanging()}, reward_timeout=LATE)


@pytest.mark.slow
def test_a_run_ends_in_good_order_and_goes_on_where_the_reward_was_late(tmp_path, released):
    def run(reward, resume: bool = False, **options):
        return sd15.finetune(
            sd15.StableDiffusion("tiny", lora_rank=2),
            reward=reward,
            prompts=["a photo of a cat"],
            objective=objectives.DDPO(),
            output=tmp_path / "run",
            steps=2,
            updates=2,
            size=UpdateSize(samples=4, batch=2),
            options=RunOptions(evaluation_samples=2, progress=False, **options),
            resume=resume,
        )

    # its calls: one for the evaluation before, two an update; the second update's last is late
    with pytest.raises(RewardError, match=r"Hanging on pictures 6 to 7: no answer within 3 s"):
        run(Hanging(released, at=5), reward_timeout=3.0)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert "step-000001" in names
    assert run(Hanging(released, at=99), resume=True, reward_timeout=AMPLE).reward.n == 2


def test_the_limit_may_differ_on_resuming_and_must_be_a_time():
    then, now = (describe(RunOptions(reward_timeout=t)) for t in (None, 5.0))
    assert differences({"options": then}, {"options": now}) == []
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="reward_timeout must be a number of seconds"):
            RunOptions(reward_timeout=bad)
