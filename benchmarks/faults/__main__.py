"""How often does a run keep its promises when faults are done to it?

Every module of ``ROWS`` has a function ``rows(folder, *, sample)`` that does its faults in
``folder``, ``sample`` for the short part of ``.ci/run``, and yields one ``Row`` for each kind. It
runs in a process of its own, two at a time, forked from one that has imported the library.
"""

import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import tyro

from benchmarks.faults import small_run
from benchmarks.faults.row import Row, table
from diffusion_envs.runs.run_folder import commit, versions

ROWS: tuple[str, ...] = (  # modules of this package, in the order of the table
    "kills",
    "damaged_files",
    "full_disk",
    "signals",
    "folders",
    "memory",
    "numbers",
    "bad_rewards",
    "resume_points",
    "processes",
)
_LONG = ("processes", "kills")  # begun first
_AT_ONCE = 2
_LONGEST = 1500.0  # seconds that a module may take


def rows_of(module: str, *, sample: bool) -> list[Row]:
    """The rows of one module; a failed one for what it did not do."""
    with tempfile.TemporaryDirectory(prefix=f"faults-{module}-") as folder:
        written = Path(folder) / "rows.jsonl"
        child = os.fork()
        if not child:
            _write_rows(module, Path(folder), written, sample)
        code = _ended(child)
        lines = written.read_text().splitlines() if written.is_file() else []
        rows = [Row(**json.loads(line)) for line in lines]
    if code or not rows:
        why = "no row" if not code else f"exit code {code}; the error is above"
        rows.append(Row(module, "the whole module", "its faults are done", 1, 0, why))
    return rows


def _write_rows(module: str, folder: Path, written: Path, sample: bool) -> None:
    """What the process of a module does; it never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        small_run.end_with_parent()
        small_run.rebuild_threads()
        done = importlib.import_module(f"benchmarks.faults.{module}").rows(folder, sample=sample)
        with written.open("a") as file:
            for row in done:
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                words = f"{module}: {row.fault}, {row.where}: {row.held} of {row.tried}"
                print(words, row.notes, file=sys.stderr, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(child: int) -> int:
    """Exit code of a process, which is killed with its children if it takes too long."""
    end = time.monotonic() + _LONGEST
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def conditions(seconds: float, *, sample: bool) -> str:
    """Under which the table was made, in a sentence."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"`python -m benchmarks.faults{' --sample' if sample else ''}` took {seconds / 60:.1f} "
        f"minutes on {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), "
        f"{_AT_ONCE} modules at a time with {torch.get_num_threads()} thread each; commit "
        f"{(commit() or 'unknown')[:10]}, {libraries}."
    )


def main(
    modules: Annotated[tuple[str, ...], tyro.conf.Positional] = ROWS, *, sample: bool = False
) -> None:
    """Do the faults and print the table; the exit code says whether every promise held.

    Args:
        modules: which kinds of faults; all if left out.
        sample: few faults of each kind, as in ``.ci/run``.
    """
    began = time.monotonic()
    small_run.uninterrupted()  # imports everything, for all modules
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        begun = {
            module: pool.submit(rows_of, module, sample=sample)
            for module in sorted(modules, key=lambda module: module not in _LONG)
        }
        rows = [row for module in modules for row in begun[module].result()]
    print(f"{table(rows)}\n\n{summary(rows)} {conditions(time.monotonic() - began, sample=sample)}")
    broken = [row for row in rows if not row.whole]
    if broken:  # last, where a long log is read
        print(f"\nPromises that were broken:\n\n{table(broken)}")
    sys.exit(1 if broken or not rows else 0)


def summary(rows: Sequence[Row]) -> str:
    """The totals, in a sentence."""
    tried, held = sum(row.tried for row in rows), sum(row.held for row in rows)
    return f"Of {tried} faults {held} left every promise kept."


if __name__ == "__main__":
    tyro.cli(main)
