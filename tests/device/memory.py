"""Memory of the simulated accelerator: tensors of its device over bytes of the CPU."""

import weakref
from typing import Any

import torch
from torch import Tensor

NAME = "sim"
_by_address: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def storage_over(memory: Any) -> Any:
    """A storage on the device over a CPU storage's bytes, which it keeps alive."""
    found = torch._C._construct_storage_from_data_pointer(
        memory.data_ptr(), torch.device(NAME, 0), memory.nbytes()
    )
    found.memory = memory  # the Python object lives as long as the one in C++
    _by_address[memory.data_ptr()] = memory  # serialisation makes storages without the attribute
    return found


def memory_of(storage: Any) -> Any:
    """The CPU storage under a storage of the device."""
    known = getattr(storage, "memory", None)
    return _by_address[storage.data_ptr()] if known is None else known


def on_cpu(tensor: Tensor) -> Tensor:
    """The CPU tensor over the same bytes."""
    memory = memory_of(tensor.untyped_storage())
    geometry = tensor.storage_offset(), tensor.size(), tensor.stride()
    found = torch.empty(0, dtype=tensor.dtype).set_(memory, *geometry)
    if tensor.is_conj():
        found = found.conj()
    return torch._neg_view(found) if tensor.is_neg() else found


def over(storage: Any, like: Tensor) -> Tensor:
    """A device tensor over this storage, with the dtype and the geometry of a CPU tensor."""
    made = torch._C._acc.create_empty_tensor([0], like.dtype)
    lay(made, storage, like)
    return made


def lay(tensor: Tensor, storage: Any, like: Tensor) -> None:
    """Move a device tensor to this storage, in the geometry of a CPU tensor."""
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
        tensor,
        storage,
        like.storage_offset(),
        like.size(),
        like.stride(),
    )


def on_device(tensor: Tensor) -> Tensor:
    """A device tensor over the bytes of a CPU tensor."""
    return over(storage_over(tensor.untyped_storage()), tensor)
