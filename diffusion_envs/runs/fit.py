"""Minimise a loss: the one loop behind everything that this package trains from scratch.

It resumes from its newest checkpoint, keeps an exponential moving average of the weights, shows a
progress bar, and runs on one process or, under ``torchrun``, on several whose gradients are
averaged. On CPUs several single-threaded processes beat one process with several threads.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctrl.noise import stream
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.progress import progress_bar
from diffusion_envs.training import parallel

_log = logging.getLogger(__name__)

Loss = Callable[[nn.ModuleDict, Generator], dict[str, Tensor]]
"""(modules, random stream of this step and process) -> named scalars; "loss" is minimised."""

_Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to minimise: AdamW, linear warm-up, cosine decay to zero, gradient norm at most 1."""

    updates: int
    learning_rate: float
    batch: int  # samples a process and update
    warmup: float = 0.03  # share of the updates
    weight_decay: float = 0.01
    average: float = 0.999  # decay of the moving average of the weights, per update
    seconds_between_checkpoints: float = 120.0
    precision: torch.dtype = torch.bfloat16  # of the arithmetic; float32 is faster on older CPUs

    def __post_init__(self) -> None:
        for name in ("updates", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average}")

    def rate(self, step: int) -> float:
        """The learning rate of an update."""
        warm = max(1, round(self.warmup * self.updates))
        rise = min(1.0, (step + 1) / warm)
        fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, self.updates - warm)))
        return self.learning_rate * rise * fall


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Within this context layers draw their initial weights from ``seed``: equal on every process.

    torch's layers draw from the global stream; it is put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def fit(
    modules: nn.ModuleDict,
    loss: Loss,
    recipe: Recipe,
    *,
    folder: Path,
    seed: int,
    name: str,
    on_checkpoint: Callable[[int, nn.ModuleDict], None] | None = None,
) -> nn.ModuleDict:
    """Minimise ``loss`` over the parameters of ``modules`` that want a gradient.

    Args:
        modules: what is trained (and whatever else the loss needs, frozen); built within
            ``initial_weights``.
        loss: called once an update, under autocast to the recipe's precision.
        recipe: length, rate, batch.
        folder: of the checkpoints; training goes on from the newest.
        seed: of the run; step and process are hashed into the stream that ``loss`` gets.
        name: of the run, shown beside the progress bar.
        on_checkpoint: called with the averaged weights whenever a checkpoint is written.

    Returns:
        The modules with averaged weights.

    Raises:
        FloatingPointError: the gradient is not finite; the weights are untouched and the newest
            checkpoint remains.
    """
    accelerator = parallel.start()
    modules.to(accelerator.device)
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    averaged = AveragedModel(
        modules, multi_avg_fn=_moving_average(recipe.average), use_buffers=True
    )
    weights = averaged.module
    assert isinstance(weights, nn.ModuleDict)  # a copy of ``modules``
    first = 0
    if resumed := checkpoint.latest(folder):
        modules.load_state_dict(resumed.state["modules"])
        optimiser.load_state_dict(resumed.state["optimiser"])
        averaged.load_state_dict(resumed.state["averaged"])
        first = resumed.step
    saved = time.monotonic()
    main = accelerator.is_main_process
    with progress_bar(name, recipe.updates, done=first, shown=main) as advance:
        for step in range(first, recipe.updates):
            generator = stream(seed, name, step, accelerator.process_index)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            optimiser.zero_grad()
            reduced = recipe.precision != torch.float32
            with torch.autocast(accelerator.device.type, recipe.precision, enabled=reduced):
                numbers = loss(modules, generator)
            (numbers["loss"] / accelerator.num_processes).backward()
            parallel.add_gradients(parameters, accelerator)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"{name}: gradient norm is {norm} at step {step}")
            optimiser.step()
            # Early weights are far off: let the average forget them faster at the start.
            averaged.multi_avg_fn = _moving_average(min(recipe.average, (1 + step) / (10 + step)))
            averaged.update_parameters(modules)
            shown = "  ".join(f"{k} {v.detach():.4f}" for k, v in numbers.items())
            advance(shown)
            due = time.monotonic() - saved > recipe.seconds_between_checkpoints
            if main and (due or step + 1 == recipe.updates):
                state = {
                    "modules": modules.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "averaged": averaged.state_dict(),
                }
                checkpoint.save(folder, step + 1, state)
                _log.info(f"{name} {step + 1}/{recipe.updates}: {shown}")
                if on_checkpoint:
                    on_checkpoint(step + 1, weights)
                saved = time.monotonic()
    return weights


def _moving_average(decay: float) -> Callable[[_Tensors, _Tensors, Any], None]:
    """Exponential averages of tensors of one type; integers, such as places of tokens, are copied.

    torch's own rounds an average of equal integers down, one step after the other.
    """
    average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averages: _Tensors, values: _Tensors, count: Any) -> None:
        if torch.is_floating_point(averages[0]):
            average(averages, values, count)
            return
        for kept, value in zip(averages, values, strict=True):
            kept.copy_(value)

    return update
