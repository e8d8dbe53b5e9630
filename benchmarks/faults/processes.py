"""Several processes: do they make the run of one, and what if one of them dies, hangs or is slow?

A world is the run of ``small_run`` by several processes on the CPU, which meet as those of torchrun
do, at a store of who started them. Numbers are those of one process up to round-off: a network gets
other rows beside a row.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from benchmarks.faults import small_run
from benchmarks.faults.row import Row
from benchmarks.faults.small_run import Ended
from diffusion_envs.digests import read_tensors
from diffusion_envs.runs.tracking import read_metrics
from diffusion_envs.training import phase

SOON = 12.0  # seconds within which the others end, once they know: to find out who, and to store
PHASES = ("sampling", "rewards", "update", "value network", "evaluation")  # that all share
MAINS = ("checkpoint", "export", "report")  # in which the main process works and others wait
# Float32 sums in another order, and other rows beside a row: at most 256 units of round-off in a
# score (``score_rounding``); the optimiser, which divides by a gradient's size, makes some ten
# times as much of it in 3 updates. A mean of the means of uneven shares is off by 10 % and more.
SAME = 2e-3
COUNTS = ("update", "reward_queries", "network_calls")
NO_NUMBERS = ("seconds", "memory")
# round-off itself, or ratios of policies that are the same: 1 up to it
ROUND_OFF = ("ratio_min", "ratio_max", "clipped_fraction")

Fault = Callable[[], None]
_stores: Any = distributed  # public, but for the type checker


@dataclass(frozen=True)
class Lost:
    """What is done to one process of a world.

    Attributes:
        process: which one.
        phase: at its ``entry``-th beginning of this phase.
        entry: counted from 1.
        done: what is done.
    """

    process: int
    phase: str
    entry: int
    done: Fault


def timeout() -> float:
    """Seconds that processes wait for each other, where one hangs or is slow.

    On a busy machine a phase may take as long as a whole run otherwise does.
    """
    return max(6.0, 3 * small_run.uninterrupted().seconds)


def kill() -> None:
    """Die at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Hang for good."""
    os.kill(os.getpid(), signal.SIGSTOP)


def dawdle() -> None:
    """Be late, and go on."""
    time.sleep(timeout() + SOON + 6)


def linger() -> None:
    """Take longer than others, but not too long."""
    time.sleep(timeout() / 2)


def world(
    folder: Path,
    size: int,
    *,
    lost: Lost | None = None,
    more: Sequence[str] = (),
    words: Sequence[str] = small_run.WORDS,
) -> list[Ended | None]:
    """How each process of a world ended that began the run in ``folder``, or went on with it.

    None is said of one that hangs when all others have ended; it is killed.
    """
    store = _stores.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = (*words, "--output", str(folder))
    if (folder / "config.json").is_file():
        said = ("--resume", str(folder), "--no-progress")

    def member(rank: int) -> Callable[[], Any]:
        @contextmanager
        def joined() -> Iterator[None]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            os.environ |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            if lost is None or lost.process != rank:
                yield
                return
            with phase.observed(_struck(lost)):
                yield

        return joined

    processes = [small_run.Process(folder, (*said, *more), member(rank)) for rank in range(size)]
    hangs = None if lost is None or lost.done is not stop else processes[lost.process]
    ended = [None if process is hangs else process.wait() for process in processes]
    if hangs is not None:
        hangs.signal(signal.SIGKILL)
        hangs.wait()
    return ended


def _struck(lost: Lost) -> Callable[[str], None]:
    entries = 0

    def observe(name: str) -> None:
        nonlocal entries
        entries += name == lost.phase
        if name == lost.phase and entries == lost.entry:
            lost.done()

    return observe


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """Equality, changes of their number, and one row for each way to lose a process."""
    alone = small_run.uninterrupted().folder
    for size in (3,) if sample else (2, 3, 4):
        yield _row(
            "none",
            f"{size} processes",
            "the counts of one process, and its numbers up to round-off",
            [whole(folder / f"of {size}", [size], alone)],
        )
    if sample:
        yield lost_row(folder, "SIGKILL", kill, [("update", 1)], alone)
        return
    yield _row(
        "none",
        "4 processes, then 1, then 4",
        "the same",
        [whole(folder / "changing", [4, 1, 4], alone)],
    )
    shared = [(name, 1) for name in PHASES]
    yield lost_row(folder, "SIGKILL", kill, [*shared, *((name, 0) for name in MAINS)], alone)
    yield lost_row(folder, "SIGSTOP", stop, [*shared, ("checkpoint", 0)], alone)
    yield lost_row(folder, "too slow", dawdle, [*shared, ("report", 0)], alone)
    late = [
        whole(folder / f"late {name}", [2], alone, lost=Lost(1, name, 2, linger)) for name in PHASES
    ]
    yield _row("slow", f"process 1 of 2, in {', '.join(PHASES)}", "it is waited for", late)


def whole(folder: Path, sizes: Sequence[int], alone: Path, lost: Lost | None = None) -> str | None:
    """Run with so many processes one after another; what differs from one process, in words."""
    for k, size in enumerate(sizes):
        # one update more with each number of processes
        updates = small_run.UPDATES if len(sizes) == 1 else k + 1
        words = list(small_run.WORDS)
        words[words.index("--updates") + 1] = str(updates)
        more = ("--updates", str(updates)) if k else ()
        ended = world(folder, size, more=more, lost=lost, words=words)
        for each in ended:
            if each is None or each.code:
                return "a process that hung" if each is None else each.last
    return differs(folder, alone)


def lost_row(
    folder: Path, fault: str, done: Fault, where: Sequence[tuple[str, int]], alone: Path
) -> Row:
    """One process of two is lost in each of these phases, and the run is ended by one process."""
    most = SOON if done is kill else timeout() + SOON
    wrong = [survived(folder / f"{fault} {name}", Lost(who, name, 2, done), most, alone)
             for name, who in where]  # fmt: skip
    places = ", ".join(f"{name} (of process {who})" for name, who in where)
    promise = (
        f"the other process ends within {most:.0f} s and names process and phase; the last whole "
        "update is kept, and one process goes on to the same end"
    )
    return _row(fault, f"2 processes: {places}", promise, wrong)


def survived(folder: Path, lost: Lost, most: float, alone: Path) -> str | None:
    """Lose one process of two, then end the run with one; what is wrong, in words."""
    # the last phases come once, and the first checkpoint is the one that is looked for
    entry = {"export": 1, "report": 1, "checkpoint": 3}.get(lost.phase, lost.entry)
    lost = Lost(lost.process, lost.phase, entry, lost.done)
    began = time.monotonic()
    ended = world(folder, 2, lost=lost, more=("--process-timeout", str(timeout())))
    other = ended[1 - lost.process]
    assert other is not None
    named = f"process {lost.process} "
    in_phase = f"phase {lost.phase!r}"
    kept = small_run.newest_step(folder)
    if not other.code:
        return f"in {lost.phase} process {1 - lost.process} ended well"
    if named not in other.said or in_phase not in other.said:
        return f"in {lost.phase} it was said: {other.last}"
    if kept < 0:
        return f"in {lost.phase} no valid checkpoint was left"
    if time.monotonic() - began > 60 + most:
        return f"in {lost.phase} the other took long: {time.monotonic() - began:.0f} s"
    gone_on = small_run.run(folder)
    return gone_on.last if gone_on.code else differs(folder, alone)


def differs(folder: Path, alone: Path) -> str | None:
    """In what two finished runs differ beyond round-off; None if in nothing."""
    logs = [read_metrics(each / "metrics.jsonl") for each in (folder, alone)]
    if len(logs[0]) != len(logs[1]):
        return f"{len(logs[0])} updates are logged, not {len(logs[1])}"
    for mine, its in zip(*logs, strict=True):
        for name in its.keys() - {*NO_NUMBERS}:
            values = [float(line[name]["mean"] if isinstance(line[name], dict) else line[name])
                      for line in (mine, its)]  # fmt: skip
            most = 0.0 if name in COUNTS else SAME * max(1e-3, abs(values[1]))
            if abs(values[0] - values[1]) > most:
                return f"{name} of update {its['update']} is {values[0]:.8g}, not {values[1]:.8g}"
    names = {
        p.relative_to(alone) for p in alone.rglob("*.safetensors") if "checkpoints" not in str(p)
    }
    for name in sorted(names):
        mine, its = (read_tensors(each / name) for each in (folder, alone))
        for key, value in its.items():
            gap = float((mine[key].double() - value.double()).norm())
            if gap > SAME * max(1e-3, float(value.double().norm())):
                return f"{key} of {name} differs by {gap:.2g}"
    summaries = [
        json.loads((each / "summary.json").read_text())["stop"] for each in (folder, alone)
    ]
    return None if summaries[0] == summaries[1] else "the stop rules decided otherwise"


def _row(fault: str, where: str, promise: str, wrong: Sequence[str | None]) -> Row:
    first = next((words for words in wrong if words), "")
    return Row(fault, where, promise, len(wrong), sum(words is None for words in wrong), first)
