"""Memory that runs out: the same work with fewer rows at once, and the same result.

Rows go through networks, decoders and rewards in pieces (``batch``), which is a matter of memory,
not of mathematics. Where an allocation fails, the piece is halved and the work repeated: from the
same random state, with the same weight of every row, so that gradients and samples are those of a
run that began with the smaller number, and those of the larger up to round-off. What a failed
attempt cost is not counted. The smaller number stays for the run; at one row there is nothing left
to halve, and ``MemoryLimitError`` says what else helps.

On several processes each halves on its own: what is repeated waits for no other process.
"""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

T = TypeVar("T")
_around = ContextVar("an attempt around this one could take fewer rows", default=False)
_log = logging.getLogger(__name__)
# How libraries say it in a RuntimeError that is no torch.OutOfMemoryError.
_WORDS = (
    "out of memory",
    "can't allocate memory",  # torch's allocator of the CPU
    "not enough memory",  # the same on Windows
    "std::bad_alloc",
    "Cannot allocate memory",  # the system's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",  # oneDNN
)
_REMEDIES = (
    "Recompute activations (gradient_checkpointing), make smaller pictures (resolution), take a "
    "network of 16 bits (precision bfloat16 or float16), or fewer samples an update"
)


class MemoryLimitError(RuntimeError):
    """Not even the smallest piece fits into memory; the message says what else helps."""


@runtime_checkable
class Batched(Protocol):
    """Whatever takes rows in pieces."""

    @property
    def batch(self) -> int:
        """Most rows of a piece; can be set."""
        ...

    @batch.setter
    def batch(self, rows: int) -> None: ...


@dataclass
class AtOnce:
    """Rows at once, for what has no place of its own to keep them in; all, to begin with."""

    batch: int = sys.maxsize


class AtMost:
    """Rows at once of what has a limit of its own, and no more than so many."""

    def __init__(self, of: Batched, most: int) -> None:
        self._of, self._most = of, most

    @property
    def batch(self) -> int:
        """The smaller of both; where it is lowered, so is the limit."""
        return min(self._of.batch, self._most)

    @batch.setter
    def batch(self, rows: int) -> None:
        self._of.batch = rows


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory could not be allocated."""
    while error is not None and not isinstance(error, MemoryLimitError):
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__
    return False


def retried(
    attempt: Callable[[], T], pieces: Batched, what: str, *, rows: int, least: int = 1
) -> T:
    """What ``attempt`` returns, again with fewer rows at once for as long as memory runs out.

    Of attempts within attempts the outermost takes fewer rows first: it holds what the others need
    beside theirs.

    Args:
        attempt: works in pieces of at most ``pieces.batch`` rows, and does the same whenever it is
            called: it restores what an attempt before it has changed.
        pieces: whose ``batch`` is lowered for good.
        what: goes through in pieces, for messages.
        rows: of all pieces together.
        least: rows that cannot be taken apart.

    Raises:
        MemoryLimitError: memory runs out with ``least`` rows at once, too.
    """
    around = _around.get()
    while True:
        token = _around.set(around or min(pieces.batch, rows) > least)
        try:
            return attempt()
        except Exception as error:
            if around or not ran_out(error):
                raise
            words = (str(error) or type(error).__name__).partition("\n")[0]
        finally:
            _around.reset(token)
        # Not in the clause above: until its end the error holds the tensors of all frames.
        _release()
        _lower(pieces, what, words, rows, least)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Within this context memory may run out where nothing is made in pieces; the error helps.

    Raises:
        MemoryLimitError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        words = (str(error) or type(error).__name__).partition("\n")[0]
        raise MemoryLimitError(
            f"memory ran out in {what}, where nothing is made in pieces: {words}. {_REMEDIES}"
        ) from error


@contextmanager
def once(what: str) -> Iterator[None]:
    """Within this context nothing is attempted again: processes that repeat would lose step.

    Raises:
        MemoryLimitError: memory runs out.
    """
    token = _around.set(True)
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise MemoryLimitError(
            f"memory ran out in {what}, where all processes must take equally many rows: take "
            f"fewer at once (batch), then resume. {error}"
        ) from error
    finally:
        _around.reset(token)


def _lower(pieces: Batched, what: str, words: str, rows: int, least: int) -> None:
    """Halve the rows at once, to a multiple of those that belong together."""
    now = min(pieces.batch, rows)
    if now <= least:
        raise MemoryLimitError(
            f"memory ran out in {what} with {now} row{'s' * (now != 1)} at once, and fewer there "
            f"cannot be: {words}. {_REMEDIES}"
        )
    pieces.batch = max(least, now // 2 // least * least)
    _log.warning(
        "memory ran out in %s with %d rows at once (%s): %d from now on, with the same result",
        what,
        now,
        words,
        pieces.batch,
    )


def _release() -> None:
    """Give back what failed attempts held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_pieces(ask: Callable[[slice], T], pieces: Batched, what: str, *, rows: int) -> list[T]:
    """What ``ask`` says of each piece, in order; only a piece that did not fit is asked again."""
    told, first = list[T](), 0
    while first < rows or not told:  # of no rows, too
        left = rows - first

        def piece(first: int = first) -> tuple[int, T]:
            end = min(rows, first + pieces.batch)
            return end, ask(slice(first, end))

        first, answer = retried(piece, pieces, what, rows=left)
        told.append(answer)
    return told


def accumulated(
    loss: Callable[[slice], Tensor],
    pieces: Batched,
    what: str,
    *,
    rows: int,
    clear: Callable[[], None],
) -> None:
    """Backward through a sum over rows, piece by piece.

    Args:
        loss: what a piece adds to it.
        pieces: how many rows at once.
        what: learns, for messages.
        rows: of all pieces together.
        clear: forgets gradients; called before every attempt.
    """

    def attempt() -> None:
        clear()
        for first in range(0, max(rows, 1), pieces.batch):
            loss(slice(first, min(rows, first + pieces.batch))).backward()

    retried(attempt, pieces, what, rows=rows)
