"""Checkpoints that survive crashes, full disks and bit rot: tensors, JSON, a manifest of digests.

One folder a step. It is written under a temporary name, every file is synchronised to disk, and it
is renamed into place last, so a crash at any moment leaves the previous checkpoint as the newest.
Nothing is pickled. ``latest`` reads the folder, no pointer is stored. Every field of the manifest
is checked on loading, so no flipped bit of a checkpoint goes unseen.

```
checkpoints/step-000010/
  tensors.safetensors      every tensor, under a flat name
  state.json               everything else
  manifest.json            format version, step, and size and SHA-256 of the two files
checkpoints/step-000010.partial     being written, or abandoned by a crash: never read
checkpoints/step-000010.replaced    the former step 10, until its successor stands
```
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_envs.whole_files import synchronise

FORMAT = 1
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not whole; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The state that ``save`` stored, read back and verified."""

    step: int
    state: Any
    path: Path


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor in nested containers by a reference, collecting them by flat name."""
    if isinstance(value, Tensor):
        while name in tensors:  # {"a.b": x} and {"a": {"b": y}} flatten alike
            name += "~"
        tensors[name] = value.detach()
        return {"~tensor": name}
    if isinstance(value, Mapping):
        for k in value:
            if not isinstance(k, str | int):
                raise TypeError(f"keys of a checkpoint are strings or integers; {name} has {k!r}")
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


_TOGETHER = 2**26  # bytes that come from a device in one copy


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU. A device is not waited for at every tensor: many come in one copy."""
    copies = {
        name: tensor.to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
        if tensor.device.type == "cpu"
    }
    by_kind: dict[Any, list[str]] = {}
    for name in tensors.keys() - copies.keys():
        by_kind.setdefault((tensors[name].device, tensors[name].dtype), []).append(name)
    for names in by_kind.values():
        while names:
            taken, size = [names.pop()], 0
            while names and size < _TOGETHER:
                size += tensors[names[-1]].nbytes
                taken.append(names.pop())
            flat = torch.cat([tensors[name].flatten() for name in taken]).cpu()
            parts = flat.split([tensors[name].numel() for name in taken])
            for name, part in zip(taken, parts, strict=True):
                copies[name] = part.view(tensors[name].shape).clone()
    return {name: copies[name] for name in tensors}


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


def copied(state: Any) -> Any:
    """The state as it is now, on the CPU, for a later ``save``."""
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "state", tensors)
    return _join(tree, _copied(tensors))


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in ``folder``, whole or damaged, oldest first."""
    matches = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _restore_replaced(folder: Path) -> None:
    """Put back a checkpoint that a crash caught between leaving and its successor's arrival."""
    for path in folder.glob("step-*.replaced"):
        if not path.with_suffix("").exists():
            with suppress(OSError):  # another process was faster
                path.rename(path.with_suffix(""))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: str | Path, step: int, state: Any, *, keep: int = 2) -> Path:
    """Write ``folder/step-NNNNNN`` and drop older checkpoints but the newest ``keep - 1``.

    Tensors are copied: shared, expanded and strided ones are stored whole, and come back as
    tensors of their own. Checkpoints of later steps stay as they are.

    Args:
        folder: the run's checkpoint folder; made if need be.
        step: of the run: updates done.
        state: nested dicts, lists and tuples of tensors, numbers, strings and None; keys are
            strings or integers.
        keep: how many checkpoints stay, at least 1.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are
            untouched and the partial one is removed.
        TypeError: ``state`` holds something that is neither tensor, number, string nor container.
        ValueError: ``step`` or ``keep`` is not such a number.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    partial, replaced = final.with_suffix(".partial"), final.with_suffix(".replaced")
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "state", tensors)
    tensors = _copied(tensors)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(tree))
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
            for name in ("tensors.safetensors", "state.json")
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*partial.iterdir(), partial]:
            synchronise(path)
        _restore_replaced(folder)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        synchronise(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        _restore_replaced(folder)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} to {folder}: {error}. Earlier "
            "checkpoints are untouched; free space or choose another output folder, then resume"
        ) from error
    drop_older(folder, step, keep=keep)
    return final


def drop_older(folder: str | Path, step: int, *, keep: int = 2) -> None:
    """Drop checkpoints before this step but the newest ``keep - 1``, and what was never finished.

    That is: half removed ones, and those of any step that a killed process left half written or
    half replaced. ``save`` does it; a run that is resumed does it again, for it may have been
    killed before that. The folder must be the caller's alone.
    """
    folder = Path(folder)
    _restore_replaced(folder)
    older = [path for other, path in _steps(folder) if other < step]
    replaced = [path for path in folder.glob("step-*.replaced") if path.with_suffix("").exists()]
    partial = folder.glob("step-*.partial")
    for path in (*older[: len(older) - (keep - 1)], *replaced, *partial):
        shutil.rmtree(path, ignore_errors=True)


def load(path: str | Path) -> Checkpoint:
    """Read one checkpoint, verifying size and SHA-256 of every file first.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is unknown.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, step = manifest["format"], manifest["step"]
        files = {name: (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / 'manifest.json'} is missing or unreadable: {error}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}; this version reads format {FORMAT}")
    if set(files) != {"tensors.safetensors", "state.json"} or path.name != f"step-{step:0>6}":
        raise CheckpointError(f"{path / 'manifest.json'} does not describe this checkpoint")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (length := file.stat().st_size) != size:
            raise CheckpointError(f"{file} has {length} bytes instead of {size}")
        if _digest(file) != digest:
            raise CheckpointError(f"{file} was altered: its SHA-256 is not the manifest's")
    try:  # digests are no signature: whoever writes a checkpoint writes its manifest
        tensors = load_file(path / "tensors.safetensors")
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path / 'tensors.safetensors'} cannot be read: {reason}") from error
    try:
        state = _join(json.loads((path / "state.json").read_text()), tensors)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path / 'state.json'} cannot be read: {type(error).__name__}: {error}"
        ) from error
    return Checkpoint(step, state, path)


def latest(folder: str | Path) -> Checkpoint | None:
    """The newest valid checkpoint in ``folder``; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    damage: CheckpointError | None = None
    _restore_replaced(Path(folder))
    for _, path in reversed(_steps(Path(folder))):
        try:
            return load(path)
        except CheckpointError as error:
            _log.warning("passing over a damaged checkpoint: %s", error)
            damage = damage or error
    if damage:
        raise CheckpointError(f"no valid checkpoint in {folder}; the newest: {damage}") from damage
    return None
