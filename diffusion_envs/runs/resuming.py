"""What a run goes on from: checkpoints on time, and one however it ends."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_envs.digests import LogDigests
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.callbacks import Callback
from diffusion_envs.runs.tracking import LOGS
from diffusion_envs.training import parallel
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
        world = self._trainer.accelerator
        newest = checkpoint.latest(self._folder) if self._main else None
        step = parallel.broadcast_from_main(-1 if newest is None else newest.step, world)
        if step < 0:
            self._hold(self.state())
            return
        newest = newest or checkpoint.load(self._folder / f"step-{step:06d}")
        if self._main:
            checkpoint.drop_older(self._folder, step)
        self._trainer.load_state(newest.state)
        self._check_logs(newest)
        for name, part in self._others.items():
            part.load_state(newest.state["callbacks"][name])
        self._costs = {name: newest.state[name] for name in ("reward_queries", "network_calls")}
        if not self._main:  # the log adds them up
            self._trainer.environment.reward_queries = 0
            self._trainer.environment.model.calls = 0
        self._pending = False

    def _check_logs(self, newest: checkpoint.Checkpoint) -> None:
        """Say which logs are not as they were; no number of the next update depends on them."""
        if not self._main:
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

    @property
    def _main(self) -> bool:
        return self._trainer.accelerator.process_index == 0

    def begin(self) -> None:
        """Hold the state before the first update."""
        if self._pending:
            self._hold(self.state())

    def after(self, numbers: Mapping[str, Any]) -> None:
        """Write the state if it is time; otherwise hold it."""
        self._costs = {name: numbers[name] for name in ("reward_queries", "network_calls")}
        state, self._pending = self.state(), True  # of sharded weights all processes have to ask
        if numbers["update"] % self._every == 0:
            self._held = state
            self.end()
        else:
            self._hold(state)

    def _hold(self, state: dict[str, Any]) -> None:
        """Keep a copy until it is written; on the main process, which writes."""
        if self._main:
            self._held = checkpoint.copied(state)

    @phase("checkpoint")
    def end(self) -> None:
        """Write what is not written yet; it waits for no other process, as one may be lost."""
        if self._pending and self._main and self._held is not None:
            checkpoint.save(self._folder, self._held["update"], self._held)
        self._held, self._pending = None, False
