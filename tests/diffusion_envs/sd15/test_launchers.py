"""Runs that torchrun and accelerate launch are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import processes, small_run
from diffusion_envs.runs import command_line
from diffusion_envs.sd15.__main__ import FAMILY

ROOT = Path(__file__).parents[3]
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": (
        *(
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
        ),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


REWARD = """
import os
from pathlib import Path
from diffusion_envs.rewards import Colour

def red(images, prompts):
    (Path(__file__).parent / os.environ.get("RANK", "alone")).touch()
    return Colour("red")(images, prompts)
"""


def launch(launcher: str, *words: str) -> str:
    """Run the command line in two processes; what they said."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "diffusion_envs.sd15", *words]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_that_torchrun_begins_and_accelerate_ends_is_that_of_one_process(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    words = [*small_run.WORDS]
    words[words.index("--reward") + 1] = f"{tmp_path / 'reward.py'}:red"
    words[words.index("--updates") + 1] = "1"
    launch("torchrun", *words, "--output", str(tmp_path / "two"))
    for rank in ("0", "1"):
        (tmp_path / rank).unlink()  # both were there
    launch("accelerate", "--resume", str(tmp_path / "two"), "--updates", "2", "--no-progress")
    for rank in ("0", "1"):
        (tmp_path / rank).unlink()
    words[words.index("--updates") + 1] = "2"
    assert command_line.main(FAMILY, [*words, "--output", str(tmp_path / "one")]) == 0
    assert processes.differs(tmp_path / "two", tmp_path / "one") is None
