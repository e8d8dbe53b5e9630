"""Generators of the simulated accelerator, in place of ``torch.Generator``.

Torch cannot be told from Python of generators on a new device, so they are the CPU's with another
device written on them, and draw what the CPU's would.
"""

from typing import Any

import torch

from tests.device.memory import NAME

Original: Any = torch._C.Generator
_of_device: set[int] = set()  # addresses: an operation may be handed another Python object


class DeviceGenerator(Original):
    """A generator that says that it is on the device."""

    device = torch.device("cpu")

    def __new__(cls, index: int = 0) -> "DeviceGenerator":
        """A fresh one."""
        made = Original.__new__(cls)
        made.device = torch.device(NAME, index)
        _of_device.add(made._cdata)
        return made

    def __del__(self) -> None:
        _of_device.discard(self._cdata)

    def clone_state(self) -> "DeviceGenerator":
        """Another one in the same state."""
        made = DeviceGenerator()
        made.set_state(self.get_state())
        return made


class _AnyGenerator(type(Original)):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Original)


class Generator(Original, metaclass=_AnyGenerator):
    """``torch.Generator`` of any device, the simulated one too."""

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        """A fresh one."""
        where = torch.device(device)
        return DeviceGenerator(where.index or 0) if where.type == NAME else Original(where)


def is_of_device(generator: Any) -> bool:
    """Whether it was made for the simulated accelerator."""
    return generator._cdata in _of_device


def wrong_generator(wanted: str, found: str) -> RuntimeError:
    """What CUDA says."""
    return RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
