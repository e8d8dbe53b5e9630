"""Time and memory of updates on this machine, in turns with calls of the network alone.

The machine does other work, so times are of the processor and are divided by that of a few network
calls of the same model in the same round: what slows one slows the other.
"""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.update_speed import Setting
from diffusion_envs import objectives
from diffusion_envs.training.trainer import Trainer


@dataclass(frozen=True)
class Sizes:
    """What an update on one model depends on."""

    objective: str = "DDPO"
    samples: int = 4
    steps: int = 2
    batch: int = 4
    rank: int = 4
    guidance: float = 1.0

    @property
    def branches(self) -> int:
        """Rows that the network sees for one."""
        return 1 if self.guidance == 1 else 2

    @property
    def at_once(self) -> int:
        """Rows (sample, step) of one call with a gradient: whole groups."""
        group = _GROUPS[self.objective]
        return min(max(1, self.batch // group) * group, self.samples * self.steps)

    @property
    def label(self) -> str:
        """For tables."""
        return (
            f"{self.objective}, {self.samples} pictures, {self.steps} steps, batch {self.batch}, "
            f"rank {self.rank}, guidance {self.guidance:g}"
        )


# What is fitted, and what is held out: chosen before anything was measured.
FITTED = (
    Sizes(),
    Sizes(samples=8),
    Sizes(steps=4),
    Sizes(samples=8, batch=2),
    Sizes(samples=8, batch=8),
    Sizes("GRPO", samples=8),
    Sizes("GRPO", steps=4, batch=2),
    Sizes(rank=16),
    Sizes(guidance=3.0),
)
HELD_OUT = Sizes("GRPO", samples=6, steps=3, batch=3, rank=8, guidance=3.0)
_GROUPS = {"DDPO": 1, "GRPO": 2}  # paths that are compared and cannot be taken apart
_OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "DDPO": objectives.DDPO,
    "GRPO": lambda: objectives.GRPO(group=_GROUPS["GRPO"]),  # asks the pretrained model, too
}


def rows(sizes: Sizes) -> dict[str, int]:
    """Rows of the network without and with a gradient, calls of each kind, decoded pictures."""
    paths = sizes.samples * sizes.steps
    asked = paths * (2 if sizes.objective == "GRPO" else 1)
    pieces = -(-sizes.samples // sizes.batch)
    sampled = sizes.steps * pieces
    reference = -(-paths // sizes.batch) if sizes.objective == "GRPO" else 0
    return {
        "forward": asked * sizes.branches,
        "gradient": paths * sizes.branches,
        "forward_calls": sampled + reference,
        "gradient_calls": -(-paths // sizes.at_once),
        "decoded": sizes.samples,
    }


def trainer(model: str | Path, sizes: Sizes) -> Trainer:
    """A run's loop on a fresh adapter, as after its first update."""
    setting = Setting(
        model=model,
        samples=sizes.samples,
        steps=sizes.steps,
        batch=sizes.batch,
        guidance=sizes.guidance,
    )
    loaded = setting.load(lora_rank=sizes.rank)
    return setting.trainer(loaded, _OBJECTIVES[sizes.objective]())


def seconds(call: Callable[[], Any]) -> float:
    """Of the processor."""
    began = time.process_time()
    call()
    return time.process_time() - began


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that the process held during a call beyond those before it (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of from now on
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measured(model: str | Path, every: Sequence[Sizes], rounds: int) -> Iterator[Mapping[str, Any]]:
    """For each: seconds over those of the yardstick, peak memory, and rows; medians of rounds."""
    trainers = [trainer(model, sizes) for sizes in every]
    yardstick = partial(_calls, trainers[0])
    for made in trainers:
        made.step()  # whatever is made once is made
    ratios: list[list[float]] = [[] for _ in every]
    peaks: list[list[int]] = [[] for _ in every]
    units = []
    for _ in range(rounds):
        for k, made in enumerate(trainers):
            before = seconds(yardstick)
            own = seconds(made.step)
            unit = (before + seconds(yardstick)) / 2
            units.append(unit)
            ratios[k].append(own / unit)
    for _ in range(2):
        for k, made in enumerate(trainers):
            peaks[k].append(peak(made.step))
    for k, sizes in enumerate(every):
        spent = trainers[k].environment.model.calls
        trainers[k].step()
        asked = trainers[k].environment.model.calls - spent
        expected = rows(sizes)
        assert asked == expected["forward"] + expected["gradient"], (sizes, asked, expected)
        yield {
            "model": Path(model).name,
            "sizes": asdict(sizes),
            "ratio": statistics.median(ratios[k]),
            "ratios": [round(ratio, 4) for ratio in ratios[k]],
            "unit_seconds": statistics.median(units),
            "peak_bytes": min(peaks[k]),
            "load": round(os.getloadavg()[0], 1),
        }


def _calls(made: Trainer) -> None:
    """The yardstick: eight rows of the network, without a gradient."""
    model: Any = made.environment.model
    states = torch.zeros(4, *model.event)
    condition = model.condition(["a photo of a cat"])[torch.zeros(4, dtype=torch.int64)]
    with torch.no_grad():
        for _ in range(2):
            model(states, torch.full((4,), 500), condition)


# -- what is fitted --------------------------------------------------------------------------------


TIME = ("row", "row with a gradient", "call", "picture", "update")
MEMORY = ("row with a gradient at once", "number stored of a path", "update")


def time_features(sizes: Sizes) -> list[float]:
    """How often each of ``TIME`` is paid."""
    asked = rows(sizes)
    calls = asked["forward_calls"] + asked["gradient_calls"]
    return [float(n) for n in (asked["forward"], asked["gradient"], calls, asked["decoded"], 1)]


def memory_features(sizes: Sizes, event: int) -> list[float]:
    """How often each of ``MEMORY`` is paid."""
    at_once = sizes.at_once * sizes.branches
    stored = sizes.samples * event * (4 * sizes.steps + 1)
    if sizes.objective == "GRPO":
        stored += sizes.samples * event * sizes.steps
    return [float(at_once), float(stored), 1.0]


def fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Prices of at least 0 with the least squares of relative errors."""
    relative = [[x / y for x in row] for row, y in zip(features, values, strict=True)]
    prices, _ = nnls(np.array(relative), np.ones(len(values)))
    return [float(price) for price in prices]


def predicted(prices: Sequence[float], features: Sequence[float]) -> float:
    """What these prices come to."""
    return sum(price * n for price, n in zip(prices, features, strict=True))
