"""Several processes make the run of one, also where one is lost; and the rows can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Forks, so in a process of its own. Planted: a gradient is the mean of the processes' own means,
# of which shares of one and two paths make another one.
CODE = """
import json, sys
from pathlib import Path
from benchmarks.faults import processes, small_run
from verification.planting import Edit, planted

folder, alone = Path(sys.argv[1]), small_run.uninterrupted().folder
lost = processes.Lost(1, "update", 2, processes.kill)
wrong = {
    "2": processes.whole(folder / "2", [2], alone),
    "4, 1, 4": processes.whole(folder / "4, 1, 4", [4, 1, 4], alone),
    "killed": processes.survived(folder / "killed", lost, processes.SOON, alone),
}
mean = Edit(
    "diffusion_envs.objectives.path_steps.PathLosses.losses",
    "yield self.objective.loss(rows).sum() * steps / len(which)",
    "yield self.objective.loss(rows).sum() * steps / len(mine) / 3",
)
with planted(mean):
    wrong["planted"] = processes.whole(folder / "planted", [3], alone)
print(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What is wrong with each run, in words."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path_factory.mktemp("worlds"))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "4, 1, 4"])
def test_so_many_processes_make_the_run_of_one(processes, wrong):
    assert wrong[processes] is None


@pytest.mark.slow
def test_a_killed_process_is_named_and_one_process_goes_on(wrong):
    assert wrong["killed"] is None


@pytest.mark.slow
def test_a_mean_of_means_is_seen(wrong):
    assert wrong["planted"] is not None
