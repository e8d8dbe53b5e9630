"""The run to which faults are done: the embedded model, a few updates, all that a run has.

A run is the library's own command line in a process of its own, forked from one that has imported
everything: so it starts in a moment, and may be killed, filled up or interrupted by the hundred.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib
import json
import mmap
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffusion_envs.runs import checkpoint, command_line
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training import phase

UPDATES = 3
WORDS = (
    *("--model", "tiny", "--device", "cpu", "--guidance", "1", "--lora-rank", "1"),
    *("--reward", "red", "--judges", "green=green", "--stop-z", "9", "--stop-every", "2"),
    *("--prompts", "a photo of a cat", "a photo of a ship", "--steps", "2"),
    *("--updates", str(UPDATES), "--samples", "4", "--batch", "8", "--value-epochs", "1"),
    *("--evaluation-samples", "4", "--picture-every", "2", "--frontier-samples", "8"),
    "--no-progress",
)
PHASES = (
    *("start", "sampling", "rewards", "update", "value network"),
    *("checkpoint", "evaluation", "export", "report"),
)
_OF_TIME = ("seconds", "memory", "logs")  # which no two runs have alike, and digests of them
_TIMES = tuple(f"| {name} |" for name in _OF_TIME)  # in a table
_MOST_SAID = 2**20  # bytes
_PARENT_DEATH = 1  # of prctl
_OF_TENSORBOARD = (
    r"Exception in thread .*\nTraceback(?=[^\0]*?tensorboard/summary[^\0]*?\n\w+Error: \[Errno)"
)
_LONGEST = 400.0  # seconds that a process may take
_Fault = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; minus the signal that killed it.
        phase: the last one that it was in.
        said: all that it printed.
        seconds: that it took.
        after_signal: seconds that it took after the last signal.
    """

    code: int
    phase: str
    said: str
    seconds: float
    after_signal: float = 0.0

    @property
    def in_words(self) -> bool:
        """Whether whatever it had to say was said without a traceback.

        But for that of TensorBoard's thread where its file cannot be written, which it prints
        itself; the run's own words say so too.
        """
        return "Traceback" not in re.sub(_OF_TENSORBOARD, "", self.said)

    @property
    def over(self) -> bool:
        """Whether it had said its last words: where its report is."""
        lines = self.said.splitlines()
        return bool(lines) and lines[-1].startswith("report:")

    @property
    def last(self) -> str:
        """The last words that it said."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return f"exit code {self.code}: {lines[-1] if lines else 'nothing was said'}"


class Process:
    """A run in a process of its own, which tells the phase that it is in."""

    def __init__(self, folder: Path, words: Sequence[str], fault: _Fault = nullcontext) -> None:
        self._told = mmap.mmap(-1, 4 * (1 + len(PHASES)))  # shared: phase, and entries of each
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._said, self._speak = os.pipe()  # no file, for disks may be full
        fcntl.fcntl(self._speak, fcntl.F_SETPIPE_SZ, _MOST_SAID)
        self._ended: int | None = None
        self._began = self._signalled = self._ended_at = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(words, fault)
        os.close(self._speak)
        os.set_blocking(self._said, False)

    def _run(self, words: Sequence[str], fault: _Fault) -> None:
        """What the child does; it never returns."""
        code = 1
        try:
            end_with_parent()
            rebuild_threads()
            os.dup2(self._speak, 1)
            os.dup2(self._speak, 2)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with ExitStack() as stack:
                stack.enter_context(phase.observed(self._tell))
                stack.enter_context(fault())
                code = command_line.main(FAMILY, words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _tell(self, name: str) -> None:
        which = PHASES.index(name)
        place = 4 * (1 + which)
        entries = int.from_bytes(self._told[place : place + 4], "little") + 1
        self._told[place : place + 4] = entries.to_bytes(4, "little")
        self._told[:4] = which.to_bytes(4, "little")

    @property
    def phase(self) -> str:
        """The one that it is in, or was in when it ended."""
        return PHASES[int.from_bytes(self._told[:4], "little")]

    def entries(self, name: str) -> int:
        """How often it has come into a phase."""
        place = 4 * (1 + PHASES.index(name))
        return int.from_bytes(self._told[place : place + 4], "little")

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._ended is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._ended = status
                self._ended_at = time.monotonic()
        return self._ended is None

    def until(self, name: str, entries: int) -> bool:
        """Wait until it has come into a phase so often; False if it ended before."""
        while self.entries(name) < entries:
            if not self.running:
                return False
            time.sleep(0.001)
        return True

    def sleep(self, seconds: float) -> bool:
        """Wait so long; False if it ended before."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self.running:
                return False
            time.sleep(min(left, 0.005))
        return self.running

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.running:
            self._signalled = time.monotonic()
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """How it ended.

        Raises:
            TimeoutError: it hangs; it is killed.
        """
        while self.running:
            if time.monotonic() - self._began > _LONGEST:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a run did not end in {_LONGEST:g} seconds ({self.phase})")
            time.sleep(0.002)
        assert self._ended is not None
        code = os.waitstatus_to_exitcode(self._ended)
        said = b""
        with suppress(BlockingIOError):  # a child that is left behind may still speak
            while more := os.read(self._said, _MOST_SAID):
                said += more
        os.close(self._said)
        seconds, after = self._ended_at - self._began, self._ended_at - self._signalled
        return Ended(code, self.phase, said.decode(errors="replace"), seconds, after)


def end_with_parent() -> None:
    """Let the system kill this process when the one that forked it is gone."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)


def rebuild_threads() -> None:
    """Let torch make its threads anew, in a forked process that has but one as yet.

    Torch does so where it first computes; where two threads come there at once, one of them can end
    with "Invalid thread pool!" (seen in 353 of 4,000 forked processes with three threads, torch
    2.13; in none of 4,000 after this). A process that is started anew has nothing to make again.
    """
    torch.set_num_threads(1)


def begin(folder: Path, fault: _Fault = nullcontext, words: Sequence[str] = ()) -> Process:
    """Begin the run in ``folder``, or go on with it, as a person would."""
    if (folder / "config.json").is_file():
        return Process(folder, ("--resume", str(folder), "--no-progress"), fault)
    return Process(folder, (*(words or WORDS), "--output", str(folder)), fault)


def run(folder: Path, fault: _Fault = nullcontext, words: Sequence[str] = ()) -> Ended:
    """The same, until it ends."""
    return begin(folder, fault, words).wait()


@dataclass(frozen=True)
class Uninterrupted:
    """The run to which nothing is done.

    Attributes:
        folder: that it left.
        results: all of its numbers.
        seconds: that it took.
        entries: how often it came into each phase.
    """

    folder: Path
    results: dict[str, Any]
    seconds: float
    entries: dict[str, int]


@functools.cache
def uninterrupted() -> Uninterrupted:
    """The run to which nothing is done; from then on all that a run imports is imported.

    Call it before anything in this process differentiates, after which torch refuses to in a fork.
    """
    torch.set_num_threads(1)
    command_line._quiet_libraries()
    command_line.read(FAMILY, (*WORDS, "--output", "runs/none"))  # fills caches
    _KEPT.append(tempfile.TemporaryDirectory(prefix="faults-"))
    place = Path(_KEPT[0].name)
    listed = place / "modules"

    @contextmanager
    def listing() -> Iterator[None]:
        yield
        listed.write_text("\n".join(sys.modules))

    runs = [place / name / "run" for name in ("first", "second")]
    first = run(runs[0], listing)
    if first.code:
        raise RuntimeError(f"a run without faults failed: {first.said}")
    for name in listed.read_text().split("\n"):
        if name not in sys.modules:
            with suppress(Exception):  # a name that is no module of its own
                importlib.import_module(name)
    process = begin(runs[1])
    second = process.wait()
    told = [results(each) for each in runs]
    if (differs := first_difference(*told)) is not None:
        raise RuntimeError(f"two runs without faults differ in {differs}")
    entries = {name: process.entries(name) for name in PHASES}
    return Uninterrupted(runs[1], told[1], second.seconds, entries)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


# -- what a run leaves -----------------------------------------------------------------------------


def results(folder: Path) -> dict[str, Any]:
    """All numbers of a finished run, by file: bytes, or what is left without times."""
    told: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name.startswith("tensorboard/"):  # one file for each process
            continue
        with suppress(ValueError):  # a damaged one is what it is
            told[name] = _content(path, name)
            continue
        told[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return told


def _content(path: Path, name: str) -> Any:
    """What two runs have alike in a file; True where nothing is compared."""
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "state.json":
        return _timeless(json.loads(path.read_text()))
    if path.name == "config.json":
        return json.loads(path.read_text())["settings"]
    if path.name == "manifest.json" or name == "report.html":  # have sizes, and times
        return True
    if name == "README.md":  # a model card, with how long it took
        return [x for x in path.read_text().splitlines() if not x.startswith(_TIMES)]
    if path.suffix == ".safetensors":
        return _tensors(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path) -> Any:
    """What is in it."""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), sorted(file.keys())
            values = [file.get_tensor(name) for name in names]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged") from error
    told = [
        (name, str(value.dtype), list(value.shape))
        for name, value in zip(names, values, strict=True)
    ]
    content = b"".join(value.flatten().view(torch.uint8).numpy().tobytes() for value in values)
    return metadata, told, hashlib.sha256(content).hexdigest()


def _timeless(values: Any) -> Any:
    return {k: v for k, v in values.items() if k not in _OF_TIME}


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first file in which two runs differ; None if they are the same."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return name
    return None


def newest_step(folder: Path) -> int:
    """Updates that the newest valid checkpoint has; -1 if there is none."""
    newest = checkpoint.latest(folder / "checkpoints")
    return -1 if newest is None else newest.step


def logged(folder: Path) -> int:
    """Updates that its log has whole."""
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0
