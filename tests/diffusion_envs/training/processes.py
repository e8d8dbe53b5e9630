"""Worlds of several processes, for the tests of what they must agree on."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_worlds(
    module: str, *arguments: Path, sizes: Sequence[int] = (2,), timeout: float = 300
) -> None:
    """Run ``module.main(*arguments)`` in every process of worlds of these sizes, in turn.

    One process imports the module and forks all others, on one thread each: imports cost more than
    most of what is tested.

    Args:
        module: of the tests; what ``main`` must say it writes into files.
        arguments: of ``main``.
        sizes: of the worlds.
        timeout: seconds for all of them.

    Raises:
        AssertionError: one of them failed; the message is what it wrote to its error output.
    """
    code = f"import sys; from pathlib import Path; from {module} import main\n"
    code += "from tests.diffusion_envs.training.processes import fork_worlds\n"
    code += f"fork_worlds(main, [Path(word) for word in sys.argv[1:]], {list(sizes)})"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fork_worlds(main: Callable[..., None], arguments: list[Path], sizes: Sequence[int]) -> None:
    """Run the worlds, from a process that has no thread but its first; exit with 1 if one fails."""
    for size in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children = [_forked(main, arguments, rank, size) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"the processes of a world of {size} ended with {codes}")


def _forked(main: Callable[..., None], arguments: list[Path], rank: int, size: int) -> int:
    """The number of a process that runs ``main`` as one of several."""
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    code = 0
    try:
        main(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
