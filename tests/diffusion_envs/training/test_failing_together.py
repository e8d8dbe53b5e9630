"""A reward that fails on one of two processes ends both, wherever it is asked; neither waits."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from diffusion_envs import objectives, rewards, sd15
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.training.processes import run_worlds

# objective; process that fails; its call that does. The first is its share of the
# evaluation of the pretrained model; an update has two calls, or more where they serve a slope.
CASES: dict[str, tuple[str, int, int]] = {
    "sampling": ("ScoreAsAction", 1, 4),
    "the main process's": ("ScoreAsAction", 0, 4),
    "targets before all processes meet": ("ZerothOrderAdjointMatching", 1, 6),
    "evaluation before the first update": ("ScoreAsAction", 0, 1),
}
UPDATES_DONE = {"evaluation before the first update": 0}  # of the others, 1


class Failing:
    """A reward that fails in its n-th call on one process."""

    def __init__(self, process: int, at: int) -> None:
        self.left = at if int(os.environ["RANK"]) == process else -1

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ConnectionError("the reward's server is gone")
        return rewards.Colour("red")(images, prompts)


def ended_by(name: str, output: Path) -> str:
    """What a run ends by on this process."""
    objective, process, at = CASES[name]
    made: Any = getattr(objectives, objective)
    settings = {"pairs": 1} if objective.startswith("Zeroth") else {}
    try:
        sd15.finetune(
            sd15.StableDiffusion("tiny", device="cpu", lora_rank=2),
            reward=Failing(process, at),
            prompts=["a photo of a cat", "a photo of a ship"],
            objective=made(**settings),
            output=output,
            steps=2,
            updates=3,
            size=UpdateSize(samples=4, batch=8, value_epochs=1),
            options=RunOptions(evaluation_samples=4, progress=False, checkpoint_every=50),
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    """One of two processes: every run in turn, and what it ends by."""
    ended = {name: ended_by(name, folder / name) for name in CASES}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(ended))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their runs, and what each ended by."""
    folder = tmp_path_factory.mktemp("processes")
    run_worlds(__name__, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_reward_that_fails_on_one_process_ends_both_after_the_last_whole_update(name, folder):
    for rank in range(2):
        words = json.loads((folder / f"{rank}.json").read_text())[name]
        assert words.startswith(f"RewardErrorOfAll: process {CASES[name][1]}: ")
        assert "the reward's server is gone" in words
    kept = checkpoint.latest(folder / name / "checkpoints")
    assert kept is not None
    assert kept.step == UPDATES_DONE.get(name, 1)
