"""SIGKILL at random moments of a run, in every phase: is anything lost, does the end change?

A run is killed and resumed, again and again, until it ends; then all of its numbers are compared
with those of the run that was left alone, bit for bit. Half of the moments are uniform over its
time, half over the phases, for some of them take a hundredth of it.
"""

import itertools
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks.faults import small_run
from benchmarks.faults.row import Row

KILLS, SAMPLE = 300, 5
_MOST = 12  # kills of one run, before it is let end
WHERE = {"start": "start-up, and between phases"}


@dataclass(frozen=True)
class Kill:
    """One of them: the phase it came in, and what is wrong after it."""

    phase: str
    wrong: str | None


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """One row a phase."""
    kills = tries(folder, SAMPLE if sample else KILLS)
    for name in small_run.PHASES:
        wrong = [kill.wrong for kill in kills if kill.phase == name]
        if not wrong:  # the sample has fewer than one each
            assert sample
            continue
        first = next((words for words in wrong if words), "")
        held = sum(words is None for words in wrong)
        yield Row(
            "SIGKILL",
            WHERE.get(name, name),
            "at most one update is done again; the end is that of the uninterrupted run",
            len(wrong),
            held,
            first,
        )


def tries(folder: Path, number: int) -> list[Kill]:
    """So many kills, each of them resumed from."""
    kills, whole = list[Kill](), small_run.uninterrupted()
    moments = _moments(whole)
    for turn in itertools.count():
        place = folder / str(turn) / "run"
        kills += one_run(place, min(_MOST, number - len(kills)), moments, whole)
        shutil.rmtree(place.parent)
        if len(kills) >= number:
            return kills
    raise AssertionError


_Moment: TypeAlias = Callable[[small_run.Process], bool]  # waits for it; False if a run has ended


def _moments(whole: small_run.Uninterrupted) -> Iterator[_Moment]:
    """Uniform over the run's time and, in turn, over the phases."""
    chance = random.Random(18)
    mean = whole.seconds / sum(whole.entries.values())
    for name in itertools.cycle(small_run.PHASES):
        yield in_time(chance.uniform(0, whole.seconds))
        entries = chance.randint(1, min(3, whole.entries[name]))
        # at once, too: some phases are over sooner than the mean one
        yield in_phase(name, entries, chance.choice((0.0, chance.uniform(0, mean))))


def in_time(seconds: float) -> _Moment:
    """So long after a process has begun."""
    return lambda process: process.sleep(seconds)


def in_phase(name: str, entries: int, seconds: float) -> _Moment:
    """So long after a process has come into a phase so often."""
    return lambda process: process.until(name, entries) and process.sleep(seconds)


def one_run(
    place: Path, most: int, moments: Iterator[_Moment], whole: small_run.Uninterrupted
) -> list[Kill]:
    """Kill a run up to so often, let it end, and compare."""
    kills, kept = list[Kill](), -1
    while len(kills) < most:
        process = small_run.begin(place)
        if next(moments)(process):
            process.signal(signal.SIGKILL)
        ended = process.wait()
        if ended.code == 0:
            break
        if ended.code != -signal.SIGKILL:
            return [Kill(kill.phase, f"resumed: {ended.last}") for kill in kills]
        step, logged = small_run.newest_step(place), small_run.logged(place)
        wrong = None
        if max(step, 0) < max(kept, logged - 1):
            wrong = f"checkpoint {step} after {kept}, with {logged} updates logged"
        kept = step
        kills.append(Kill(ended.phase, wrong))
    else:
        ended = small_run.run(place)
        if ended.code:
            return [Kill(kill.phase, f"resumed: {ended.last}") for kill in kills]
    differs = small_run.first_difference(whole.results, small_run.results(place))
    if differs is not None:
        return [Kill(kill.phase, f"the end differs in {differs}") for kill in kills]
    return kills
