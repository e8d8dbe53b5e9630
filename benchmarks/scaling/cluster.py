"""An update on GPUs that we do not have: exact counts, divided by assumed speeds.

Operations, bytes and parameters are counted (``counts``). Speeds are assumptions, each a field of
``Machine``: published peaks, of which a share is assumed to be reached. Nothing here was measured
on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.scaling.communication import Link
from benchmarks.scaling.counts import Counts
from benchmarks.scaling.schedule import Work

Trains = Literal["lora", "all", "sharded"]
_FLOAT32, _HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Machine:
    """Assumed speeds of one GPU and of what connects it to others.

    Attributes:
        name: for tables.
        peak: published operations a second, bfloat16, dense.
        reached: share of the peak that networks of this kind are assumed to reach.
        memory: bytes of a GPU.
        gpus: of a node.
        inside: link between GPUs of a node.
        outside: link of a GPU to another node.
        disk: bytes a second of checkpoints.
    """

    name: str
    peak: float
    reached: float
    memory: float
    gpus: int
    inside: Link
    outside: Link
    disk: float

    def link(self, gpus: int) -> Link:
        """The slowest link of a ring through so many GPUs."""
        return self.inside if gpus <= self.gpus else self.outside

    @property
    def speed(self) -> float:
        """Operations a second that are assumed."""
        return self.peak * self.reached


A100 = Machine(
    "A100 80 GB, 8 in a node, 200 Gb/s each between nodes",
    peak=312e12,
    reached=0.3,
    memory=80e9,
    gpus=8,
    inside=Link(20e-6, 200e9),
    outside=Link(50e-6, 20e9),
    disk=1e9,
)
H100 = replace(
    A100,
    name="H100 80 GB, 8 in a node, 400 Gb/s each between nodes",
    peak=989e12,
    inside=Link(20e-6, 350e9),
    outside=Link(50e-6, 40e9),
)


@dataclass(frozen=True)
class Run:
    """What one GPU does in an update.

    Attributes:
        pictures: of one GPU.
        steps: of the sampler.
        batch: rows at once.
        guided: whether guidance doubles the rows.
        reference: whether the pretrained model is asked along the paths.
        minibatches: optimiser steps an update.
        trains: an adapter, all weights with a copy on every GPU, or all weights sharded.
        recomputes: activations.
        frozen: parameters of decoder and text encoders.
    """

    pictures: int = 32
    steps: int = 20
    batch: int = 8
    guided: bool = True
    reference: bool = True
    minibatches: int = 1
    trains: Trains = "lora"
    recomputes: bool = True
    frozen: float = 207e6

    @property
    def rows(self) -> int:
        """Of the network, for each pass along the paths of one GPU."""
        return self.pictures * self.steps * (2 if self.guided else 1)

    @property
    def calls(self) -> int:
        """Of the network, for each such pass."""
        return self.steps * -(-self.pictures // self.batch)


def seconds(counts: Counts, run: Run, gpus: int, machine: Machine) -> dict[str, float]:
    """Of each part of an update on one GPU, without rewards."""
    kind = counts.gradient if run.trains == "lora" else counts.gradient_of_all
    gradient = kind + (counts.forward if run.recomputes else 0)
    forward = run.rows * counts.forward / machine.speed
    parts = {
        "sampling": forward,
        "decoding": run.pictures * counts.decode / machine.speed,
        "reference": forward if run.reference else 0.0,
        "update": run.rows * gradient / machine.speed,
    }
    trained = counts.adapter if run.trains == "lora" else counts.parameters
    link = machine.link(gpus)
    if run.trains == "sharded":
        # weights come for each pass without a gradient; for one with it twice, and gradients go
        passes = run.calls * ((2 if run.reference else 1) + 2)
        step, each = gpus - 1, counts.parameters * _HALF / gpus
        gathered = passes * step * (link.latency + each / link.bandwidth)
        scattered = run.calls * step * (link.latency + 2 * each / link.bandwidth)
        parts["communication"] = gathered + scattered
    else:
        once = link.seconds("all-reduce", gpus, trained * _FLOAT32)
        parts["communication"] = run.minibatches * once
    parts["statistics"] = 3 * link.seconds("gather", gpus, statistics_bytes(run))
    parts["checkpoint"] = checkpoint_bytes(counts, run) / machine.disk
    return parts


def statistics_bytes(run: Run) -> int:
    """What a process sends of its paths: rewards, values, path KL of each step, prompt."""
    return run.pictures * _FLOAT32 * (2 * run.steps + 4)


def gradient_bytes(counts: Counts, run: Run) -> int:
    """What an all-reduce of gradients sums up, each optimiser step."""
    return _FLOAT32 * (counts.adapter if run.trains == "lora" else counts.parameters)


def checkpoint_bytes(counts: Counts, run: Run) -> int:
    """Weights that train and two moments of them, float32."""
    return 3 * gradient_bytes(counts, run)


def rollout_bytes(counts: Counts, run: Run) -> int:
    """What a GPU stores until the update: states, scores, noises, actions, pictures."""
    paths = (
        counts.event * (5 * run.steps + 1) if run.reference else counts.event * (4 * run.steps + 1)
    )
    return run.pictures * _FLOAT32 * (paths + counts.pixels)


def memory(counts: Counts, run: Run, gpus: int) -> dict[str, float]:
    """Bytes of one GPU at the peak of an update, by what they are for."""
    shards = gpus if run.trains == "sharded" else 1
    held = {
        "weights": _HALF * (counts.parameters / (shards if run.trains == "sharded" else 1))
        + _HALF * run.frozen,
        "trained": 4 * gradient_bytes(counts, run) / shards,
        "paths": float(rollout_bytes(counts, run)),
        "activations": run.batch
        * (2 if run.guided else 1)
        * float(counts.kept_recomputed if run.recomputes else counts.kept),
    }
    if run.trains != "lora":
        held["weights"] += _HALF * counts.parameters / shards  # the frozen copy, for reference
    return held


def work(counts: Counts, run: Run, gpus: int, machine: Machine) -> Work:
    """The same for the simulation of the schedule."""
    parts = seconds(counts, run, gpus, machine)
    shared = sum(parts[name] for name in ("communication", "statistics", "checkpoint"))
    each = {name: parts[name] / run.pictures for name in parts}
    return Work(
        pictures=run.pictures,
        batch=run.batch,
        sample=each["sampling"],
        decode=each["decoding"],
        reference=each["reference"],
        update=each["update"],
        shared=shared,
    )


def total(parts: dict[str, float], names: Sequence[str] | None = None) -> float:
    """Seconds of some parts, or of all."""
    return sum(value for name, value in parts.items() if names is None or name in names)
