"""The folder of a run: one run and one process, never two; all its settings in ``config.json``."""

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_envs.digests import opened, sealed
from diffusion_envs.runs.settings import differences
from diffusion_envs.whole_files import naming, whole

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchsde")
_LOCK, _PARTIAL = "run.lock", "config.json.partial"  # all that a start may leave that was killed


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose change could change a run."""
    known = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    return known


def commit() -> str | None:
    """Commit of this library's own checkout, if it runs from one."""
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
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with whole(path) as partial:
        partial.write_text(text)


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write a file of JSON lines whole, or leave the old one."""
    words = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    # JSON's own escape for half a pair of surrogates, which UTF-8 has not
    with whole(path) as partial:
        partial.write_text("".join(words), encoding="utf-8", errors="backslashreplace")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a run was started with, as ``describe`` gives them.

    Raises:
        FileNotFoundError: ``folder`` holds no run.
        ValueError: ``config.json`` is damaged, or an earlier version wrote it.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"resume needs a run, but {folder} holds no config.json")
    known = _read_config(config)
    try:
        settings = known["settings"]
        if not isinstance(settings, dict):
            raise TypeError("its settings are no mapping")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    if "options" not in settings:
        raise ValueError(
            f"{config} was written by an earlier version, which stored no options; go on with "
            "that version, or start anew"
        )
    return settings


def _read_config(config: Path) -> dict[str, Any]:
    """All of ``config.json``, as it was written.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    return opened(content, config)


@contextmanager
def open_run(folder: str | Path, settings: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """Make the folder of a new run, or check that it holds the run that is to go on.

    Within the context no other process can open it. A number of updates that has grown is stored at
    once, so that a run that is stopped again goes on to the new number.

    Args:
        folder: of the run.
        settings: everything that changes its numbers, as ``describe`` gives it. ``updates`` may
            grow on resuming, nothing else may differ.
        resume: go on with the run in ``folder``.

    Raises:
        FileExistsError: ``folder`` holds something, and ``resume`` is not asked for; or another
            process has it.
        FileNotFoundError: ``resume`` is asked for, but ``folder`` holds no run.
        NotADirectoryError: ``folder`` is a file.
        ValueError: the run in ``folder`` was started with other settings; they are named.
        OSError: ``folder`` cannot be written.
    """
    folder = Path(folder).expanduser()
    config = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output must be a folder, but {folder} is a file")
    if resume:
        read_settings(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if resume:
            _check_settings(folder, json.loads(json.dumps(settings)))
        elif held := [path for path in folder.iterdir() if path.name not in (_LOCK, _PARTIAL)]:
            what = "another run" if config in held else "other files"
            raise FileExistsError(
                f"output {folder} holds {what}; choose a new folder, or resume the run with "
                f"--resume {shlex.quote(str(folder))} (resume=True)"
            )
        else:
            known = {"settings": settings, "versions": versions(), "commit": commit()}
            write_json(config, sealed(known))
        yield folder


def _check_settings(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse other settings than the run's; store a number of updates that has grown."""
    stored = read_settings(folder)
    if differing := differences(stored, wanted):
        words = "; ".join(f"{name}: {then!r} then, {now!r} now" for name, then, now in differing)
        raise ValueError(
            f"{folder} was started with other settings: {words}; resume with those of the start, "
            "or name another output for a run with the new ones"
        )
    if wanted["updates"] < stored["updates"]:
        raise ValueError(
            f"updates must be at least {stored['updates']}, to which the run in {folder} goes, got "
            f"{wanted['updates']}: leave it out, or give a larger number"
        )
    if wanted["updates"] > stored["updates"]:
        known = _read_config(folder / "config.json")
        grown = {"settings": stored | {"updates": wanted["updates"]}}
        write_json(folder / "config.json", sealed(known | grown))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process however it ends.

    Raises:
        FileExistsError: another process holds it; it is named.
    """
    path = folder / _LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 1000).decode(errors="replace")
            os.close(handle)
            if _is_dead(owner):  # a child that it left behind keeps the lock
                path.unlink(missing_ok=True)
                continue
            raise FileExistsError(
                f"output {folder} belongs to another process that is running, {owner or 'unknown'}:"
                " wait until it ends, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            break
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)  # its former owner took the file away in between
    try:
        with naming(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on host {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is_dead(owner: str) -> bool:
    """Whether the process that a lock names ran on this machine and runs no more."""
    words = owner.split()
    if len(words) != 5 or words[-1] != socket.gethostname() or not words[1].isdigit():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
