"""SIGTERM and SIGINT in every phase: does a run end in good order, and go on from there?

A run is told to end and resumed, again and again, until every phase has had its signals; then all
of its numbers are compared with those of the run that was left alone, bit for bit.
"""

import itertools
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import small_run
from benchmarks.faults.kills import WHERE
from benchmarks.faults.row import Row

EACH = 4  # of each signal in each phase
TWICE = 12  # second signals
_NOT_READ = "give the command again"  # where the command was not read yet
STOPPED = 130  # the exit code that docs/run_folder.md promises
_MOST = 6  # signals to one run, before it is let end
_AT_ONCE = 5.0  # seconds within which a second signal ends it


@dataclass(frozen=True)
class Told:
    """One signal: which, in which phase, whether a second one came, and what is wrong after it."""

    number: signal.Signals
    phase: str
    wrong: str | None


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """One row a phase, and one of second signals."""
    signals, phases = (signal.SIGTERM, signal.SIGINT), small_run.PHASES
    wanted = [(number, name) for _ in range(EACH) for number in signals for name in phases]
    if sample:
        wanted = [(signal.SIGTERM, "update"), (signal.SIGINT, "export")]
    told = tries(folder / "once", wanted, twice=False)
    for name in small_run.PHASES:
        promise = f"exit code {STOPPED}, the last whole update is kept, the end is the same"
        mine = [each for each in told if each.phase == name]
        if mine:
            wrong = [each.wrong and f"{each.number.name}: {each.wrong}" for each in mine]
            yield _row("SIGTERM, SIGINT", WHERE.get(name, name), promise, wrong)
    every = [(number, name) for name in phases[1:5] for number in signals]
    again = tries(folder / "twice", (every * TWICE)[: 1 if sample else TWICE], twice=True)
    promise = f"the process ends within {_AT_ONCE:g} seconds, and goes on to the same end"
    yield _row("a second signal", "while the first is obeyed", promise, [e.wrong for e in again])


def _row(fault: str, where: str, promise: str, wrong: list[str | None]) -> Row:
    first = next((words for words in wrong if words), "")
    return Row(fault, where, promise, len(wrong), sum(words is None for words in wrong), first)


def tries(
    folder: Path, wanted: list[tuple[signal.Signals, str]], *, twice: bool, most: int = _MOST
) -> list[Told]:
    """Send these signals in these phases, to as few runs as may be."""
    chance, told, left = random.Random(7), list[Told](), list(wanted)
    whole = small_run.uninterrupted()
    for turn in itertools.count():
        place = folder / str(turn) / "run"
        mine = list[Told]()
        while left and len(mine) < most:
            one = signalled(place, *left[0], chance, whole, twice=twice)
            if one is None:  # the run is past that phase: another one will have it
                break
            mine.append(one)
            left.pop(0)
        ended = small_run.run(place)
        differs = small_run.first_difference(whole.results, small_run.results(place))
        wrong = f"resumed: {ended.last}" if ended.code else differs
        told += [Told(t.number, t.phase, t.wrong or wrong) for t in mine]
        shutil.rmtree(place.parent)
        if not left:
            return told
    raise AssertionError


def signalled(
    place: Path,
    number: signal.Signals,
    name: str,
    chance: random.Random,
    whole: small_run.Uninterrupted,
    *,
    twice: bool,
) -> Told | None:
    """Tell the run to end in a phase; None if it ended before."""
    process = small_run.begin(place)
    mean = whole.seconds / sum(whole.entries.values())
    at = chance.randint(1, min(2, whole.entries[name]))
    # a moment later, for at first the process is not yet the library's
    if not (process.until(name, at) and process.sleep(0.01 + chance.uniform(0, mean))):
        process.wait()
        return None
    process.signal(number)
    if twice:
        process.sleep(chance.uniform(0, 0.03))
        process.signal(number)
    ended = process.wait()
    if not twice and (ended.code == 0 or (ended.code == -number and ended.over)):
        return Told(number, ended.phase, None)  # it was at its end: nobody was there to obey
    return Told(number, name, _wrong(place, ended, number, name, twice=twice))


def _wrong(
    place: Path, ended: small_run.Ended, number: signal.Signals, name: str, *, twice: bool
) -> str | None:
    """What is wrong with how it ended; None if nothing is."""
    if twice:
        if ended.code not in (STOPPED, -number):
            return ended.last
        late = ended.after_signal > _AT_ONCE
        return f"it took {ended.after_signal:.1f} seconds" if late else None
    if ended.code != STOPPED or not ended.in_words:
        return ended.last
    begun = (place / "config.json").is_file()
    said = "go on with:" if begun else "it had not begun"
    if said not in ended.said and not (name == "start" and _NOT_READ in ended.said):
        return f"not said how to go on: {ended.last}"
    if (place / "run.lock").exists():
        return "its lock is still there"
    logged = small_run.logged(place)
    if (step := small_run.newest_step(place)) not in (logged - 1, logged):
        return f"checkpoint {step} with {logged} updates logged"
    return None
