"""What code would cost, counted: bytes of tensors that are alive, and operations; on any device.

On torch's meta device nothing is computed and nothing is held, so that a network of any size is
counted in seconds, without its weights. What is counted there is what a CPU or a GPU would make:
attention in one kernel, which holds no matrix of weights, and the dtypes of autocast, neither of
which the meta device has of its own.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

META = torch.device("meta")
_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Shape:
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.size) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation on tensors of these shapes.

    Attributes:
        function: of torch.
        arguments: positional and by name, with ``Shape`` in place of tensors.
        flops: of matrix products, convolutions and attention; 0 of all else.
        bytes: read and written.
    """

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    flops: int
    bytes: int


class Meter(TorchDispatchMode):
    """Within this context bytes that are alive and operations are counted.

    Attributes:
        alive: bytes of tensors that were made within, and still exist.
        peak: most of them so far.
        operations: what was done, and how often; views are none.
        calls: of torch's functions, views included.
        flops: of matrix products, convolutions and attention.
    """

    def __init__(self, *, operations: bool = False) -> None:
        super().__init__()
        self.alive = self.peak = self.calls = self.flops = 0
        self.operations = dict[Operation, int]()
        self._by_shape = dict[str, Operation]()
        self._records = operations
        self._known = dict[int, int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do it, and count it."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        self.calls += 1
        before = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        new = [t for t in _tensors(result) if id(t.untyped_storage()) not in before]
        for tensor in new:
            self._add(tensor.untyped_storage())
        flops = _flops(func, args, kwargs, result)
        self.flops += flops
        if self._records and (new or func._schema.is_mutable):
            self._record(func, args, kwargs, result, flops)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.alive -= self._known.pop(key)

    def _record(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, flops: int
    ) -> None:
        shapes = tree_map(lambda x: _shape(x) if isinstance(x, Tensor) else x, (args, kwargs))
        key = f"{func} {shapes}"
        if key not in self._by_shape:
            parts, _ = tree_flatten(shapes)
            read = sum(part.bytes for part in parts if isinstance(part, Shape))
            written = sum(t.numel() * t.dtype.itemsize for t in _tensors(result))
            self._by_shape[key] = Operation(func, shapes, flops, read + written)
        operation = self._by_shape[key]
        self.operations[operation] = self.operations.get(operation, 0) + 1


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    if packet in (_ATTENTION, _ATTENTION_BACKWARD):  # the registry has those of GPUs only
        query, key, value = args[:3] if packet is _ATTENTION else args[1:4]
        once = sdpa_flop_count(query.shape, key.shape, value.shape)
        return once if packet is _ATTENTION else 5 * once // 2
    formula: Any = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


# -- the meta device, as a CPU or a GPU would do it ------------------------------------------------


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    if _active:
        query, key, value = (x.to(_active[-1].dtype) for x in (query, key, value))
    return _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


_LOWER = {
    functional.linear,
    functional.conv2d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.conv2d,
    Tensor.matmul,
    Tensor.bmm,
}
_WHOLE_ON_CUDA = {functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax}


class _Autocast(TorchFunctionMode):
    """What ``torch.autocast`` does on a device of this type, on the meta device."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.device_type, self.dtype = device_type, dtype
        self.whole = _WHOLE_ON_CUDA if device_type == "cuda" else set[Any]()
        self._cast = dict[int, tuple[Tensor, Tensor]]()  # of weights that train: once a context

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do it in the dtype that autocast would."""
        inputs = tuple(args), dict(kwargs or {})
        if func in _LOWER:
            inputs = tree_map(lambda x: self._to(x, self.dtype), inputs)
        elif func in self.whole:
            inputs = tree_map(lambda x: self._to(x, torch.float32), inputs)
        return func(*inputs[0], **inputs[1])

    def _to(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.requires_grad and value.is_leaf and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._cast:
            self._cast[id(value)] = value, value.to(dtype)
        return self._cast[id(value)][1]


_counted_for = ["cpu"]
_active: list[_Autocast] = []


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """Within this context what is done on the meta device is what this type would do."""
    own = functional.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kernel = _attention if query.device == META else own
        return kernel(query, *args, **kwargs)

    _counted_for.append(device_type)
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own
        _counted_for.pop()


def arithmetic(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Within this context a network's arithmetic has this precision."""
    reduced = precision != torch.float32
    if device != META:
        return torch.autocast(device.type, precision, enabled=reduced)
    return _lower(_Autocast(_counted_for[-1], precision)) if reduced else nullcontext()


def same_arithmetic() -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts with the arithmetic of now, for what is computed again; of meta's own only."""
    if not _active:
        return nullcontext
    now = _active[-1]
    return lambda: _lower(_Autocast(now.device_type, now.dtype))


@contextmanager
def _lower(mode: _Autocast) -> Iterator[None]:
    _active.append(mode)
    try:
        with mode:
            yield
    finally:
        _active.pop()
