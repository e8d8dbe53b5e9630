"""Signals that ask a run to end: the first is obeyed in good order, a second one at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_obeyed: list["Interruption"] = []  # of the process, while its handlers are set


class Interruption:
    """Whether an end was asked for; Python drops exceptions that are raised in a destructor."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if an end was asked for."""
        if self.requested:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within this context SIGTERM and Ctrl-C raise KeyboardInterrupt, once; then they kill.

    Within another such context it is the same one. Handlers of the caller's own are left alone, and
    so is every thread but the main one, where Python lets no handler be set.
    """
    if _obeyed:
        yield _obeyed[-1]
        return
    interruption = Interruption()
    former = {}

    def obey(number: int, frame: FrameType | None) -> None:
        for each in former:
            signal.signal(each, signal.SIG_DFL)
        interruption.requested = True
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        own = (signal.SIG_DFL, signal.default_int_handler)
        former = {each: signal.getsignal(each) for each in _SIGNALS}
        former = {each: handler for each, handler in former.items() if handler in own}
    for each in former:
        signal.signal(each, obey)
    if former:
        _obeyed.append(interruption)
    try:
        yield interruption
    finally:
        if former:
            _obeyed.remove(interruption)
        for each, handler in former.items():
            signal.signal(each, handler)
