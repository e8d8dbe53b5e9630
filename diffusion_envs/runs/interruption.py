"""Signals that ask a run to end: the first is obeyed in good order, a second one at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_UNWINDING = "empty mode stack"  # of torch, whose context pops what it has not pushed yet
_obeyed: list["Interruption"] = []  # of the process, while its handlers are set


class Interruption:
    """Whether an end was asked for; Python drops exceptions that are raised in a destructor."""

    def __init__(self) -> None:
        self.requested = False
        self._held = 0  # contexts of ``held_back`` that are open
        self._waiting = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if an end was asked for."""
        if self.requested:
            raise KeyboardInterrupt

    def obey(self) -> None:
        """Ask for the end: by KeyboardInterrupt, here and now unless it is held back."""
        self.requested, self._waiting = True, self._held > 0
        if not self._waiting:
            raise KeyboardInterrupt

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within this context the KeyboardInterrupt waits for the context's end."""
        self._held += 1
        try:
            yield
        except BaseException:
            self._waiting = False  # ``told`` tells the error as the signal
            raise
        finally:
            self._held -= 1
        if self._waiting and not self._held:
            self._waiting = False
            raise KeyboardInterrupt

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within this context an error stands for the end that was asked for, if it hides that.

        What is written in C may drop the exception that a signal raises in it, and raise an error
        of its own: torch does where it asks for the shape of what a file holds. An error in what is
        done to obey a signal stays what it is, but not torch's word of a context that the signal's
        exception left before it was entered.
        """
        try:
            yield
        except Exception as error:
            if self.requested and (_UNWINDING in str(error) or not _while_obeying(error)):
                raise KeyboardInterrupt from error
            raise


def _while_obeying(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within this context SIGTERM and Ctrl-C raise KeyboardInterrupt, once; then they kill.

    Within another such context it is the same one. Handlers of the caller's own are left alone, and
    so is every thread but the main one, where Python lets no handler be set.
    """
    if _obeyed:
        with _obeyed[-1].told():
            yield _obeyed[-1]
        return
    interruption = Interruption()
    former = {}

    def obey(number: int, frame: FrameType | None) -> None:
        for each in former:
            signal.signal(each, signal.SIG_DFL)
        interruption.obey()

    if threading.current_thread() is threading.main_thread():
        own = (signal.SIG_DFL, signal.default_int_handler)
        former = {each: signal.getsignal(each) for each in _SIGNALS}
        former = {each: handler for each, handler in former.items() if handler in own}
    for each in former:
        signal.signal(each, obey)
    if former:
        _obeyed.append(interruption)
    try:
        with interruption.told():
            yield interruption
    finally:
        if former:
            _obeyed.remove(interruption)
        for each, handler in former.items():
            signal.signal(each, handler)


@contextmanager
def whole_calls() -> Iterator[None]:
    """Within this context what is called is not broken off: a first signal is obeyed after it.

    For short calls of what shares a lock or a queue with a thread of its own: an exception between
    taking a lock and the block that gives it back leaves it taken for ever, and whoever waits for
    that thread then, to close it, waits for ever too. A second signal kills at once all the same.
    """
    if _obeyed and threading.current_thread() is threading.main_thread():
        with _obeyed[-1].held_back():
            yield
    else:
        yield


@contextmanager
def telling(words: str) -> Iterator[None]:
    """Within this context a KeyboardInterrupt gets a note, which Python shows below its traceback.

    Args:
        words: how what was stopped goes on.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.add_note(words)
        raise
