"""A run of 20 updates, resumed after each of them, and with each kind of its state left out.

Runs are on a problem with a known law, in processes of their own. What goes on has first trained on
its own: its weights, moments, critic, counts and scores are others', and so is every global random
state. The end must be that of the run that went through, bit for bit. Then one kind of state at a
time keeps what it had before loading: if the end is still the same, either that state is not
needed, or the comparison is blind.

Left out on purpose: generators, of which a run has none. All its noise, that of held-out samples
too, has a name (seed, stream, sample, update), and follows from the number of updates.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.faults import small_run
from benchmarks.faults.row import Row
from ctrl import Estimate
from diffusion_envs import objectives
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import Objective
from diffusion_envs.runs.early_stopping import EarlyStopping, Scores, StopRule
from diffusion_envs.runs.evaluation import WATCHED, evaluate
from diffusion_envs.runs.resuming import Checkpoints
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import parallel
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.loss_scale import LossScale
from diffusion_envs.training.optimisers import AdamW, NaturalGradient, Optimiser
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

UPDATES = 20
_OF_TIME = ("seconds", "memory")
_LESS_MEMORY = 3  # the update from which on fewer rows go through the network at once
State = dict[str, Any]


class Data:
    """What samples should look like."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Normals around 0.3."""
        return 0.3 + torch.randn(n, 2, generator=generator)


@dataclass(frozen=True)
class Setting:
    """A run in which these kinds of state matter.

    Attributes:
        objective: what learns.
        kinds: of state, each a path of keys into a checkpoint.
        size: of an update.
        target_kl: whether kl_weight moves.
        half: whether losses are scaled, as of a float16 network.
        optimiser: that makes the steps.
    """

    objective: Objective
    kinds: tuple[tuple[str, ...], ...]
    size: Mapping[str, Any] = field(default_factory=dict)
    target_kl: bool = False
    half: bool = False
    optimiser: Optimiser = field(default_factory=AdamW)


_EVERYWHERE = (("adapter",), ("update",), ("reward_queries",), ("network_calls",))
SETTINGS = {
    "a value network": Setting(
        objectives.ScoreAsAction(kl_weight=0.3, learning_rate=3e-3),
        (
            *_EVERYWHERE,
            ("mean",),
            ("optimiser",),
            ("optimiser", "state"),
            ("critic",),
            ("critic", "network"),
            ("critic", "optimiser"),
            ("critic", "network", "location"),
            ("critic", "network", "scale"),
            ("loss_scale",),
            ("loss_scale", "scale"),
            ("loss_scale", "kept"),
            ("kl_weight",),
            ("at_once",),
            ("callbacks", "EarlyStopping"),
        ),
        size={"average": 0.9, "warm_up": 4, "schedule": "cosine", "schedule_updates": 30},
        target_kl=True,
        half=True,
    ),
    "an older policy samples": Setting(
        objectives.DiffusionNFT(draws=2, learning_rate=3e-3),
        (*_EVERYWHERE, ("old",), ("optimiser",), ("callbacks", "EarlyStopping")),
    ),
    "an energy, rates that fall": Setting(
        objectives.ContinuousDxMIReleasedFromData(
            learning_rate=3e-3, energy_width=8, rate_decay=0.95
        ),
        (
            *_EVERYWHERE,
            ("critic", "network"),
            ("critic", "optimiser"),
            ("critic", "usual_moves"),
            ("optimiser", "param_groups"),
        ),
    ),
    "a natural gradient": Setting(
        objectives.DDPO(learning_rate=1e-2),
        (*_EVERYWHERE, ("optimiser",)),
        optimiser=NaturalGradient(nats=0.01, momentum=0.6),
    ),
}


class Run:
    """A run as ``finetune`` makes one, without a folder's other files."""

    def __init__(self, setting: Setting, checkpoints: Path) -> None:
        environment = GaussianProblem().environment(DDIM(1.0).bind(table(), 3), 7)
        size: dict[str, Any] = {"samples": 4, "batch": 64, "value_epochs": 1, **setting.size}
        self.trainer = Trainer(
            environment,
            setting.objective,
            UpdateSize(**size),
            accelerator=Accelerator(cpu=True),
            data=Data() if setting.objective.needs_data else None,
            target_kl=TargetKL(0.05, rate=0.2) if setting.target_kl else None,
            optimiser=setting.optimiser,
        )
        if setting.half:
            self.trainer.gradients.loss_scale = LossScale.of(torch.float16)
            self.trainer.gradients.loss_scale.patience = 7

        def measure(update: int, pretrained: bool) -> Scores:
            with self.trainer.averaged():
                told = evaluate(environment, 3, pretrained=pretrained, stream=WATCHED)
            return Scores.of(update, told)

        rule = StopRule(max_path_kl=1e6, every=4, samples=3)
        self.stopping = EarlyStopping(rule, measure, lambda update: None)
        self.checkpoints = Checkpoints(checkpoints, self.trainer, 1, [self.stopping])
        self.log: list[dict[str, Any]] = []

    def go_on(self, until: int, each: Callable[[int], None] = lambda update: None) -> None:
        """Train, evaluate and write checkpoints, as a run's loop does."""
        self.stopping.begin()
        for numbers in self.trainer.updates(until):
            if numbers["update"] == _LESS_MEMORY:
                self.trainer.gradients.batch = 5  # as if memory had run out
            self.stopping.after(numbers)
            self.checkpoints.after(numbers)
            plain = {k: v.as_dict() if isinstance(v, Estimate) else v for k, v in numbers.items()}
            self.log.append({k: v for k, v in plain.items() if k not in _OF_TIME})
            each(numbers["update"])

    def poison(self, seed: int) -> None:
        """Train on other samples, and disturb whatever is random in the process."""
        self.trainer.stream_name = f"poison {seed}"
        critic = self.trainer.critic
        if critic is not None:
            critic.stream_name = self.trainer.stream_name
        self.go_on(2)
        self.log.clear()
        self.trainer.stream_name = "train"
        if critic is not None:
            critic.stream_name = "train"
        self.stopping.scores = [Scores(0, torch.ones(3), {}, torch.ones(3))]
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # the global state is what is disturbed
        random.seed(seed)

    def end(self) -> dict[str, str]:
        """What is compared at the end, by part: digests of every number of the state."""
        state = {k: v for k, v in self.checkpoints.state().items() if k not in _OF_TIME}
        lines = {f"line {line['update']}": line for line in self.log}
        return {name: _digest(value) for name, value in (state | lines).items()}


def _digest(value: Any) -> str:
    """Of every bit of nested containers of tensors and numbers."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().contiguous().cpu().numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


# -- processes -----------------------------------------------------------------------------------


def _in_a_child(work: Callable[[], Any], told: Path) -> Any:
    """What is done in a process of its own, forked from one that has never differentiated."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        try:
            small_run.rebuild_threads()
            told.write_text(json.dumps(work()))
        except BaseException as error:
            told.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            if not isinstance(error, Exception):
                traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
    return json.loads(told.read_text()) if told.is_file() else {"error": "its process died"}


def _whole(setting: Setting, folder: Path) -> dict[str, str]:
    """The run that goes through; the checkpoint of every update is kept."""
    run = Run(setting, folder / "checkpoints")

    def keep(update: int) -> None:
        name = f"step-{update:06d}"
        shutil.copytree(folder / "checkpoints" / name, folder / f"after-{update}" / name)

    run.go_on(UPDATES, keep)
    return run.end()


def _resumed(
    setting: Setting, checkpoints: Path, seed: int, without: tuple[str, ...] | None
) -> dict[str, str]:
    """The end of a poisoned run that loads this, but for one kind of state."""
    other = checkpoints.with_name(f"{checkpoints.name}-{seed}-poison")
    run = Run(setting, other)
    run.poison(seed)
    if without is not None:
        _leave_out(run, without)
    run.checkpoints._folder = checkpoints
    run.checkpoints.load()
    run.go_on(UPDATES)
    return run.end()


def _leave_out(run: Run, kind: tuple[str, ...]) -> None:
    """On loading, one kind of state stays what it is."""
    own = _copied(run.checkpoints.state())
    if kind == ("old",):
        own["old"] = [old.clone() for old in run.trainer.old]
    load, others = run.trainer.load_state, run.stopping.load_state

    def trainer_state(state: State) -> None:
        load(_replaced(state, own, kind) if kind[0] != "callbacks" else state)

    vars(run.trainer)["load_state"] = trainer_state
    if kind[0] == "callbacks":
        vars(run.stopping)["load_state"] = lambda state: others(own["callbacks"][kind[1]])


def _replaced(state: Any, own: Any, kind: tuple[str, ...]) -> Any:
    """The state with one part of it from another."""
    name, *rest = kind
    inner = _replaced(state[name], own[name], tuple(rest)) if rest else own[name]
    return {**state, name: inner}


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list | tuple) else state


# -- rows ----------------------------------------------------------------------------------------


def difference(whole: Mapping[str, str], resumed: Mapping[str, str]) -> str | None:
    """The first part in which a resumed run differs at its end; None if it does not."""
    if "error" in resumed:
        return resumed["error"]
    for name, digest in whole.items():
        if name.startswith("line ") and name not in resumed:
            continue  # of before it was resumed
        if resumed.get(name) != digest:
            return name
    return next((name for name in resumed if name not in whole), None)


def points_and_kinds(name: str, folder: Path, *, sample: bool) -> Iterator[Row]:
    """One setting: resumed at every point, then without each kind of state at one."""
    setting = SETTINGS[name]
    folder.mkdir(parents=True)
    whole = _in_a_child(lambda: _whole(setting, folder), folder / "whole.json")
    if "error" in whole:
        raise RuntimeError(f"the run with {name} failed: {whole['error']}")
    points = (7,) if sample else range(1, UPDATES + 1)
    told, failed = folder / "told.json", list[str]()
    for point in points:
        place = folder / f"after-{point}"
        resumed = _in_a_child(lambda: _resumed(setting, place, point, None), told)  # noqa: B023  # done at once
        if (differs := difference(whole, resumed)) is not None:
            failed.append(f"after {point}: {differs} differs")
        told.unlink()
    yield Row(
        f"resumed: {name}",
        "after update 7" if sample else f"after each of {UPDATES} updates",
        "weights, moments, counts, scores and log of the whole run, bit for bit",
        len(points),
        len(points) - len(failed),
        failed[0] if failed else "",
    )
    kinds = setting.kinds[::4] if sample else setting.kinds
    unseen = list[str]()
    place = folder / "after-9"
    for kind in kinds:
        resumed = _in_a_child(lambda: _resumed(setting, place, 9, kind), told)  # noqa: B023  # done at once
        if difference(whole, resumed) is None:
            unseen.append(".".join(kind))
        told.unlink()
    yield Row(
        f"a kind of state left out: {', '.join('.'.join(kind) for kind in kinds)}",
        f"resumed after update 9: {name}",
        "detected: the end is another one, or loading fails",
        len(kinds),
        len(kinds) - len(unseen),
        f"not detected: {', '.join(unseen)}" if unseen else "",
    )


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """Every setting; the first of them in the short part."""
    parallel.start("cpu")
    for number, name in enumerate(list(SETTINGS)[:1] if sample else SETTINGS):
        yield from points_and_kinds(name, folder / str(number), sample=sample)
