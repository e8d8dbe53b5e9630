"""Flipped bits and lost ends of every file of a run: is it refused by name, or made anew?

Every damage is read by the function that a resumed run reads this file with. A damaged file must
be refused, or passed over with a warning; either way it is named. It may also be read as if it were
whole, where the damage changes nothing of what is read (a bit of a line's indentation).

Of each file a few are damaged in a run that was killed, too, which is then resumed as a whole.
"""

import logging
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.faults import small_run
from benchmarks.faults.row import Row
from diffusion_envs import digests
from diffusion_envs.runs import checkpoint, tracking
from diffusion_envs.runs.report_pictures import pictures
from diffusion_envs.runs.resuming import Checkpoints
from diffusion_envs.runs.run_folder import read_settings

FLIPS, LOST_ENDS, RESUMED = 200, 50, 4
_ERRORS = (ValueError, OSError, RuntimeError)  # that the command line says in words
_ANEW = (  # what is in them decides nothing: a resumed run writes them again without reading them
    *("summary.json", "frontier.json", "README.md", "report.html"),
    *("evaluation/by_prompt.jsonl", "samples/step-000003.png", "tensorboard"),
    *("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"),
)


@dataclass(frozen=True)
class Kind:
    """A file of a run, and how a run reads it.

    Attributes:
        name: of the file, in the folder of a run.
        read: what it is used for, from the run's folder; the value must not change unseen.
        what: happens to it.
    """

    name: str
    read: Callable[[Path], Any]
    what: str = "refused by name"


def _kinds(run: Path) -> list[Kind]:
    newest = f"checkpoints/step-{small_run.UPDATES:06d}"
    best = next((run / "best").iterdir()).name
    exported = next((run / "exported").iterdir()).name
    files = ("tensors.safetensors", "state.json", "manifest.json")
    anew = "passed over by name and made anew"
    passed = "passed over by name, the one before is used"
    warned = "told by name; no update depends on it"
    return [
        *(Kind(f"{newest}/{name}", _newest, passed) for name in files),
        *(Kind(f"best/{best}/{name}", _best) for name in files),
        *(Kind(f"exported/{exported}/{name}", _exported) for name in files),
        Kind("config.json", read_settings),
        *(Kind(name, _logs, warned) for name in tracking.LOGS),
        Kind(
            "evaluation/before.safetensors",
            partial(_tensors, name="evaluation/before.safetensors"),
            anew,
        ),
        Kind(
            "evaluation/frontier.safetensors",
            partial(_tensors, name="evaluation/frontier.safetensors"),
            anew,
        ),
        Kind(
            "pytorch_lora_weights.safetensors",
            partial(_tensors, name="pytorch_lora_weights.safetensors"),
        ),
        Kind("lora_kohya.safetensors", partial(_tensors, name="lora_kohya.safetensors")),
        Kind("wandb.json", _wandb),
        Kind("samples/step-000000.png", _pictures, "left out of the report by name"),
    ]


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """One row a file, and two of whole runs."""
    whole = small_run.uninterrupted()
    run = folder / "read" / "run"
    shutil.copytree(whole.folder, run)
    _wandb(run)  # leaves its file
    _without_last_line(run / tracking.OVER_OPTIMISATION)  # which is written after the checkpoint
    chance = random.Random(1)
    flips, ends = (4, 2) if sample else (FLIPS, LOST_ENDS)
    for kind in _kinds(run):
        yield tries(
            kind, run, [*(flipped for _ in range(flips)), *(cut for _ in range(ends))], chance
        )
    yield from _resumed(folder, whole, chance, sample=sample)


# -- what is done to a file ------------------------------------------------------------------------


def flipped(content: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    place, changed = chance.randrange(8 * len(content)), bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    """The end is gone."""
    return content[: chance.randrange(len(content))]


def _without_last_line(path: Path) -> bytes:
    """Take the last line of a file out of it; the line."""
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines))
    return last


# -- how a run reads it ----------------------------------------------------------------------------


def _newest(run: Path) -> Any:
    newest = checkpoint.latest(run / "checkpoints")
    return None if newest is None else (newest.step, _plain(newest.state))


def _best(run: Path) -> Any:
    return _plain(checkpoint.load(next((run / "best").iterdir())).state)


def _exported(run: Path) -> Any:
    stored = checkpoint.latest(run / "exported")
    return None if stored is None else _plain(stored.state)


def _tensors(run: Path, name: str) -> Any:
    return _plain(digests.read_tensors(run / name))


class _NoTrainer(SimpleNamespace):
    """Stands for the trainer where only the logs are looked at."""

    def load_state(self, state: Any) -> None:
        """Nothing is trained here."""


def _logs(run: Path) -> Any:
    trainer: Any = _NoTrainer(accelerator=SimpleNamespace(process_index=0, num_processes=1))
    Checkpoints(run / "checkpoints", trainer, 1, []).load()
    return [tracking.read_metrics(run / name) for name in tracking.LOGS]


def _pictures(run: Path) -> Any:
    return pictures(run / "samples", None)


def _wandb(run: Path) -> Any:
    begun = list[Any]()
    service = SimpleNamespace(init=lambda **settings: begun.append(settings))
    tracking._wandb_run(service, run, True, None)
    return begun[0]["id"], begun[0]["project"], begun[0]["name"]


def _plain(state: Any) -> Any:
    """A state that can be compared."""
    if isinstance(state, torch.Tensor):
        return digests.of_tensors({"": state})
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, list | tuple) else state


# -- whether it is seen ----------------------------------------------------------------------------


class _Warnings(logging.Handler):
    """What was warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.said += record.getMessage()


def tries(
    kind: Kind,
    run: Path,
    damages: Sequence[Callable[[bytes, random.Random], bytes]],
    chance: random.Random,
) -> Row:
    """Damage a file again and again, and read it each time."""
    path = run / kind.name
    content, expected = path.read_bytes(), kind.read(run)
    held, first = 0, ""
    for damage in damages:
        path.write_bytes(damage(content, chance))
        wrong = _unseen(kind, run, expected)
        held += wrong is None
        first = first or wrong or ""
        path.write_bytes(content)
    bits = sum(damage is flipped for damage in damages)
    fault = f"a flipped bit ({bits}) or a lost end ({len(damages) - bits})"
    return Row(fault, kind.name, kind.what, len(damages), held, first)


def _unseen(kind: Kind, run: Path, expected: Any) -> str | None:
    """What is wrong with how a damaged file was read; None if nothing is."""
    warnings, log = _Warnings(), logging.getLogger("diffusion_envs")
    log.addHandler(warnings)
    log.propagate = False
    try:
        read = kind.read(run)
        said = warnings.said
    except _ERRORS as error:
        read, said = None, str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        log.removeHandler(warnings)
        log.propagate = True
    if read == expected:
        return None
    return None if _names(kind.name, said) else f"not named: {said or 'nothing was said'}"


def _names(name: str, said: str) -> bool:
    """Whether a file is named; of a manifest, which says what the others are, the checkpoint."""
    path = Path(name)
    return (path.parent.name if path.name == "manifest.json" else path.name) in said


# -- whole runs that are resumed -------------------------------------------------------------------


def _resumed(
    folder: Path, whole: small_run.Uninterrupted, chance: random.Random, *, sample: bool
) -> Iterator[Row]:
    """A run that was killed in its last update, with a damaged file; one with all of the others."""
    killed = folder / "killed" / "run"
    process = small_run.begin(killed)
    last_but_one = killed / "checkpoints" / f"step-{small_run.UPDATES - 1:06d}"
    while process.running and not last_but_one.exists():
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    process.wait()
    step = small_run.newest_step(killed)
    kinds = [
        *(f"checkpoints/step-{step:06d}/tensors.safetensors", "config.json", *tracking.LOGS),
        *(f"evaluation/{name}.safetensors" for name in ("before",)),
        "best/step-000000/state.json",
    ]
    held, first, tried = 0, "", 0
    for turn in range(1 if sample else RESUMED):
        for name in kinds[turn::2] if sample else kinds:
            place = folder / f"{name.replace('/', '-')}-{turn}" / "run"
            shutil.copytree(killed, place)
            damage = cut if turn == RESUMED - 1 else flipped
            (place / name).write_bytes(damage((place / name).read_bytes(), chance))
            wrong = _end(place, name, whole)
            tried, held, first = tried + 1, held + (wrong is None), first or wrong or ""
            shutil.rmtree(place.parent)
    promise = "refused by name, or the end is the same but for a log that is told"
    yield Row("any of these", "resumed as a whole", promise, tried, held, first)

    held, first, times = 0, "", 1 if sample else RESUMED
    for turn in range(times):
        place = folder / f"anew-{turn}" / "run"
        shutil.copytree(whole.folder, place)
        for name in _ANEW:
            files = [place / name] if (place / name).is_file() else (place / name).iterdir()
            for path in files:
                damage = cut if turn == RESUMED - 1 else flipped
                path.write_bytes(damage(path.read_bytes(), chance))
        (place / "run.lock").write_bytes(chance.randbytes(30))
        log = place / tracking.OVER_OPTIMISATION
        line = _without_last_line(log).decode()
        log.write_text(log.read_text() + re.sub(r"\.\d", ".0", line))  # all of its numbers
        ended = small_run.run(place)
        differs = small_run.first_difference(whole.results, small_run.results(place))
        wrong = ended.last if ended.code else differs
        held, first = held + (wrong is None), first or wrong or ""
        shutil.rmtree(place.parent)
    names = f"{', '.join(_ANEW)}, run.lock, last line of {tracking.OVER_OPTIMISATION}"
    yield Row("all at once", names, "written anew, the same", times, held, first)


def _end(place: Path, name: str, whole: small_run.Uninterrupted) -> str | None:
    """What is wrong with the end of a run that was resumed with a damaged file."""
    ended = small_run.run(place)
    named = _names(name, ended.said)
    if not ended.in_words or ended.code not in (0, 2):
        return f"{name}: {ended.last}"
    if ended.code:
        return None if named else f"{name}, not named: {ended.last}"
    told = small_run.results(place)
    drawn = set[str]()
    if name in tracking.LOGS and named:
        drawn = {name, "summary.json", "README.md"}
    elif name.startswith("best/"):  # which is read only where a rule has stopped the run
        drawn = {name}
    every = told.keys() | whole.results.keys()
    differing = {key for key in every if told.get(key) != whole.results.get(key)}
    return f"{name}: the end differs in {sorted(differing - drawn)}" if differing - drawn else None
