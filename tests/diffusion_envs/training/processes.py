"""Two processes of one run, for the tests of what they must agree on."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[3]
# A process leaves as soon as it has done its part: torch's own threads sometimes abort an
# interpreter that winds up, which is no matter of what is tested.
LEAVE = "\nimport os, sys\nsys.stdout.flush(), sys.stderr.flush(), os._exit(0)\n"


def run_two(code: str, *arguments: Path, timeout: float = 300) -> None:
    """Run the code in two processes of one world, on one thread each.

    Args:
        code: Python; what it must say it writes into files.
        arguments: ``sys.argv[1:]`` of both.
        timeout: seconds for each of them.

    Raises:
        AssertionError: one of them failed; the message is what it wrote to its error output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        started = list[subprocess.Popen[str]]()
        for rank in ("0", "1"):
            process = subprocess.Popen(
                [sys.executable, "-c", code + LEAVE, *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(stack.enter_context(process))
            stack.callback(process.kill)  # before it is waited for: the other one may have failed
        for process in started:
            errors = process.communicate(timeout=timeout)[1]
            assert process.returncode == 0, errors
