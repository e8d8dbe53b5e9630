"""Calls of a reward that go on while pictures are made, and whose answers come in order.

Pieces are asked for in the order in which they are handed over. With one call at a time a reward
never notices: it is called from one thread, in order, with the same pictures. Several at once are
for rewards that declare ``concurrent = True``: they may be called from several threads at once, and
what they answer does not depend on what else they are asked.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from threading import Event

import torch
from torch import Tensor

from diffusion_envs.rewards.contract import Reward, reward_name
from diffusion_envs.rewards.daemon_threads import DaemonThreads, as_here


def require_calls(overlap: int, reward: Reward) -> None:
    """Refuse more calls at once than a reward is made for.

    Raises:
        ValueError: ``overlap`` is no number of calls, or more than one and the reward does not
            declare ``concurrent = True``.
    """
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
        raise ValueError(f"overlap must be an integer of at least 0, got {overlap!r}")
    if overlap > 1 and not getattr(reward, "concurrent", False):
        raise ValueError(
            f"overlap={overlap} calls the reward from several threads at once, which "
            f"{reward_name(reward)} does not declare to bear (concurrent = True): use overlap=1, "
            "or declare it if the reward keeps nothing from one call to the next"
        )


class Overlapped:
    """Within this context calls are made in threads of their own; it leaves none behind it.

    Args:
        calls: at once.
        device: of the pictures. On a GPU a call has a stream of its own, which waits for what was
            asked of the device before.
    """

    def __init__(self, calls: int, device: torch.device) -> None:
        self._threads, self._device = DaemonThreads(calls), device
        self._answers, self._most, self._failed = list[Future[Tensor]](), 2 * calls, Event()

    def __enter__(self) -> "Overlapped":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()  # a call that runs goes on, and nobody waits for it

    def submit(self, call: Callable[[], Tensor], *, bounded: bool = False) -> None:
        """Hand over a call; raises what one of those before has raised.

        Args:
            call: asks a reward.
            bounded: wait until few calls are left before it: of pictures that nobody else keeps.
        """
        left = {answer for answer in self._answers if not answer.done()}
        while bounded and len(left) >= self._most and not self._failed.is_set():
            left = wait(left, return_when=FIRST_COMPLETED).not_done
        if self._failed.is_set():
            self.answers()
        there = as_here(_on_own_stream(call, self._device), self._device)
        self._answers.append(self._threads.submit(lambda: self._made(there)))

    def answers(self) -> list[Tensor]:
        """Of all calls, in their order; the first that failed is raised."""
        return [answer.result() for answer in self._answers]

    def _made(self, call: Callable[[], Tensor]) -> Tensor:
        if self._failed.is_set():  # what comes after a failure is not asked, as without threads
            return torch.empty(0)
        try:
            return call()
        except BaseException:
            self._failed.set()
            raise


def _on_own_stream(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """On CUDA, a call waits for what was asked of the device before it, and for nothing since."""
    if device.type != "cuda":
        return call
    asked = torch.cuda.Event()
    asked.record(torch.cuda.current_stream(device))

    def there() -> Tensor:
        stream = torch.cuda.Stream(device)
        stream.wait_event(asked)
        with torch.cuda.stream(stream):
            answer = call().cpu()
        stream.synchronize()  # then memory of the pictures may be used again
        return answer

    return there
