"""Rows of normals, drawn by several threads before they are asked for.

The threads draw numbers and do nothing else: drift, diffusion, policy and solver run in the
caller's thread, on all paths at once. While the caller computes a step, the others draw rows that
come later; when it needs one that is not there yet, it draws along.
"""

import itertools
import os
from _thread import start_new_thread
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import Condition, Semaphore
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ctrl.compiled_normals import CompiledRows, compiled
from ctrl.counter_normals import GROUP, Array, fill

_PIECE = 2**14  # numbers that one thread draws at a time: 40 us of C
_NUMPY_PIECE = 2**18  # the same by numpy, whose threads wait for Python at every operation
_CHUNK = 2**18  # numbers of the rows that are drawn together: two chunks of float32 are 2 MiB


@runtime_checkable
class Drawing(Protocol):
    """Rows that several threads draw into one memory."""

    def draw_all(self) -> None:
        """Draw what nobody else does, until all is taken."""
        ...

    def wait_for(self, k: int) -> None:
        """Return when row k is there; until then draw along."""
        ...

    def stop(self) -> None:
        """Let nobody begin another piece."""
        ...


class Threads:
    """Threads that draw, beside the caller's own: no more together than this process has cores.

    Where there are others, torch's own rest until ``stop``: they would compete with those that draw
    for the same cores, and spin while they wait.
    """

    def __init__(self, workers: int) -> None:
        self.others = min(workers, _cores()) - 1
        self._begun: list[Drawing] = []
        self._waiting: deque[Drawing] = deque()  # once for each of the others
        self._running = 0
        self._changed = Condition()
        self._of_torch = torch.get_num_threads()
        if self.others:
            torch.set_num_threads(1)

    def begin(self, drawing: Drawing) -> None:
        """Let the others draw, after what they have begun before."""
        self._begun.append(drawing)
        with self._changed:
            self._waiting.extend([drawing] * self.others)
            for _ in range(self._running, self.others):
                self._running += 1
                start_new_thread(self._draw, ())  # a Thread's start() would wait for it

    def _draw(self) -> None:
        """What each of the others does."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._running -= 1
                    self._changed.notify()
                    return
                drawing = self._waiting.popleft()
            drawing.draw_all()

    def stop(self) -> None:
        """Begin nothing more, and wait for what has begun."""
        for drawing in self._begun:
            drawing.stop()
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._running)
        if self.others:
            torch.set_num_threads(self._of_torch)


@contextmanager
def threads(workers: int) -> Generator[Threads, None, None]:
    """Threads that have ended at the end."""
    made = Threads(workers)
    try:
        yield made
    finally:
        made.stop()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draw(
    out: Array,
    key: npt.NDArray[np.uint64],
    *,
    group: int = 0,
    row: int = 0,
    scales: list[float] | None = None,
    by: Threads | None = None,
) -> Drawing:
    """Consecutive rows of the numbers that ``counter_normals`` has for a key, drawn into memory.

    A row must not be touched before ``wait_for`` has returned for it.

    Args:
        out: where to, [rows, numbers], contiguous, float32 or float64; numbers in whole groups.
        key: of ``counter_normals.key_of``.
        group: index of the first group of every row.
        row: index of the first row.
        scales: what each row is multiplied by; 1 if not given.
        by: who draws beside the caller.
    """
    factors = np.ones(len(out)) if scales is None else np.array(scales)
    library = compiled(out.size)
    if library is None:
        drawing = _NumpyRows(out, key, row, group, factors)
    else:
        drawing = CompiledRows(library, out, key, row, group, factors, _PIECE // GROUP)
    if by is not None:
        by.begin(drawing)
    return drawing


def rows(
    numbers: range,
    dtype: npt.DTypeLike,
    key: npt.NDArray[np.uint64],
    *,
    scales: list[float] | None = None,
    by: Threads | None = None,
) -> Iterator[Array]:
    """Rows 0, 1, ... of a key, each valid until the next is asked for.

    Args:
        numbers: which of every row, consecutive.
        dtype: float32 or float64.
        key: of ``counter_normals.key_of``.
        scales: what each row is multiplied by; without them, and then without end, by 1.
        by: who draws beside the caller.

    Yields:
        [numbers] of one row.
    """
    group, begin = divmod(numbers.start, GROUP)
    width = -(-(begin + len(numbers)) // GROUP) * GROUP
    many = max(1, min(64, _CHUNK // width))
    buffers = [np.empty((many, width), dtype) for _ in range(2)]
    ahead = by is not None and by.others > 0

    def start(first: int) -> tuple[Array, Drawing] | None:
        last = first + many if scales is None else min(first + many, len(scales))
        if first >= last:
            return None
        out = buffers[first // many % 2][: last - first]
        factors = None if scales is None else scales[first:last]
        return out, draw(out, key, group=group, row=first, scales=factors, by=by)

    chunk = start(0)
    for first in itertools.count(many, many):
        if chunk is None:
            return
        out, drawing = chunk
        chunk = start(first) if ahead else None
        for k, row in enumerate(out):
            drawing.wait_for(k)
            yield row[begin : begin + len(numbers)]
        if not ahead:
            chunk = start(first)


class _NumpyRows:
    """Rows that threads draw by numpy, each the next piece that nobody has taken."""

    def __init__(
        self, out: Array, key: npt.NDArray[np.uint64], row: int, group: int, scales: Array
    ) -> None:
        self.out, self.key, self.row, self.group, self.scales = out, key, row, group, scales
        width = out.shape[1]
        self.rows, self.wide = max(1, _NUMPY_PIECE // width), min(_NUMPY_PIECE, width)
        corners = [
            (k, n) for k in range(0, len(out), self.rows) for n in range(0, width, self.wide)
        ]
        self.left = deque(corners)
        self.missing = {k: Semaphore(0) for k, _ in corners}
        self.pieces = len(corners) // len(self.missing)  # of a row, or of some rows
        self.there: set[int] = set()
        self.failure: Exception | None = None

    def _draw_next(self) -> bool:
        try:
            k, n = self.left.popleft()
        except IndexError:
            return False
        try:
            fill(
                self.out[k : k + self.rows, n : n + self.wide],
                self.key,
                row=self.row + k,
                group=self.group + n // GROUP,
                scales=self.scales[k : k + self.rows],
            )
        except Exception as failure:  # raised in the caller's thread, which waits for the piece
            self.failure = failure
        self.missing[k].release()
        return True

    def draw_all(self) -> None:
        """Draw what nobody else does, until all is taken."""
        while self._draw_next():
            pass

    def wait_for(self, k: int) -> None:
        """Return when row k is there; until then draw along."""
        first = k - k % self.rows
        if first in self.there:
            return
        for _ in range(self.pieces):
            while not self.missing[first].acquire(blocking=False):
                if not self._draw_next():
                    self.missing[first].acquire()
                    break
        if self.failure is not None:
            raise self.failure
        self.there.add(first)

    def stop(self) -> None:
        """Let nobody begin another piece."""
        self.left.clear()
