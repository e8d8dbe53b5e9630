"""The folder of a run: one run, never two; all its settings in ``config.json``."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchsde")


def describe(value: Any) -> Any:
    """A JSON form of a setting: dataclasses by name and fields, functions and classes by name.

    Raises:
        TypeError: a setting has no description.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # which JSON has no number for: no clip is inf
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
        return {"name": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [describe(v) for v in value]
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{module}:{name}"


def versions() -> dict[str, str]:
    """Of Python and of the libraries whose change could change a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Of this library's own checkout, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file or leave the old one: under a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def open_run(
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    command: Mapping[str, Any] | None = None,
) -> Path:
    """Make the folder of a new run, or check that it holds the run that is to go on.

    Args:
        folder: of the run.
        settings: everything that changes its numbers, as ``describe`` gives it. ``updates`` may
            grow on resuming, nothing else may differ.
        resume: go on with the run in ``folder``.
        command: the command line that started the run, if one did.

    Raises:
        FileExistsError: ``folder`` holds something, and ``resume`` is not asked for.
        FileNotFoundError: ``resume`` is asked for, but ``folder`` holds no run.
        NotADirectoryError: ``folder`` is a file.
        ValueError: the run in ``folder`` was started with other settings; they are named.
        OSError: ``folder`` cannot be written.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output must be a folder, but {folder} is a file")
    if not resume:
        if folder.is_dir() and any(folder.iterdir()):
            what = "another run" if config.is_file() else "other files"
            raise FileExistsError(
                f"output {folder} holds {what}; choose a new folder, or resume the run with "
                f"--resume {folder} "
                "(resume=True)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        known = {"settings": settings, "command": command}
        write_json(config, known | {"versions": versions(), "commit": commit()})
        return folder
    if not config.is_file():
        raise FileNotFoundError(f"resume needs a run, but {folder} holds no config.json")
    try:
        stored = json.loads(config.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    wanted = json.loads(json.dumps(settings))
    differing = [
        f"{name}: {stored.get(name)!r} then, {wanted.get(name)!r} now"
        for name in sorted(stored.keys() | wanted.keys())
        if name != "updates" and stored.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(f"{folder} was started with other settings: {'; '.join(differing)}")
    if wanted.get("updates", 0) > stored.get("updates", 0):
        known = json.loads(config.read_text())
        write_json(config, known | {"settings": stored | {"updates": wanted["updates"]}})
    return folder
