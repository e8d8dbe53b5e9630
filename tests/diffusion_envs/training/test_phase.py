"""The phase of a run: the innermost of this thread, told to whoever observes, also in runs."""

import threading

import pytest

from diffusion_envs import rewards
from diffusion_envs.training.phase import START, current, observed, phase
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.sd15.calling import finetune


def test_the_innermost_phase_counts_and_ends_with_its_context():
    told: list[str] = []

    @phase("update")
    def update() -> str:
        return current()

    def fail() -> None:
        with phase("sampling"):
            assert current() == "sampling"
            assert update() == "update"
            raise KeyError

    with observed(told.append), pytest.raises(KeyError):
        fail()
    assert current() == START
    assert told == [START, "sampling", "update", "sampling", START]


def test_every_thread_has_its_own():
    seen: list[str] = []
    with phase("rewards"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [START]


def test_a_run_goes_through_all_of_them(tmp_path):
    seen: list[str] = []
    with observed(seen.append):
        finetune(
            reward=rewards.Colour("red"),
            prompts=["a cat"],
            output=tmp_path / "run",
            lora_rank=2,
            steps=2,
            updates=1,
            size=UpdateSize(samples=2, value_epochs=1),
            evaluation_samples=2,
            progress=False,
        )
    assert list(dict.fromkeys(seen)) == [
        *("start", "checkpoint", "evaluation", "rewards", "sampling", "update", "value network"),
        *("export", "report"),
    ]
