"""A disk that is full when a file of a run is to be written, each of them in turn.

The disk is a small one of our own (a tmpfs), which is filled at the moment when the file is opened
to be written. Where no disk can be had, no file may grow any more (RLIMIT_FSIZE).
"""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults import small_run
from benchmarks.faults.disk import Disk
from benchmarks.faults.row import Row
from diffusion_envs import digests
from diffusion_envs.runs import checkpoint

FILES = (  # as they are written; what is said names what stands after the colon
    *("run.lock:run.lock", "config.json.partial:config.json"),
    *(
        "evaluation/before.safetensors.partial:before",
        "samples/step-000000.png.partial:step-000000",
    ),
    *("best/step-000000.partial/tensors:best", "best/step-000000.partial/state:best"),
    *("metrics.jsonl:metrics.jsonl", "training_by_prompt.jsonl:training_by_prompt.jsonl"),
    *(
        f"checkpoints/step-000001.partial/{name}:step 1"
        for name in ("tensors", "state", "manifest")
    ),
    *("checkpoints/step-000003.partial/tensors:step 3", "over_optimisation.jsonl:over_optim"),
    *("samples/step-000002.png.partial:step-000002", "exported/step-000003.partial/state:exported"),
    *("pytorch_lora_weights.safetensors:pytorch_lora", "lora_kohya.safetensors:lora_kohya"),
    *("evaluation/frontier.safetensors.partial:frontier", "by_prompt.jsonl.partial:by_prompt"),
    *("frontier.json.partial:frontier.json", "summary.json.partial:summary.json"),
    *("report.html.partial:report.html", "README.md.partial:README.md", "tensorboard/:tensorboard"),
)
_WORDS = ("No space left on device", "File too large")


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """One row of all files."""
    try:
        disk = Disk(folder / "disk")
    except OSError as error:
        disk, why = None, f"no file may grow, as {error}"
    else:
        why = ""
    whole = small_run.uninterrupted()
    place = (folder if disk is None else disk.path) / "run"
    files = FILES[1::12] if sample else FILES
    wrong = list[tuple[str, str]]()
    for file in files:
        if words := tried(place, file, whole, disk):
            print(f"full_disk: {file}: {words}", file=sys.stderr, flush=True)
            wrong.append((file, words))
    first = f"{wrong[0][0].split(':')[0]}: {wrong[0][1]}" if wrong else why
    yield Row(
        "a full disk",
        f"at {len(files)} files, each in turn: "
        + ", ".join(file.split(":")[0].replace(".partial", "") for file in files),
        "it is named, nothing half written is left; with space it goes on to the same end",
        len(files),
        len(files) - len(wrong),
        first,
    )


def tried(place: Path, file: str, whole: small_run.Uninterrupted, disk: Disk | None) -> str | None:
    """What is wrong after the disk was full for a file; None if nothing is."""
    wrong = ended(place, file, disk)
    again = small_run.run(place)
    differs = small_run.first_difference(whole.results, small_run.results(place))
    if again.code:
        wrong = wrong or f"resumed: {again.last}"
    elif differs is not None:
        wrong = wrong or f"the end differs in {differs}"
    shutil.rmtree(place)
    return wrong


def ended(place: Path, file: str, disk: Disk | None) -> str | None:
    """What is wrong with how a run ends whose disk is full for a file; then there is space."""
    path, named = file.split(":")

    @contextmanager
    def filled() -> Iterator[None]:
        done = False

        def full(opened: str) -> None:
            nonlocal done
            if not done and f"/{path}" in opened.replace("/.unproved-", "/"):
                done = True
                _no_more_growth() if disk is None else disk.fill()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
                flags = arguments[2]
                if flags & (os.O_WRONLY | os.O_RDWR):
                    full(os.fsdecode(arguments[0]))

        sys.addaudithook(hook)
        for module in (digests, checkpoint):  # safetensors opens its files itself
            _announced(module, full)
        yield

    process = small_run.run(place, filled)
    if disk is not None:
        disk.free()
    return _after(place, process, named)


def _after(place: Path, ended: small_run.Ended, named: str) -> str | None:
    """What is wrong with how it ended, and what it left."""
    if ended.code != 2 or not ended.in_words:
        return ended.last
    # what cannot be written last is told: the checkpoint however a run ends
    names = any(name in ended.said for name in (named, f"{place}/checkpoints"))
    if not names or not any(words in ended.said for words in _WORDS):
        return f"not named: {ended.last}"
    left = [p for p in place.rglob("*") if p.name.endswith(".partial") or p.name.startswith(".")]
    if left or (place / "run.lock").exists():
        return f"left behind: {left or 'run.lock'}"
    step, logged = small_run.newest_step(place), small_run.logged(place)
    return None if max(step, 0) >= logged - 1 else f"checkpoint {step} with {logged} updates logged"


def _announced(module: Any, full: Any) -> None:
    """Let ``full`` know of a file before safetensors opens it."""
    save_file = module.save_file

    def announced(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
        full(os.fspath(path))
        save_file(tensors, path, *more, **named)

    module.save_file = announced


def _no_more_growth() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
