"""What a run would cost, before it costs it: peak memory, and seconds of an update.

Memory       Networks are built on torch's meta device, where nothing is held, and what they keep
             for a gradient is counted there, exactly (``models.counting``). What the loop holds
             beside them is counted in a rehearsal with small states (``training.rehearsal``). The
             peak is the largest sum of both at any moment.
Time         Every operation of the network is timed once on this device, at its shapes
             (``models.speed``), and multiplied by what the rehearsal says is asked.
Not known    the reward's memory and time, and what others hold of the device.

``docs/scaling.md`` has estimates beside measurements.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_envs import rewards, samplers
from diffusion_envs.models.available_memory import available, gib, require_room
from diffusion_envs.models.counting import META, Meter, Operation, counted_for
from diffusion_envs.models.protocol import FROZEN, Model, WithNetworks
from diffusion_envs.models.speed import Stopwatch, rows_for
from diffusion_envs.objectives import Objective, ScoreAsAction
from diffusion_envs.runs.arguments import require_kinds
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.prompts import read_prompts
from diffusion_envs.training.optimisers import AdamW, Optimiser
from diffusion_envs.training.rehearsal import Moment, Plan
from diffusion_envs.training.sharded import local
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

GIB = 2**30
BUDGET = 2.0  # seconds in which operations are timed
_SIZE, _OPTIONS = UpdateSize(), RunOptions()


@dataclass(frozen=True)
class RunCost:
    """What a run would cost on a device.

    Attributes:
        device: "cpu" or "cuda".
        held: bytes by what they are for, that are held from the first update to the last.
        at_peak: bytes by what they are for, that are held beside them when most is held.
        phase: when that is.
        phases: peak bytes of each phase, all included.
        least: bytes without which no update can be made, whatever the pieces: what is held and the
            stored paths.
        available: bytes of the device; None if it is not known.
        seconds: of an update, by what they are for; of an evaluation as "evaluation"; empty where
            nothing was timed.
        calls: evaluations of the network in an update, one for each row.
        notes: what is not in these numbers.
    """

    device: str
    held: Mapping[str, int]
    at_peak: Mapping[str, int]
    phase: str
    phases: Mapping[str, int]
    least: int
    available: int | None
    seconds: Mapping[str, float]
    calls: int
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self.phases[self.phase]

    @property
    def seconds_of_an_update(self) -> float | None:
        """Without those of the reward; None where nothing was timed."""
        parts = [value for name, value in self.seconds.items() if name != "evaluation"]
        return sum(parts) if parts else None

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the device has."""
        return self.available is None or self.peak <= self.available

    @property
    def largest(self) -> str:
        """The part that most bytes are for."""
        parts = {**self.held, **self.at_peak}
        return max(
            (name for name in parts if name not in (BASE, LATER)), key=lambda name: parts[name]
        )

    @property
    def refusal(self) -> str:
        """Why it does not fit, and what would help most."""
        parts = {**self.held, **self.at_peak}
        has = "" if self.available is None else f", and the device has {gib(self.available)}"
        return (
            f"the run needs about {gib(self.peak)} at its peak ({self.phase}){has}. The "
            f"largest part that a setting changes, {gib(parts[self.largest])}, is for "
            f"{self.largest}: {_REMEDIES[self.largest]}"
        )

    @property
    def rows(self) -> list[tuple[str, str]]:
        """A table: what, how much."""
        peak = [(name, size) for name, size in self.at_peak.items() if size]
        seconds = self.seconds_of_an_update
        return [
            *((name, gib(size)) for name, size in self.held.items()),
            *((f"{name}, at the peak ({self.phase})", gib(size)) for name, size in peak),
            ("peak memory", gib(self.peak)),
            ("memory of the device", "?" if self.available is None else gib(self.available)),
            ("network evaluations an update", str(self.calls)),
            *((f"seconds: {name}", f"{value:.3g}") for name, value in self.seconds.items()),
            ("seconds an update", "not timed" if seconds is None else _range(seconds)),
        ]


BASE = "interpreter and libraries"
LATER = "libraries that are loaded later"
WHOLE = "whole weights, to sample with"
HEAP = "pieces of the heap between tensors"
_LATER = 80 * 2**20  # bytes; measured, as is what follows (benchmarks.run_cost)
_HEAP = 5.5  # times a call's tensors without a gradient
UNCERTAINTY = 1.3  # factor between estimated and measured seconds (docs/scaling.md)
_REMEDIES = {
    "weights of the networks": "a reduced precision halves them (--precision bfloat16)",
    "pretrained copy": "keep it in the CPU's memory (--reference offloaded), or train a LoRA",
    "adapter": "a smaller --lora-rank",
    "weights that train": "train a LoRA (--trains lora)",
    "gradients": "train a LoRA (--trains lora), or a smaller --lora-rank",
    "state of the optimiser": "moments of 8 bits (--optimiser adamw-8bit), or a LoRA",
    "copies of what trains": "leave out --average, or train a LoRA (--trains lora)",
    WHOLE: "train a LoRA (--trains lora)",
    "value network": "an objective without one, such as ddpo or grpo",
    "activations": "recompute them (--gradient-checkpointing), or fewer rows at once (--batch)",
    HEAP: "set MALLOC_MMAP_THRESHOLD_=262144 in the environment, for slower calls",
    "decoder": "decode picture by picture (--decode-slices), or fewer at once (--batch)",
    "paths and pictures": (
        "keep them in the CPU's memory (--stored-paths host), or fewer --samples or --steps"
    ),
    "copy for the checkpoint": "train a LoRA (--trains lora)",
    "pipeline that is read back": "train a LoRA (--trains lora)",
}


def estimate(
    model: Any,
    *,
    reward: rewards.Reward,
    prompts: Iterable[str] | Path,
    objective: Objective | None = None,
    optimiser: Optimiser | None = None,
    sampler: samplers.Sampler | None = None,
    steps: int = 20,
    updates: int = 50,
    size: UpdateSize = _SIZE,
    options: RunOptions = _OPTIONS,
    seed: int = 0,
    processes: int = 1,
    timed: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> RunCost:
    """What ``finetune`` with the same arguments would cost; no weights are read.

    Args:
        model: as of ``finetune``; a loaded one is asked itself.
        reward: as of ``finetune``; it is not asked.
        prompts: as of ``finetune``.
        objective: as of ``finetune``.
        optimiser: as of ``finetune``.
        sampler: as of ``finetune``.
        steps: as of ``finetune``.
        updates: as of ``finetune``.
        size: as of ``finetune``.
        options: as of ``finetune``.
        seed: as of ``finetune``.
        processes: that share the samples, and the weights where the model is sharded; the answer is
            for each of them.
        timed: whether operations are timed, for about ``BUDGET`` seconds.
        clock: that is read for it.

    Raises:
        TypeError: as of ``finetune``.
        ValueError: as of ``finetune``, of what can be known before.
        FileNotFoundError: the model is not there.
    """
    objective = ScoreAsAction() if objective is None else objective
    sampler = samplers.DDIM() if sampler is None else sampler
    optimiser = AdamW() if optimiser is None else optimiser
    require_kinds(
        reward=reward,
        objective=objective,
        optimiser=optimiser,
        sampler=sampler,
        size=size,
        options=options,
        seed=seed,
    )
    named = read_prompts(prompts)
    asked = None if model.device is None else str(model.device)
    kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = kind.partition(":")[0]
    share = replace(size, samples=size.samples // processes)
    with counted_for(kind):
        loaded = model
        if not isinstance(model, Model):
            loaded = model.load(device=META, batch=size.batch, seed=seed)
        base = resident()  # with all libraries that a run imports
        networks = _Networks(loaded)
        plan = Plan(
            model=loaded,
            picture=networks.picture,
            objective=objective,
            sampler=sampler,
            steps=steps,
            size=share,
            reward=reward,
            prompts=len(named),
            evaluation_samples=options.evaluation_samples,
            evaluate=lambda environment, n, batch: evaluate(environment, n, batch=batch),
            learns_from_data=options.data is not None,
            target_kl=options.target_kl,
            log_path_kl=options.log_path_kl,
        )
        course = plan.rehearse()
        shares = processes if getattr(model, "sharded", False) else 1
        held = _held(loaded, plan, optimiser, kind, base, shares)
        peaks = {
            "first update": held.whole | _peak(course.first, networks, size.batch, kind),
            "update": held.whole | _peak(course.update, networks, size.batch, kind),
            "evaluation": held.whole | _peak(course.evaluation, networks, size.batch, kind),
            "step of the optimiser": held.stepping,
            "checkpoint": held.checkpoint if kind == "cpu" else {},
            "export": held.export if kind == "cpu" else {},
        }
        seconds = dict[str, float]()
        if timed:
            watch = Stopwatch(torch.device(kind), BUDGET, clock)
            seconds = _seconds(course.update, networks, watch, size.batch)
            later = _seconds(course.evaluation, networks, watch, size.batch)
            seconds["evaluation"] = sum(later.values())
    always = sum(held.always.values())
    phases = {name: always + sum(parts.values()) for name, parts in peaks.items()}
    phase = max(phases, key=lambda name: phases[name])
    stored = max(
        (int(moment.alive) for moment in course.update if moment.returns is not None), default=0
    )
    notes = [f"the reward ({rewards.reward_name(reward)}) is not in these numbers"]
    if type(optimiser) is not AdamW:
        notes.append(f"what {type(optimiser).__name__} asks of the network itself is not, either")
    return RunCost(
        device=kind,
        held=held.always,
        at_peak=peaks[phase],
        phase=phase,
        phases=phases,
        least=always - held.always.get(BASE, 0) - held.always.get(LATER, 0) + stored,
        available=available(kind),
        seconds=seconds,
        calls=sum(m.rows for m in course.update if m.what in ("network", "pretrained")),
        notes=tuple(notes),
    )


# -- memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Count:
    """Of one call, with or without the gradient that follows."""

    peak: int  # until it answers
    kept: int  # then, for the gradient
    back: int  # most beside what is kept, while the gradient is computed
    operations: Mapping[Operation, int]
    calls: int
    flops: int


class _Networks:
    """Counts of a model's networks, by rows at once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._counts = dict[tuple[str, int, bool], _Count]()
        self.condition = model.condition(["a prompt"])
        with torch.no_grad():
            shape = model.decode(torch.zeros(1, *model.event, device=model.device)).shape
        self.picture = tuple(shape[1:])
        for parameter in model.parameters:  # gradients are held from the first update on
            parameter.grad = torch.zeros_like(parameter)

    def count(self, what: str, rows: int, gradient: bool) -> _Count:
        """Of a call of the network ("network", "pretrained") or the decoder."""
        key = what, rows, gradient
        if key not in self._counts:
            self._counts[key] = self._counted(*key)
        return self._counts[key]

    def _counted(self, what: str, rows: int, gradient: bool) -> _Count:
        model = self.model
        device = model.device
        states = torch.zeros(rows, *model.event, device=device)
        if gradient and what != "network":
            states.requires_grad_()
        some = self.condition[torch.zeros(rows, dtype=torch.long, device=device)]
        timesteps = torch.zeros(rows, dtype=torch.long, device=device)

        def ask() -> Tensor:
            if what == "decoder":
                return model.decode(states)
            if what == "pretrained":
                with model.pretrained():
                    return model(states, timesteps, some)
            return model(states, timesteps, some)

        with Meter(operations=True) as meter, torch.set_grad_enabled(gradient):
            answer = ask()
            peak, kept, back = meter.peak, meter.alive, 0
            if gradient and answer.requires_grad:
                meter.peak = meter.alive
                answer.backward(torch.ones_like(answer))
                back = meter.peak - kept
        return _Count(peak, kept, back, meter.operations, meter.calls, meter.flops)


def _peak(moments: list[Moment], networks: _Networks, batch: int, kind: str) -> dict[str, int]:
    """What is held at the moment when most is, beside what always is.

    On a CPU glibc keeps tensors of less than 32 MiB in a heap, in which the place of a freed one is
    not taken by the next of its size.
    """
    kept = dict[int, int]()
    best: dict[str, int] = {}

    def offer(paths: float, activations: int, decoder: int) -> None:
        parts = {"paths and pictures": int(paths), "activations": activations, "decoder": decoder}
        if sum(parts.values()) > sum(best.values()):
            best.clear()
            best.update(parts)

    for place, moment in enumerate(moments):
        offer(moment.before, sum(kept.values()), 0)
        if moment.what not in ("network", "pretrained", "decoder"):
            continue
        decodes = moment.what == "decoder"
        asked = moment if moment.returns is None else moments[moment.returns]
        rows = asked.rows if asked.gradient else min(asked.rows, batch)
        count = networks.count(asked.what, rows, asked.gradient)
        own = count.peak if moment.returns is None else count.back
        offer(moment.alive, sum(kept.values()) + (0 if decodes else own), own if decodes else 0)
        if moment.returns is not None:
            kept.pop(moment.returns, None)
        elif asked.gradient:
            kept[place] = count.kept
    asked = [m.rows for m in moments if m.what == "network" and m.rows]
    learned = [m.rows for m in moments if m.what == "network" and m.gradient]
    if kind == "cpu" and sys.platform == "linux" and asked:
        rows = max([min(max(asked), batch), *learned])
        best[HEAP] = int(_HEAP * networks.count("network", rows, False).peak)
    return best


@dataclass(frozen=True)
class _Held:
    always: dict[str, int]
    whole: dict[str, int]  # of sharded weights, while they are sampled with
    stepping: dict[str, int]
    checkpoint: dict[str, int]
    export: dict[str, int]


def bytes_of(network: nn.Module) -> int:
    """Of its weights and buffers, each once."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    """Of a sharded one, this process's part."""
    return local(tensor).numel() * tensor.dtype.itemsize


def _held(
    model: Model, plan: Plan, optimiser: Optimiser, kind: str, base: int, shares: int
) -> _Held:
    """What a trainer holds beside the networks' activations and the paths.

    Of weights that are sharded among so many processes each holds a part, and of gradients, moments
    and copies. It holds the whole weights too while it samples; they are counted for all of an
    update, of which the rest holds less.
    """
    trained = sum(_bytes(parameter) for parameter in model.parameters)
    networks = dict(model.networks) if isinstance(model, WithNetworks) else {}
    everything = sum(bytes_of(part) for name, part in networks.items() if name != FROZEN)
    frozen = bytes_of(networks[FROZEN]) if FROZEN in networks else 0
    state, temporary = _state(model.parameters, optimiser)
    value = plan.value_network_bytes()
    averages = plan.size.average is not None
    lags = plan.objective.old_decay(0) > 0
    name = "weights that train" if frozen else "adapter"
    always = {
        **({BASE: base, LATER: _LATER} if kind == "cpu" else {}),
        "weights of the networks": max(0, everything - trained),
        name: trained // shares,
        "pretrained copy": frozen // shares,
        "gradients": trained // shares,
        "state of the optimiser": state // shares,
        "copies of what trains": trained * (1 + averages) // shares,
        "value network": 4 * value,  # with its gradient and the optimiser's state
    }
    always = {name: size for name, size in always.items() if size}
    written = trained * (1 + averages + lags) + state + 3 * value
    pipeline = everything if frozen else 0
    missing = (trained + frozen) * (shares - 1) // shares
    return _Held(
        always=always,
        whole={WHOLE: missing} if missing else {},
        stepping={"state of the optimiser, temporary": temporary // shares},
        checkpoint={"copy for the checkpoint": written},
        export={"pipeline that is read back": pipeline},
    )


def _state(parameters: list[nn.Parameter], optimiser: Optimiser) -> tuple[int, int]:
    """Bytes that an optimiser holds from step to step, and within one."""
    twins = [nn.Parameter(torch.empty_like(p, device=META)) for p in parameters]
    whole = sum(_bytes(twin) for twin in twins)
    if type(optimiser).__name__ == "AdamW8bit":
        return whole // 2, whole // 4
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    stepper = torch.optim.AdamW(twins, foreach=False)
    with Meter() as meter:
        stepper.step()
    return meter.alive, meter.peak - meter.alive


def require_room_for(trainer: Trainer) -> None:
    """Refuse a run that cannot fit, whatever its pieces; what might fit is not refused.

    Counted are weights, gradients, AdamW's moments, the copy of the policy that samples, and the
    stored paths of an update: less than any run holds.

    Raises:
        TooLargeError: the device has less.
    """
    environment, size, model = trainer.environment, trainer.size, trainer.environment.model
    trained = sum(_bytes(parameter) for parameter in model.parameters)
    networks = dict(model.networks) if isinstance(model, WithNetworks) else {}
    here = [part for part in networks.values() if next(part.parameters()).device == model.device]
    parts = {
        "weights of the networks": max(trained, sum(map(bytes_of, here))),
        "copies of what trains": trained,
    }
    if type(trainer.optimiser).__name__ == "TorchStepper":
        parts["gradients"] = trained
    paths = size.samples // trainer.accelerator.num_processes
    stored = 4 * paths * environment.sampler.steps * math.prod(environment.event)
    if environment.sampler.shows_steps:
        parts["paths and pictures"] = 3 * stored  # states, scores, noises
    largest = max(parts, key=lambda name: parts[name])
    what = f"the run ({largest}: {gib(parts[largest])})"
    require_room(sum(parts.values()), model.device.type, what, _REMEDIES[largest])


# -- time ------------------------------------------------------------------------------------------


def _seconds(
    moments: list[Moment], networks: _Networks, watch: Stopwatch, batch: int
) -> dict[str, float]:
    """Of an update's parts."""
    names = {"network": "sampling", "pretrained": "pretrained scores", "decoder": "decoding"}
    seconds = dict[str, float]()
    timed = dict[tuple[str, bool, int], float]()
    flops = clocked = 0.0
    for moment in moments:
        if moment.returns is not None or moment.what not in names:
            continue
        most = moment.rows if moment.gradient else min(moment.rows, batch)
        key = moment.what, moment.gradient, most
        if key not in timed:
            one = networks.count(moment.what, 1, moment.gradient)
            rows = rows_for(one.flops, most, BUDGET / 4)
            count = networks.count(moment.what, rows, moment.gradient)
            timed[key] = watch.seconds(count.operations, count.calls) / rows
            flops, clocked = flops + count.flops, clocked + timed[key] * rows
        name = names[moment.what]
        if moment.gradient:
            name = "gradients"
        seconds[name] = seconds.get(name, 0.0) + timed[key] * moment.rows
    if flops:
        others = sum(moment.flops for moment in moments)
        seconds["value network"] = others * clocked / flops
    return {name: value for name, value in seconds.items() if value > 0}


# -- this process ----------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process has now; at its peak where the system does not say."""
    path = Path("/proc/self/statm")
    if path.is_file():
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident()


def peak_resident() -> int:
    """Most bytes of memory that this process had at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _range(seconds: float) -> str:
    return f"{seconds:.3g} ({seconds / UNCERTAINTY:.3g} to {seconds * UNCERTAINTY:.3g})"
