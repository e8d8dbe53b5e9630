"""Which of several processes is missing where all should meet, and in which phase it was last.

Every process tells a store that all can reach (the one by which they met at first: torchrun's, or
process 0's) how it is, once a second, from a thread of its own, and whenever its phase changes: the
phase, how often it has met the others, and why it ended if it did. The thread reads what the others
tell, too, so that a process can say who was lost even if the store was lost with it; then phases
are those of a second before.

    silent     no sign of life for three seconds: killed or stopped, or its machine is gone
    ended      it said so: by an exception of its own, which it names
    late       it lives, and has not come to where the others wait
"""

import atexit
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch import distributed as _distributed

from diffusion_envs.training import phase

distributed: Any = _distributed  # its stores are public, but for the type checker

BEAT = 1.0  # seconds between two signs of life
SILENCE = 3 * BEAT  # after which a process counts as silent
_LOST = "lost another process"  # how a process ends for which others are to blame


@dataclass
class Sign:
    """What a process tells of itself.

    Attributes:
        beat: number of this sign.
        phase: what it does.
        seconds: for how long it has done so.
        meetings: how often it has come to where all meet.
        ended: by what, in words; None while it goes on.
    """

    beat: int = 0
    phase: str = phase.START
    seconds: float = 0.0
    meetings: int = 0
    ended: str | None = None


@dataclass
class _Seen:
    sign: Sign
    at: float = field(default_factory=time.monotonic)  # when this sign was new


class ProcessWatch:
    """Signs of life of all processes; it begins at once and ends with the interpreter.

    Args:
        process: which one this is.
        processes: how many there are.
        store: of torch.distributed, that all can reach, by a connection of its own.
    """

    def __init__(self, process: int, processes: int, store: Any) -> None:
        self.process, self.processes = process, processes
        self._store, self._thread_id = store, threading.get_ident()
        self._sign, self._since = Sign(), time.monotonic()
        self._seen = {k: _Seen(Sign()) for k in range(processes) if k != process}
        self._read_at = time.monotonic()  # when the store answered last
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="signs of life", daemon=True)
        self._observing = phase.observed(self._enter)
        self._observing.__enter__()
        self._thread.start()
        atexit.register(self.close)

    @classmethod
    def start(cls, process: int, processes: int) -> "ProcessWatch | None":
        """By the address at which torchrun, accelerate or a job file let processes meet.

        None if there is none, or nobody answers there: then who is missing is not known.
        """
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if address is None or port is None:
            return None
        try:
            store = distributed.TCPStore(
                address, int(port), is_master=False, timeout=timedelta(seconds=2 * SILENCE)
            )
        except (RuntimeError, ValueError):  # DistStoreError, DistNetworkError are RuntimeErrors
            return None
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(process, processes, distributed.PrefixStore(f"signs of life/{start}", store))

    def begin(self) -> None:
        """A run begins; there may have been one before in this process."""
        self._sign.ended = None

    def meet(self) -> None:
        """Say that this process has come to where all meet."""
        self._sign.meetings += 1

    def end(self, error: BaseException, *, blameless: bool) -> None:
        """Tell the others that this process ends, and by what.

        Args:
            error: that ends it.
            blameless: it ends because another process is lost.
        """
        self._sign.phase = phase.phase_of(error)
        words = f"{type(error).__name__}: {error}".strip(": ")
        self._sign.ended = _LOST if blameless else words[:300]
        self._beat()

    def missing(self) -> str:
        """Who is missing where this process waits, in words; takes a few seconds to be sure."""
        until = time.monotonic() + SILENCE + 2 * BEAT
        while time.monotonic() < until:
            time.sleep(BEAT / 4)
            if any(self._is_silent(k) or self._has_ended(k) for k in self._seen):
                break
        words = [words for k in self._seen if (words := self._what_of(k))]
        if words:
            return "; ".join(words)
        phases = ", ".join(f"{k} {seen.sign.phase!r}" for k, seen in self._seen.items())
        return f"no other process is known to be missing; their last phases are: {phases}"

    def close(self) -> None:
        """No more signs: before the interpreter ends, as its threads must not outlive it."""
        if not self._over.is_set():
            self._over.set()
            self._observing.__exit__(None, None, None)
            self._thread.join(timeout=4 * SILENCE)

    # -- the others -------------------------------------------------------------------------------

    def _is_silent(self, k: int) -> bool:
        """No sign for long, as far as the store has been read."""
        if self._seen[k].sign.ended is not None:
            return False
        return self._read_at - self._seen[k].at > SILENCE

    def _has_ended(self, k: int) -> bool:
        return self._seen[k].sign.ended not in (None, _LOST)

    def _what_of(self, k: int) -> str:
        """Why this process may be to blame; nothing if it is not."""
        seen = self._seen[k]
        where, seconds = f"phase {seen.sign.phase!r}", seen.sign.seconds
        if self._has_ended(k):
            return f"process {k} ended in {where} by {seen.sign.ended}"
        if self._is_silent(k):
            age = time.monotonic() - seen.at
            return f"process {k} gives no sign of life since {age:.0f} s, when it was in {where}"
        unread = time.monotonic() - self._read_at > SILENCE
        if unread and k == 0:
            return (
                "process 0, or the launcher that keeps the store of all processes, does not "
                f"answer; process 0 was in {where}"
            )
        if seen.sign.ended is None and seen.sign.meetings < self._sign.meetings:
            return f"process {k} is late: still in {where}, since {seconds:.0f} s"
        return ""

    # -- the thread -------------------------------------------------------------------------------

    def _enter(self, name: str) -> None:
        # phases of other threads are their own
        if threading.get_ident() == self._thread_id and self._sign.ended is None:
            self._sign.phase, self._since = name, time.monotonic()
            if self._lock.acquire(blocking=False):  # otherwise the thread is about to tell it
                try:
                    with suppress(RuntimeError):  # as in the thread
                        self._tell()
                finally:
                    self._lock.release()

    def _go_on(self) -> None:
        while not self._over.is_set():
            self._beat()
            self._over.wait(BEAT)

    def _beat(self) -> None:
        """Tell, and read what the others tell; a store that does not answer is tried again."""
        with self._lock:
            try:
                self._tell()
                for k in self._seen:
                    if self._store.check([str(k)]):
                        self._hear(k, Sign(**json.loads(self._store.get(str(k)))))
                self._read_at = time.monotonic()
            except RuntimeError:  # it is told in ``missing``
                return

    def _tell(self) -> None:
        sign = self._sign
        sign.beat, sign.seconds = sign.beat + 1, time.monotonic() - self._since
        self._store.set(str(self.process), json.dumps(vars(sign)))

    def _hear(self, k: int, sign: Sign) -> None:
        if sign.beat != self._seen[k].sign.beat:
            self._seen[k] = _Seen(sign)
