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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Draw = Callable[[npt.NDArray[Any], npt.NDArray[np.uint64], int, int, float], None]
"""(out, key, row, group, scale): see ``counter_normals.fill``."""

_SOURCE = Path(__file__).with_name("counter_normals.c")
_FLAGS = ["-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_WORTH_IT = 2**22  # numbers: numpy takes about 30 ms for them, a compiler 500


class _Compiled:
    """What is known of the compiled functions in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = 0  # numbers asked for so far
        self.tried = False
        self.draw: Draw | None = None


_here = _Compiled()


def compiled(numbers: int) -> Draw | None:
    """The compiled function, if there is one and so many numbers have been asked for by now."""
    if _here.tried:
        return _here.draw
    _here.asked += numbers
    if _here.asked >= _WORTH_IT and _here.lock.acquire(blocking=False):
        try:
            if not _here.tried:
                _here.draw = build()
                _here.tried = True
        finally:
            _here.lock.release()
    return _here.draw


def build() -> Draw | None:
    """Compile and load; None where that is not possible."""
    compiler = _compiler()
    if compiler is None or not _SOURCE.is_file():
        return None
    try:
        return _wrapped(_library(compiler))
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


def _wrapped(library: ctypes.CDLL) -> Draw:
    functions = {}
    for dtype, name, real in (
        (np.dtype(np.float32), "fill32", ctypes.c_float),
        (np.dtype(np.float64), "fill64", ctypes.c_double),
    ):
        function = functions[dtype] = getattr(library, name)
        function.restype = None
        function.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, real,
        ]  # fmt: skip

    def draw(
        out: npt.NDArray[Any], key: npt.NDArray[np.uint64], row: int, group: int, scale: float
    ) -> None:
        address, count = out.ctypes.data, out.size // 256
        functions[out.dtype](address, count, key.ctypes.data, row, group, scale)

    return draw
