"""Host and device: copies that do not wait, and checks whose answers are read together.

A GPU works behind the host. Whatever the host reads of it (a number, a truth value), and every
blocking copy, waits until all that was asked for before is done, and then the GPU waits for the
host. So a loop sends without waiting, and reads once, at its end.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_STAGED = (
    2**16
)  # bytes that CUDA takes along with a call; larger copies wait unless they are pinned


def sent(value: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device and in a dtype; from the host, without waiting for the device.

    A copy to the host is an ordinary one, which waits.
    """
    device = torch.device(device)
    if value.device.type != "cpu":
        return value.to(device, dtype or value.dtype)
    if device.type == "cuda" and value.numel() * value.element_size() > _STAGED:
        value = value.pin_memory()
    return value.to(device, dtype or value.dtype, non_blocking=True)


def as_like(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor in the dtype and on the device of ``like``, without waiting."""
    if isinstance(value, Tensor):
        if value.device == like.device:
            return value.to(like.dtype)
        return sent(value, like.device, like.dtype)
    return like.new_full((), float(value))


_Check = tuple[Tensor, Callable[[], Exception]]
_waiting: ContextVar[list[_Check] | None] = ContextVar("checks that wait to be read", default=None)


def require(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` where the condition does not hold: at once, or when ``together`` ends.

    Args:
        holds: one truth value, [].
        error: makes what is raised; of a condition on another device it may be called later.
    """
    if holds.device.type != "cpu" and (waiting := _waiting.get()) is not None:
        # what is inside torch.func does not outlive it
        inside = torch._C._functorch.is_functorch_wrapped_tensor(holds)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # torch has no public name for it
        if not inside:
            waiting.append((holds.detach(), error))
            return
    if not bool(holds):
        raise error()


def readable(holds: Tensor) -> bool:
    """Whether a condition has one truth value: inside ``torch.func.vmap`` it has many, unread."""
    if not torch._C._functorch.is_functorch_wrapped_tensor(holds):  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  # torch has no public name for it
        return True
    try:
        bool(holds)
    except RuntimeError:
        return False
    return True


@contextmanager
def together() -> Generator[None, None, None]:
    """Within it, conditions of other devices than the CPU are read at its end, all at once.

    The first that does not hold is raised, also in place of an error that came of it later.
    """
    if _waiting.get() is not None:  # the outermost reads them all
        yield
        return
    waiting: list[_Check] = []
    token = _waiting.set(waiting)
    try:
        yield
    except Exception as fault:
        _waiting.reset(token)
        _raise_first(waiting, fault)
        raise
    _waiting.reset(token)
    _raise_first(waiting, None)


def _raise_first(checks: list[_Check], fault: Exception | None) -> None:
    """Raise the first error among the checks, as the cause of ``fault``."""
    by_device: dict[torch.device, list[int]] = {}
    for i, (holds, _) in enumerate(checks):
        by_device.setdefault(holds.device, []).append(i)
    failed = [
        i
        for places in by_device.values()
        for i, holds in zip(
            places, torch.stack([checks[i][0] for i in places]).tolist(), strict=True
        )
        if not holds
    ]
    if failed:
        raise checks[min(failed)][1]() from fault


def read(*values: Tensor) -> list[float]:
    """Numbers of one device, read at the price of one."""
    return torch.stack(values).tolist()


def require_generator(generator: torch.Generator, device: torch.device, whose: str) -> None:
    """Refuse a generator of another device than its numbers are for.

    Args:
        generator: to draw from.
        device: of the numbers.
        whose: name of what is there.

    Raises:
        ValueError: it is on another device.
    """
    here, there = device, generator.device
    if here.type != there.type or (here.index or 0) != (there.index or 0):
        raise ValueError(
            f"generator must be on {here}, as {whose} is, got {there}: "
            f"torch.Generator({str(here)!r}).manual_seed(0), say"
        )
