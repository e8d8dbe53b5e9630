"""Sizes of one update: samples, passes, rows at once, rates."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffusion_envs.ranges import require_numbers

Schedule = Literal["constant", "linear", "cosine"]
StoredPaths = Literal["device", "host"]


@dataclass(frozen=True)
class UpdateSize:
    """Sizes of one update.

    Attributes:
        samples: images an update, over all processes.
        epochs: passes over a roll-out before the next is sampled.
        minibatches: optimiser steps a pass; samples are split among them.
        train_steps: steps of each path that carry a gradient, drawn without replacement; the
            others' share is made up by weight, so the gradient stays unbiased. None for all.
        batch: rows (sample, step) that go through the network at once; memory, not mathematics.
        max_gradient_norm: larger gradients are scaled down to it.
        weight_decay: of AdamW on the adapter.
        warm_up: updates at first whose learning rate rises linearly to the full one.
        schedule: of the learning rate after them: constant, linear or cosine (both towards 0).
        schedule_updates: at which a schedule reaches 0; those of the whole run.
        stored_paths: where states, scores and noises of a roll-out are kept until the update has
            used them: on the device, or in the host's memory, from which rows are brought piece by
            piece: the same numbers, more time.
        average: decay, from one update to the next, of a running mean of the trained weights, which
            is what is evaluated and exported; None for none, 0 for the newest alone. While updates
            are few it is their plain mean. It never samples or trains. A mean of weights is that of
            policies only as far as they are linear in them: of LoRA's factors, the product of the
            means.
        value_epochs: passes of the value network over the states of a roll-out.
        value_batch: states a step of the value network's optimiser.
        value_learning_rate: of AdamW on the value network.
    """

    samples: int = 32
    epochs: int = 1
    minibatches: int = 1
    train_steps: int | None = None
    batch: int = 64
    max_gradient_norm: float = 1.0
    weight_decay: float = 1e-4
    warm_up: int = 0
    schedule: Schedule = "constant"
    schedule_updates: int | None = None
    stored_paths: StoredPaths = "device"
    average: float | None = None
    value_epochs: int = 2
    value_batch: int = 128
    value_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("samples", "epochs", "minibatches", "batch", "value_epochs", "value_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_gradient_norm", "value_learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), or None, got {self.average}")
        if self.stored_paths not in (kinds := get_args(StoredPaths)):
            raise ValueError(
                f"stored_paths must be one of {', '.join(kinds)}, got {self.stored_paths!r}"
            )
        self._require_schedule()
        if self.train_steps is not None and self.train_steps < 1:
            raise ValueError(f"train_steps must be at least 1 or None, got {self.train_steps}")
        if self.samples % self.minibatches:
            raise ValueError(
                f"samples ({self.samples}) must be a multiple of minibatches ({self.minibatches})"
            )

    def _require_schedule(self) -> None:
        if isinstance(self.warm_up, bool) or self.warm_up < 0:
            raise ValueError(f"warm_up must be an integer of at least 0, got {self.warm_up}")
        if self.schedule not in (kinds := get_args(Schedule)):
            raise ValueError(f"schedule must be one of {', '.join(kinds)}, got {self.schedule!r}")
        updates = self.schedule_updates
        if self.schedule == "constant" and updates is not None:
            raise ValueError(
                f"schedule_updates must be left out where the schedule is constant, got {updates}; "
                "or choose schedule='linear' or 'cosine'"
            )
        if self.schedule != "constant" and (updates is None or updates <= self.warm_up):
            raise ValueError(
                f"schedule_updates must be the number of updates at which the {self.schedule} "
                f"schedule reaches 0, more than warm_up ({self.warm_up}), got {updates}"
            )

    def require_updates(self, updates: int) -> None:
        """Refuse a run that is longer than the schedule of its learning rate.

        Raises:
            ValueError: it would go on with a learning rate of 0.
        """
        if self.schedule_updates is not None and updates > self.schedule_updates:
            raise ValueError(
                f"updates must be at most schedule_updates ({self.schedule_updates}), after which "
                f"the learning rate is 0, got {updates}"
            )

    def rate_factor(self, update: int) -> float:
        """What the learning rate of an update is multiplied by; ``update`` counts from 0."""
        if update < self.warm_up:
            return (update + 1) / (self.warm_up + 1)
        if self.schedule_updates is None:
            return 1.0
        done = min(1.0, (update - self.warm_up) / (self.schedule_updates - self.warm_up))
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
