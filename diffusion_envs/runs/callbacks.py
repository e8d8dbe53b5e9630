"""What a run does besides training, as callbacks on the one loop; the trainer knows none of them.

They run on all processes, which share out what costs time; what writes files does so on the main
one, which decides for all whether to go on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator

from diffusion_envs.training import parallel


class Callback:
    """Part of a run that is told of every update; each part overrides what it has use for."""

    def begin(self) -> str | None:
        """Before the first update of this process; a reason to make none, in words."""

    def after(self, numbers: Mapping[str, Any]) -> str | None:
        """After an update, with its numbers; a reason to stop, in words."""

    def end(self) -> None:
        """After the last update, or when anything was raised."""

    def state(self) -> Any:
        """For a checkpoint, if the next update depends on it."""

    def load_state(self, state: Any) -> None:
        """Go on from a checkpoint."""


class Callbacks:
    """Several as one; whether to stop is the main process's decision, on all of them."""

    def __init__(self, parts: Sequence[Callback], accelerator: Accelerator) -> None:
        self.parts, self.accelerator = parts, accelerator

    @contextmanager
    def running(self) -> Iterator[str | None]:
        """Begin; whatever happens within the context, all of them end."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.end)
            yield self._agreed(part.begin() for part in self.parts)

    def after(self, numbers: Mapping[str, Any]) -> str | None:
        """The reason to stop, if there is one."""
        return self._agreed(part.after(numbers) for part in self.parts)

    def _agreed(self, reasons: Iterable[str | None]) -> str | None:
        with parallel.failing_together(self.accelerator):  # evaluations ask rewards too
            mine = "; ".join(reason for reason in [*reasons] if reason) or None
        stop = parallel.broadcast_from_main(int(mine is not None), self.accelerator)
        return (mine or "the main process says so") if stop else None
