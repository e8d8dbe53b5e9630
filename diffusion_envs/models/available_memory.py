"""How much memory a device has, and refusals of what it cannot hold."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch


class TooLargeError(ValueError):
    """What is asked for needs more memory than the device has, whatever the pieces."""


def require_room(size: int, kind: str, what: str, remedy: str) -> None:
    """Refuse what cannot fit.

    Args:
        size: bytes that are needed at least.
        kind: "cpu" or "cuda".
        what: needs them.
        remedy: how it would need fewer.

    Raises:
        TooLargeError: the device has fewer.
    """
    there = available(kind)
    if there is not None and size > there:
        raise TooLargeError(
            f"{what} needs at least {gib(size)}, and the device ({kind}) has {gib(there)}: {remedy}"
        )


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def available(kind: str) -> int | None:
    """Bytes of the GPU, or those that a process may use of a CPU's; None if that is not known."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    limits = [int(words) for words in _limits() if words.isdigit()]
    return min(limits) if limits else None


def _limits() -> Iterator[str]:
    """Of the control group, and of the machine with its swap."""
    for path in (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        if path.is_file():
            yield path.read_text().strip()
    if Path("/proc/meminfo").is_file():
        words = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        sizes = {word[0]: int(word[1]) for word in words if len(word) > 1}
        yield str(1024 * (sizes["MemTotal:"] + sizes.get("SwapTotal:", 0)))
    elif hasattr(os, "sysconf"):
        yield str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
