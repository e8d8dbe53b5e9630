"""Each part of the table of faults can fail: a mistake is planted, and its row does not hold."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.faults import small_run
from benchmarks.faults.row import Row, table

ROOT = Path(__file__).parents[2]
WORDS = (  # a smaller run, for it is made seven times
    *("--model", "tiny", "--device", "cpu", "--guidance", "1", "--lora-rank", "1"),
    *("--reward", "red", "--prompts", "a photo of a cat", "a photo of a ship", "--steps", "2"),
    *("--updates", "2", "--samples", "4", "--batch", "8", "--value-epochs", "1"),
    *("--evaluation-samples", "2", "--picture-every", "9", "--no-progress"),
)


@contextmanager
def written_in_place(path: Path):
    """A file that is written under another name, which stays if it cannot be."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    partial.replace(path)


def without_moments(load_state: Any) -> Any:
    """A checkpoint is loaded, and the optimiser forgets."""

    def load(self: Any, state: Any) -> None:
        load_state(self, state | {"optimiser": self.optimiser.state_dict()})

    return load


def main(folder: Path) -> None:
    """In a process of its own, which must not differentiate: what each part says of its plant."""
    from benchmarks.faults import damaged_files, folders, full_disk, kills, signals, small_run
    from diffusion_envs import digests
    from diffusion_envs.runs import command_line, run_folder
    from diffusion_envs.training.trainer import Trainer

    small_run.WORDS, small_run.UPDATES = WORDS, 2
    whole, told = small_run.uninterrupted(), {}
    forgetful = without_moments(Trainer.load_state)
    with patch.object(Trainer, "load_state", forgetful):
        moments = iter([kills.in_phase("value network", 2, 0.0)])
        (kill,) = kills.one_run(folder / "kills" / "run", 1, moments, whole)
        told["kills"] = [kill.phase, kill.wrong]
    name = "pytorch_lora_weights.safetensors"
    kind = damaged_files.Kind(name, lambda run: digests.read_tensors(run / name)["weight"].tolist())
    with patch.object(digests, "of_tensors", lambda _: "the same"):
        path = folder / "bits" / kind.name
        path.parent.mkdir()
        digests.write_tensors(path, {"weight": torch.arange(200.0) / 7})
        damages = [damaged_files.flipped] * 20
        row = damaged_files.tries(kind, path.parent, damages, random.Random(3))
        told["damaged_files"] = [row.held, row.tried]
    with patch.object(run_folder, "whole", written_in_place):
        wrong = full_disk.ended(folder / "full" / "run", "config.json.partial:config.json", None)
        told["full_disk"] = wrong
    with patch.object(command_line, "interruptible", nullcontext):
        place, chance = folder / "signals" / "run", random.Random(1)
        one = signals.signalled(place, signal.SIGTERM, "start", chance, whole, twice=False)
        assert one is not None
        told["signals"] = one.wrong
    with patch.object(run_folder, "_locked", lambda _: nullcontext()):
        told["folders"] = folders.second(folder / "two", "update", whole)
    (folder / "told.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plants")
    code = "import sys; from pathlib import Path; from tests.benchmarks.test_faults import main"
    subprocess.run(
        [sys.executable, "-c", f"{code}; main(Path(sys.argv[1]))", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,
    )
    return json.loads((folder / "told.json").read_text())


@pytest.mark.slow
def test_a_checkpoint_that_forgets_the_optimiser_is_seen_by_kills(told):
    phase, wrong = told["kills"]
    assert phase == "value network"
    assert wrong.startswith("the end differs in ")


@pytest.mark.slow
def test_a_digest_that_is_not_checked_is_seen_by_damaged_files(told):
    held, tried = told["damaged_files"]
    assert tried == 20
    assert held < 10


@pytest.mark.slow
def test_a_file_that_is_left_half_written_is_seen_by_full_disk(told):
    assert "left behind" in told["full_disk"] or "not named" in told["full_disk"]


@pytest.mark.slow
def test_a_command_that_does_not_obey_is_seen_by_signals(told):
    assert told["signals"].startswith(f"exit code {-signal.SIGTERM}")


@pytest.mark.slow
def test_a_folder_without_a_lock_is_seen_by_folders(told):
    assert "exit code" in told["folders"]


@pytest.mark.parametrize(
    ("error", "excused"),
    [
        ("FileNotFoundError: [Errno 2] No such file", True),
        ("ValueError: task_done() called too many times", False),
    ],
)
def test_of_tensorboards_thread_only_an_error_of_the_system_is_excused(error, excused):
    said = (
        "Exception in thread Thread-1:\nTraceback (most recent call last):\n"
        f'  File "tensorboard/summary/writer/event_file_writer.py", line 244, in run\n{error}\n'
    )
    assert small_run.Ended(2, "start", said, 1.0).in_words == excused
    assert not small_run.Ended(2, "start", "Traceback (most recent call last):\n", 1.0).in_words
    assert small_run.Ended(2, "start", "error: [Errno 2] No such file\n", 1.0).in_words


def test_a_row_holds_only_whole_and_is_never_of_nothing():
    row = Row("a fault", "somewhere", "a promise", 4, 3, "the first")
    assert not row.whole
    assert "| 3 of 4 | the first |" in table([row])
    for tried, held in ((0, 0), (2, 3), (2, -1)):
        with pytest.raises(ValueError, match="held must be at most tried"):
            Row("a fault", "somewhere", "a promise", tried, held)
