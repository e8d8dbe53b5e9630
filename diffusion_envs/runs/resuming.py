"""What a run goes on from: checkpoints on time, and one however it ends."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_envs.digests import LogDigests
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.callbacks import Callback
from diffusion_envs.runs.tracking import LOGS
from diffusion_envs.training.phase import phase
from diffusion_envs.training.trainer import Trainer

_log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """All that the next update depends on: written on time, and when the run ends in any way.

    Between two checkpoints the state after every update is held in memory, so that a run that is
    told to end in the middle of an update goes on after the last whole one.

    Args:
        folder: where they go.
        trainer: whose state it is.
        every: updates between checkpoints.
        others: callbacks whose state belongs to it.
    """

    def __init__(
        self, folder: Path, trainer: Trainer, every: int, others: Sequence[Callback]
    ) -> None:
        self._folder, self._trainer, self._every = folder, trainer, every
        self._others = {type(part).__name__: part for part in others}
        self._costs: dict[str, int] = {}
        self._pending = True  # something is not on disk yet
        self._logs = LogDigests(folder.parent, LOGS)
        self._held: Any = None  # a copy of it, where training goes on before it is written

    @phase("checkpoint")
    def load(self) -> None:
        """Go on from the newest one, if there is any; its costs are those of all processes."""
        newest = checkpoint.latest(self._folder)
        if newest is None:
            return
        self._trainer.load_state(newest.state)
        self._check_logs(newest)
        for name, part in self._others.items():
            part.load_state(newest.state["callbacks"][name])
        self._costs = {name: newest.state[name] for name in ("reward_queries", "network_calls")}
        if not self._trainer.accelerator.is_main_process:  # the log adds them up
            self._trainer.environment.reward_queries = 0
            self._trainer.environment.model.calls = 0
        self._pending = False

    def _check_logs(self, newest: checkpoint.Checkpoint) -> None:
        """Say which logs are not as they were; no number of the next update depends on them."""
        if not self._trainer.accelerator.is_main_process:
            return
        for path in self._logs.altered(newest.state.get("logs", {})):  # runs of before have none
            _log.warning(
                "%s is not what this run had logged by update %d: it was altered, or cut short. "
                "Training does not depend on it, but report and verdict are drawn from it",
                path,
                newest.step,
            )

    def state(self) -> dict[str, Any]:
        """The trainer's, with costs over all processes, and the other callbacks'."""
        others = {name: part.state() for name, part in self._others.items()}
        state = self._trainer.state() | self._costs
        return state | {"callbacks": others, "logs": self._logs.state()}

    def before_this_update(self) -> Any:
        """The state after the last whole update; None if nothing is held or written yet."""
        if self._held is not None:
            return self._held
        newest = checkpoint.latest(self._folder)
        return None if newest is None else newest.state

    def begin(self) -> None:
        """Hold the state before the first update."""
        if self._pending:
            self._held = checkpoint.copied(self.state())

    def after(self, numbers: Mapping[str, Any]) -> None:
        """Write the state if it is time; otherwise hold it."""
        self._costs = {name: numbers[name] for name in ("reward_queries", "network_calls")}
        due = numbers["update"] % self._every == 0
        self._held, self._pending = None if due else checkpoint.copied(self.state()), True
        if due:
            self.end()

    @phase("checkpoint")
    def end(self) -> None:
        """Write what is not written yet."""
        if self._pending:
            state = self.state() if self._held is None else self._held
            checkpoint.save(self._folder, state["update"], state)
            self._held, self._pending = None, False
