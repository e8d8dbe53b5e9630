"""A folder that is read-only, that goes away, that two processes want; and a clock that jumps."""

import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults import small_run
from benchmarks.faults.disk import Disk
from benchmarks.faults.row import Row
from diffusion_envs.training import phase

PHASES = ("start", "sampling", "update", "checkpoint", "evaluation", "report")
_DAY = 86_400.0


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """One row a fault."""
    whole = small_run.uninterrupted()
    phases, both = (("update",), 0) if sample else (PHASES, 2)
    yield _row(
        "a read-only folder",
        "at the start, and when a run is resumed",
        "refused by name, nothing is lost",
        [*_read_only(folder / "read-only", whole)],
    )
    yield _row(
        "the folder is renamed",
        "in mid-run",
        "it ends by name, and goes on where the folder is now",
        [_renamed(folder / name, name, whole) for name in phases],
    )
    yield _row(
        "two processes at once",
        "the second one in mid-run of the first, both at the start, both resume",
        "one is refused by pid and host, the other's end is the same",
        [
            # a first one that reports may be done before the second one looks
            *(second(folder / f"two-{x}", x, whole) for x in phases if x != "report"),
            *(_both(folder / f"both-{n}", resumed=n == 0, whole=whole) for n in range(both)),
        ],
    )
    yield _row(
        "the clock jumps",
        "by up to 9 days, back and forth, at every change of phase",
        "the end is the same",
        [clock(folder / f"clock-{n}", n, whole) for n in range(1 if sample else 3)],
    )


def _row(fault: str, where: str, promise: str, wrong: list[str | None]) -> Row:
    first = next((words for words in wrong if words), "")
    return Row(fault, where, promise, len(wrong), sum(words is None for words in wrong), first)


def _same(place: Path, ended: small_run.Ended, whole: small_run.Uninterrupted) -> str | None:
    """What is wrong with the end of a run; None if it is that of the one left alone."""
    if ended.code:
        return ended.last
    differs = small_run.first_difference(whole.results, small_run.results(place))
    return None if differs is None else f"the end differs in {differs}"


def _refused(ended: small_run.Ended, *words: str) -> str | None:
    """What is wrong with how a process was refused."""
    if ended.code != 2 or not ended.in_words:
        return ended.last
    missing = [word for word in words if word not in ended.said]
    return f"{ended.last}, without {missing}" if missing else None


def _read_only(folder: Path, whole: small_run.Uninterrupted) -> Iterator[str | None]:
    disk = Disk(folder)
    place = disk.path / "run"
    disk.read_only(True)
    yield _refused(small_run.run(place), "Read-only file system", str(place))
    disk.read_only(False)
    process = small_run.begin(place)
    process.until("update", 2)
    process.signal(signal.SIGKILL)
    process.wait()
    disk.read_only(True)
    yield _refused(small_run.run(place), "Read-only file system", str(place))
    disk.read_only(False)
    yield _same(place, small_run.run(place), whole)


def _renamed(folder: Path, name: str, whole: small_run.Uninterrupted) -> str | None:
    place, now = folder / "run", folder / "elsewhere" / "run"
    now.parent.mkdir(parents=True)
    process = small_run.begin(place)
    process.until("evaluation", 1)  # the folder is there
    process.until(name, process.entries(name) + 1)
    if not process.running:
        return None
    place.rename(now)
    ended = process.wait()
    if ended.code != 0 and (wrong := _refused(ended, str(place))) is not None:
        return wrong
    shutil.rmtree(place, ignore_errors=True)
    return _same(now, small_run.run(now), whole)


def second(folder: Path, name: str, whole: small_run.Uninterrupted) -> str | None:
    """What is wrong where a second process wants the folder of a first one that is in a phase."""
    place = folder / "run"
    first = small_run.begin(place)
    first.until("evaluation", 1)  # the folder is there
    first.until(name, first.entries(name) + 1)
    other, ended = small_run.run(place), first.wait()
    return _refused(other, f"pid {first.pid} on host") or _same(place, ended, whole)


def _both(folder: Path, *, resumed: bool, whole: small_run.Uninterrupted) -> str | None:
    place = folder / "run"
    if resumed:
        process = small_run.begin(place)
        process.until("update", 3)
        process.signal(signal.SIGKILL)
        process.wait()
    both = [small_run.begin(place) for _ in range(2)]
    ended = [process.wait() for process in both]
    refused = [each for each in ended if each.code]
    if len(refused) != 1:
        return f"{len(refused)} of 2 were refused"
    return _refused(refused[0], "another process", "pid") or _same(
        place, next(each for each in ended if not each.code), whole
    )


def clock(folder: Path, seed: int, whole: small_run.Uninterrupted) -> str | None:
    """What is wrong with a run whose clock jumps."""
    chance, real = random.Random(seed), time.time

    @contextmanager
    def jumping() -> Iterator[None]:
        ahead = 0.0

        def jump(_: str) -> None:
            nonlocal ahead
            ahead = chance.uniform(-9, 9) * _DAY

        time.time = lambda: real() + ahead
        with phase.observed(jump):
            yield

    place = folder / "run"
    return _same(place, small_run.run(place, jumping), whole)
