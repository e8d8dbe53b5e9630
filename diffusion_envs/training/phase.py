"""Which phase a run is in: what is said of a process that fails, and when tests make one fail.

Phases are "start", "sampling", "rewards", "update", "value network", "evaluation", "checkpoint",
"export" and "report"; they nest, and the innermost counts. Every thread has its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

START = "start"  # whatever no other phase has begun
_current = ContextVar("phase", default=START)
_failed = ContextVar[tuple[int, str]](
    "failed", default=(0, START)
)  # identity of an error, and where it was raised
_observers: list[Callable[[str], None]] = []


def current() -> str:
    """The innermost phase of this thread."""
    return _current.get()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within this context, or the function that it decorates, this is the phase."""
    outer = _current.set(name)
    try:
        _tell()
        yield
    except BaseException as error:
        if _failed.get()[0] != id(error):
            _failed.set((id(error), name))
        raise
    finally:
        _current.reset(outer)
        _tell()


def phase_of(error: BaseException) -> str:
    """The innermost phase that this error has left, in this thread; the current one if none."""
    identity, name = _failed.get()
    return name if identity == id(error) else current()


@contextmanager
def observed(by: Callable[[str], None]) -> Iterator[None]:
    """Within this context the function is called with the phase whenever it changes.

    Of several functions the one that came last is called first.
    """
    _observers.append(by)
    try:
        by(current())
        yield
    finally:
        _observers.remove(by)


def _tell() -> None:
    for observer in reversed(_observers):
        observer(current())
