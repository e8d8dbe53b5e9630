"""Memory of large roll-outs, used again once nothing refers to it.

Memory fresh from the operating system costs a fault for every page that is first written to: up to
half of the time of a large roll-out. So the memory of paths that nobody can see any more (no
tensor, view or array shares its storage) waits for the next roll-out of the same size, 1 GiB of it
at most. Only on the CPU; of CUDA's memory torch takes care itself.
"""

import os
import weakref
from collections import deque
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LARGE = 2**20  # bytes: what is smaller the C library keeps by itself
_ALIGNED = 64
_idle: deque[npt.NDArray[Any]] = deque()  # its operations are atomic: finalisers run at any time


def uninitialised(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor as ``like.new_empty(shape)`` makes it; large ones may be in memory used before.

    Args:
        shape: of the tensor.
        like: whose dtype and device it has.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type != "cpu" or size < _LARGE:
        return like.new_empty(shape)
    memory = _taken(size)
    begin = -memory.ctypes.data % _ALIGNED
    lent = memory[begin : begin + size]
    # the tensor's storage holds on to ``lent``, and so does whatever shares that storage
    tensor = torch.from_numpy(lent).view(like.dtype).view(shape)
    weakref.finalize(lent, _returned, memory).atexit = False
    return tensor


@cache
def settle() -> None:
    """Let the C library keep what the steps of a roll-out free, and not give it back each time.

    glibc maps blocks of 128 KiB and more anew at each request, until one is freed: then it keeps
    blocks up to that size. One of 28 MiB, never touched, costs microseconds (32 MiB is its limit).
    Elsewhere it has no effect.
    """
    torch.empty(28 * 2**20, dtype=torch.uint8)


def release() -> None:
    """Give idle memory back to the operating system. Memory in use is not touched."""
    _idle.clear()


def idle() -> int:
    """Bytes that wait for another roll-out."""
    return sum(memory.nbytes for memory in tuple(_idle))


def _taken(size: int) -> npt.NDArray[Any]:
    """Idle memory for so many bytes, or fresh."""
    for _ in range(len(_idle)):
        try:
            memory = _idle.pop()
        except IndexError:  # another thread took it
            break
        if memory.nbytes == size + _ALIGNED:
            return memory
        _idle.appendleft(memory)
    return np.empty(size + _ALIGNED, dtype=np.uint8)


def _returned(memory: npt.NDArray[Any]) -> None:
    """Keep the memory, in place of what has waited longest."""
    limit = _limit()
    if memory.nbytes > limit:
        return
    _idle.append(memory)
    while idle() > limit:
        try:
            _idle.popleft()
        except IndexError:  # another thread made room
            break


def _limit() -> int:
    """Bytes that may wait: 1 GiB, or a tenth of the machine's memory if that is less."""
    if not hasattr(os, "sysconf"):
        return 2**29
    return min(2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10)
