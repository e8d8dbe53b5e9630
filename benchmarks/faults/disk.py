"""A small disk of our own, to be filled or made read-only: a tmpfs that only this process sees.

It needs no rights where the kernel lets anyone have a namespace of users, as most do.
"""

import ctypes
import os
from pathlib import Path

_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A tmpfs at ``path``; it goes with the process and its children.

    Args:
        path: where it is mounted; made if need be.
        megabytes: that it holds.

    Raises:
        PermissionError: this machine does not let us.
    """

    def __init__(self, path: Path, megabytes: int = 24) -> None:
        self.path, self._options = path, f"size={megabytes}m".encode()
        path.mkdir(parents=True, exist_ok=True)
        _own_mounts()
        _mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)  # nobody else sees it
        _mount(b"tmpfs", bytes(path), b"tmpfs", 0, self._options)

    def fill(self) -> None:
        """Leave no byte free."""
        handle = os.open(self.path / "ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (2**20, 2**12):
                try:
                    while True:
                        os.write(handle, bytes(size))
                except OSError:
                    continue
        finally:
            os.close(handle)

    def free(self) -> None:
        """There is space again."""
        (self.path / "ballast").unlink(missing_ok=True)

    def read_only(self, yes: bool) -> None:
        """Let nothing be written, or all again."""
        _mount(None, bytes(self.path), None, _REMOUNT | (_READ_ONLY if yes else 0), self._options)


def _own_mounts() -> None:
    """Give this process a table of mounts of its own."""
    if _libc.unshare(_NEW_MOUNTS) == 0:
        return
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_USERS | _NEW_MOUNTS):
        raise PermissionError(ctypes.get_errno(), "this machine gives nobody a disk of his own")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _mount(
    source: bytes | None, target: bytes, kind: bytes | None, flags: int, options: bytes | None
) -> None:
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), options):
        number = ctypes.get_errno()
        raise PermissionError(number, f"mount: {os.strerror(number)}", target.decode())
