"""Files that are written whole or not at all: under another name, synchronised, then renamed.

A process that is killed leaves the old file, and perhaps one whose name ends in ``.partial``, which
nobody reads. A disk that is full is told by the name of the file, and the partial one is removed.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Within this context another name to write the file under; afterwards it is in its place.

    The folder is made if need be. Whatever is raised within it, the old file stays as it was.

    Raises:
        OSError: it cannot be written; it is named.
    """
    partial = path.with_name(f"{path.name}.partial")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            synchronise(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def append(path: Path, text: str) -> None:
    """Append lines; if they cannot be written whole, the file is as it was.

    Raises:
        OSError: they cannot be written; the file is named.
    """
    data = text.encode()
    with naming(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                while data:
                    data = data[os.write(handle, data) :]
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)


def synchronise(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within this context an error of the system names this file, and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        words = os.strerror(error.errno)
        if error.errno in _FULL:
            words += " (earlier checkpoints are untouched; free space, then resume)"
        raise OSError(error.errno, words, str(path)) from error
