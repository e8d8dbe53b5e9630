"""Rows of normals, drawn by several threads before they are asked for.

The threads draw numbers and do nothing else: drift, diffusion, policy and solver run in the caller's
thread, on all paths at once. While the caller computes a step, the others draw rows that come
later; when it needs one that is not there yet, it draws along.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrl.counter_normals import GROUP, fill

_PIECE = 2**14  # numbers that one thread draws at a time: some 40 us
_AHEAD = 2**18  # numbers of a chunk of rows: two chunks of float32 are 2 MiB, which stay in cache


class Threads:
    """Threads that draw, beside the caller's own."""

    def __init__(self, count: int) -> None:
        self.others = count - 1
        self.pool = ThreadPoolExecutor(self.others, "ctrl-normals") if self.others else None


@contextmanager
def threads(workers: int) -> Iterator[Threads]:
    """``workers`` threads with the caller's own, but no more than this process has cores."""
    made = Threads(min(workers, _cores()))
    try:
        yield made
    finally:
        if made.pool is not None:
            made.pool.shutdown(cancel_futures=True)


ALONE = Threads(1)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rows(
    key: npt.NDArray[np.uint64],
    numbers: range,
    dtype: npt.DTypeLike,
    *,
    scales: list[float] | None = None,
    into: npt.NDArray[Any] | None = None,
    by: Threads = ALONE,
) -> Iterator[npt.NDArray[Any]]:
    """Rows 0, 1, ... of the numbers that ``counter_normals`` has for a key.

    Args:
        key: of ``counter_normals.key_of``.
        numbers: which of every row, consecutive.
        dtype: float32 or float64.
        scales: what each row is multiplied by; without them, and then without end, by 1.
        into: memory of all rows, contiguous. Rows are written there before they are asked for, and
            each stays; without it each is valid until the next is asked for.
        by: who draws.

    Yields:
        [numbers] of one row.
    """
    group, begin = divmod(numbers.start, GROUP)
    groups = -(-(begin + len(numbers)) // GROUP)
    width = groups * GROUP
    many = max(1, min(64, _AHEAD // width))
    if into is not None:
        assert width == len(numbers)
        memory = [into]
    else:
        memory = [np.empty((many, width), dtype) for _ in range(1 + (by.pool is not None))]
    steps, wide = max(1, _PIECE // width), max(1, _PIECE // GROUP)

    def start(chunk: int) -> "_Chunk | None":
        first = chunk * many
        last = first + many if scales is None else min(first + many, len(scales))
        if first >= last:
            return None
        part = memory[chunk % len(memory)] if into is None else into[first:last]
        pieces = [
            (k, min(k + steps, last), g, min(g + wide, groups))
            for k in range(first, last, steps)
            for g in range(0, groups, wide)
        ]

        def draw(piece: tuple[int, int, int, int]) -> None:
            for k in range(piece[0], piece[1]):
                target = part[k - first, piece[2] * GROUP : piece[3] * GROUP]
                scale = 1.0 if scales is None else scales[k]
                fill(target, key, row=k, group=group + piece[2], scale=scale)

        return _Chunk(part[: last - first, begin : begin + len(numbers)], draw, pieces, by)

    chunk, count = start(0), 1
    while chunk is not None:
        chunk.finish()
        following = start(count) if by.pool is not None else None
        yield from chunk.rows
        chunk = following if by.pool is not None else start(count)
        count += 1


class _Chunk:
    """Some rows, which threads have begun to draw."""

    def __init__(self, rows, draw, pieces, by: Threads) -> None:
        self.rows = rows
        self.left = iter(pieces)  # of a list, whose next() is one step for all threads
        self.draw = draw
        others = min(by.others, len(pieces) - 1)
        self.begun = [by.pool.submit(self._along) for _ in range(others)] if by.pool else []

    def _along(self) -> None:
        for piece in self.left:
            self.draw(piece)

    def finish(self) -> None:
        """Draw what nobody has begun, and wait for the rest."""
        self._along()
        for one in self.begun:
            one.result()
