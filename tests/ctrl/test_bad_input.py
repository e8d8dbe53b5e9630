"""The sweep of ``bad_input`` in a process of its own, where nothing else checks types."""

import subprocess
import sys
from pathlib import Path


def test_no_function_takes_input_that_does_not_fit():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.ctrl.bad_input"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
