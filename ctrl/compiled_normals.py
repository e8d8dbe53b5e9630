"""The normals of ``ctrl.counter_normals`` in C, where the machine has a compiler: the same bits.

Once a process has drawn some millions of numbers, the first C compiler on the PATH (``cc``, ``gcc``
or ``clang``; or the one that the environment variable CTRL_COMPILER names, "none" for none)
translates one file of the package, in half a second, into a folder of the user's cache that nobody
else can write to. Without a compiler, or where anything fails, numpy goes on drawing the same
numbers. A call of C lets other Python threads run.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SOURCE = Path(__file__).with_name("counter_normals.c")
_FLAGS = ["-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_LEAD = 2**21  # bytes of rows between the caller and the others: twice a core's own cache
_WORTH_IT = 2**22  # numbers: numpy takes about 30 ms for them, a compiler 500


class _Compiled:
    """What is known of the compiled functions in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = 0  # numbers asked for so far
        self.tried = False
        self.library: ctypes.CDLL | None = None


_here = _Compiled()


def compiled(numbers: int) -> ctypes.CDLL | None:
    """The compiled functions, if there are any and enough numbers have been asked for by now."""
    if _here.tried:
        return _here.library
    _here.asked += numbers
    if _here.asked >= _WORTH_IT and _here.lock.acquire(blocking=False):
        try:
            if not _here.tried:
                _here.library = build()
                _here.tried = True
        finally:
            _here.lock.release()
    return _here.library


def build() -> ctypes.CDLL | None:
    """Compile and load; None where that is not possible."""
    compiler = _compiler()
    if compiler is None or not _SOURCE.is_file():
        return None
    try:
        return _typed(_library(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _compiler() -> str | None:
    named = os.environ.get("CTRL_COMPILER")
    names = ("cc", "gcc", "clang") if named is None else (named,)
    return next((path for name in names if (path := shutil.which(name))), None)


def _library(compiler: str) -> ctypes.CDLL:
    """Of the cache, if it was compiled before for this source, compiler and processor."""
    flags = list(_FLAGS)
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-march=native")
    known = [compiler, *flags, _SOURCE.read_text(), platform.platform(), _processor()]
    name = f"counter_normals-{hashlib.sha256(repr(known).encode()).hexdigest()[:24]}.so"
    cache = _cache()
    if cache is not None and (cache / name).is_file():
        return ctypes.CDLL(str(cache / name))
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, name)
        subprocess.run(
            [compiler, *flags, str(_SOURCE), "-o", str(made), "-lm"],
            check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        library = ctypes.CDLL(str(made))
        if cache is not None:
            made.replace(cache / name)
    return library


def _processor() -> str:
    """What this processor can do: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> Path | None:
    """A folder of this user's cache that nobody else can write to; None if there is none."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "ctrl")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    safe = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if safe and os.access(folder, os.W_OK) else None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    rows = ctypes.POINTER(_Rows)
    for name, arguments in (
        ("draw_all", [rows]),
        ("wait_for", [rows, ctypes.c_int64]),
        ("stop", [rows]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


class _Rows(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("done", ctypes.c_void_p),
        ("taken", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("piece", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("key", ctypes.c_uint64 * 2),
        ("row", ctypes.c_uint64),
        ("group", ctypes.c_uint64),
        ("lead", ctypes.c_int64),
        ("waited", ctypes.c_int64),
        ("ahead", ctypes.c_int64),
        ("stopped", ctypes.c_int64),
    )


class CompiledRows:
    """Rows of a key that several threads draw into one memory.

    Args:
        library: of ``compiled``.
        out: where to, [rows, numbers], contiguous, float32 or float64; a multiple of 256 numbers.
        key: of ``counter_normals.key_of``.
        row: index of the first row.
        group: index of the first group.
        scales: what each row is multiplied by.
        piece: groups that a thread takes at a time.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        out: npt.NDArray[Any],
        key: npt.NDArray[np.uint64],
        row: int,
        group: int,
        scales: npt.NDArray[np.float64],
        piece: int,
    ) -> None:
        assert out.flags.c_contiguous
        assert out.dtype in (np.float32, np.float64)
        self.library = library
        groups = out.shape[1] // 256
        done, taken = (
            np.zeros(len(out), np.int32),
            np.zeros(len(out) * -(-groups // piece), np.int8),
        )
        # what the structure points to must live as long as it does
        self.memory = out, scales, done, taken
        lead = min(max(1, _LEAD // max(1, out[0].nbytes)), max(1, len(out) // 4))
        self.rows = _Rows(
            *(each.ctypes.data for each in self.memory), len(out), groups, piece,
            int(out.dtype == np.float64), (ctypes.c_uint64 * 2)(*key.tolist()), row, group, lead,
        )  # fmt: skip

    def draw_all(self) -> None:
        """Draw what nobody else does, until all is taken."""
        self.library.draw_all(self.rows)

    def wait_for(self, k: int) -> None:
        """Return when row k (of these) is there; until then draw along."""
        self.library.wait_for(self.rows, k)

    def stop(self) -> None:
        """Let nobody begin another piece."""
        self.library.stop(self.rows)
