"""Checkpoints that survive crashes, full disks and bit rot: safetensors, JSON and a manifest of digests.

One folder a step. It is written under a temporary name, every file is synchronised to disk, and it is
renamed into place last, so a crash at any moment leaves the previous checkpoint as the newest. Nothing
is pickled. ``latest`` is found by looking, not stored.

```
checkpoints/step-000010/
  tensors.safetensors      every tensor, under a flat name
  state.json               everything else
  manifest.json            format version, step, and size and SHA-256 of the two files
```
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not whole; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``save`` was given, read back and verified."""

    step: int
    state: Any
    path: Path


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor in nested containers by a reference, collecting them by flat name."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"~tensor": name}
    if isinstance(value, Mapping):
        items = [[k, _split(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("~") for k, _ in items):
            return dict(items)
        return {"~items": items}  # integer keys, as in an optimiser's state
    if isinstance(value, tuple | list):
        parts = [_split(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {"~tuple": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings and containers; {name} is {value!r}"
    )


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "~tensor" in value:
        return tensors[value["~tensor"]]
    if "~items" in value:
        return {k: _join(v, tensors) for k, v in value["~items"]}
    if "~tuple" in value:
        return tuple(_join(v, tensors) for v in value["~tuple"])
    return {k: _join(v, tensors) for k, v in value.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: str | Path, step: int, state: Any, *, keep: int = 2) -> Path:
    """Write ``folder/step-NNNNNN`` and drop all but the newest ``keep`` valid checkpoints.

    Args:
        folder: the run's checkpoint folder; made if need be.
        step: of the run; the next update to do.
        state: nested dicts, lists and tuples of tensors, numbers, strings and None.
        keep: how many checkpoints stay, at least 1.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched and the partial one is removed.
        TypeError: ``state`` holds something that is neither tensor, number, string nor container.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    partial = folder / f"step-{step:06d}.partial"
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "state", tensors)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(tree))
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
            for name in ("tensors.safetensors", "state.json")
        }
        manifest = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*partial.iterdir(), partial]:
            _synchronise(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _synchronise(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} to {folder}: {error}. Earlier checkpoints are "
            "untouched; free space or choose another output folder, then resume"
        ) from error
    for old in sorted(folder.glob("step-[0-9]*[0-9]"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: str | Path) -> Checkpoint:
    """Read one checkpoint, verifying size and SHA-256 of every file first.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is unknown.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files, step = manifest["format"], manifest["files"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'manifest.json'} is missing or unreadable: {error}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version reads format {FORMAT}")
    if set(files) != {"tensors.safetensors", "state.json"} or path.name != f"step-{step:06d}":
        raise CheckpointError(f"{path / 'manifest.json'} does not describe this checkpoint")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes instead of {expected['bytes']}")
        if _digest(file) != expected["sha256"]:
            raise CheckpointError(f"{file} was altered: its SHA-256 is not the manifest's")
    tensors = load_file(path / "tensors.safetensors")
    return Checkpoint(step, _join(json.loads((path / "state.json").read_text()), tensors), path)


def latest(folder: str | Path) -> Checkpoint | None:
    """The newest valid checkpoint in ``folder``; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    damage: CheckpointError | None = None
    for path in sorted(Path(folder).glob("step-[0-9]*[0-9]"), reverse=True):
        try:
            return load(path)
        except CheckpointError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
            damage = damage or error
    if damage:
        raise CheckpointError(f"no valid checkpoint in {folder}; the newest: {damage}") from damage
    return None
