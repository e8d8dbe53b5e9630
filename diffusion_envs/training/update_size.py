"""Sizes of one update: samples, passes, rows at once, rates."""

import math
from dataclasses import dataclass


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
        average: decay, from one update to the next, of a running mean of the adapter's weights,
            which is what is evaluated and exported; None for none. While updates are few it is
            their plain mean. It never samples or trains. A mean of weights is that of policies only
            as far as they are linear in them: of LoRA's factors, the product of the means.
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
    average: float | None = None
    value_epochs: int = 2
    value_batch: int = 128
    value_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "minibatches", "batch", "value_epochs", "value_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_gradient_norm", "value_learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must be above 0 and below 1, or None, got {self.average}")
        if self.train_steps is not None and self.train_steps < 1:
            raise ValueError(f"train_steps must be at least 1 or None, got {self.train_steps}")
        if self.samples % self.minibatches:
            raise ValueError(
                f"samples ({self.samples}) must be a multiple of minibatches ({self.minibatches})"
            )
