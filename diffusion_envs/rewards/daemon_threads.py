"""Calls in other threads, none of which keeps a process from ending.

Python waits at its exit for the threads of ``concurrent.futures``, however long one hangs; it does
not wait for daemon threads.
"""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch

_Call = tuple[Future[Any], Callable[[], Any]]


def as_here(call: Callable[[], Any], device: torch.device | None = None) -> Callable[[], Any]:
    """The same call from another thread: with this one's context variables and gradient mode.

    Args:
        call: what another thread will call.
        device: the GPU that is then the current one; each thread has its own.
    """
    context, gradients = contextvars.copy_context(), torch.is_grad_enabled()

    def there() -> Any:
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.set_grad_enabled(gradients):
            return context.run(call)

    return there


class DaemonThreads:
    """Threads that make calls in the order in which they are handed over.

    Args:
        most: calls at once; one thread makes all of them one after another.
    """

    def __init__(self, most: int = 1) -> None:
        self.most = most
        self._threads, self._calls, self._lock = 0, SimpleQueue[_Call | None](), Lock()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """What the call will return or raise; it can be cancelled until it begins."""
        future = Future[Any]()
        with self._lock:
            self._calls.put((future, call))
            if self._threads < self.most:
                self._threads += 1
                Thread(target=self._work, daemon=True, name="reward").start()
        return future

    def close(self) -> None:
        """Cancel what has not begun, and end each thread after its call; nothing is waited for."""
        with self._lock:
            while not self._calls.empty():
                if (waiting := self._calls.get()) is not None:
                    waiting[0].cancel()
            for _ in range(self._threads):
                self._calls.put(None)

    def _work(self) -> None:
        while (taken := self._calls.get()) is not None:
            future, call = taken
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # whatever a user's function raises; it is told there
                future.set_exception(error)
            del taken, future, call  # pictures are not kept until the next call
