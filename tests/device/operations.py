"""Operations of the simulated accelerator: those of the CPU, after what CUDA would have refused.

Tensors of two devices may not meet, except where CUDA lets them: numbers without dimensions, and
CPU indices into device tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.device import counting
from tests.device.generators import DeviceGenerator, Original, is_of_device, wrong_generator
from tests.device.memory import NAME, lay, on_cpu, on_device, over, storage_over

aten = torch.ops.aten
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_ALLOCATIONS = {"empty", "empty_strided", "resize_", "set_", "new_empty", "new_empty_strided"}
_QUESTIONS = {"_local_scalar_dense", "is_same_size", "_fused_sdp_choice"}  # no kernel of their own
_TAKES_CPU_NUMBERS = {
    "index_put_", "_index_put_impl_", "masked_fill_", "masked_fill", "fill_", "fill", "where",
    "_unsafe_index_put", "index_fill_", "index_fill",
}  # fmt: skip
_UNWRAPS_NUMBERS = {
    "remainder", "fmod", "floor_divide", "bitwise_and", "bitwise_or", "bitwise_xor", "pow",
}  # fmt: skip
_INDEXED = {
    "index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index", "_unsafe_index_put",
}  # fmt: skip


@dataclass(frozen=True)
class _Schema:
    """What an operation's signature says, looked up once.

    Attributes:
        name: without namespace and overload.
        arguments: their names.
        pointwise: whether numbers of the CPU may take part.
        written: names of the arguments that it changes in place.
        returned: for every result the argument that it is, if it is one.
        launches: whether it is a kernel (views and allocations are not).
    """

    name: str
    arguments: tuple[str, ...]
    pointwise: bool
    written: frozenset[str]
    returned: tuple[str | None, ...]
    launches: bool

    @classmethod
    def of(cls, operation: Any) -> "_Schema":
        schema = operation._schema
        name = schema.name.split("::")[1]
        written = {a.name: a.alias_info for a in schema.arguments if _is_write(a)}
        sets = {next(iter(info.before_set), n): n for n, info in written.items()}
        returned = tuple(
            sets.get(next(iter(r.alias_info.before_set), None)) if _is_write(r) else None
            for r in schema.returns
        )
        views = any(r.alias_info is not None and not _is_write(r) for r in schema.returns)
        kernel = (not views or bool(written)) and name not in _ALLOCATIONS | _QUESTIONS
        pointwise = torch.Tag.pointwise in operation.tags
        arguments = tuple(a.name for a in schema.arguments)
        return cls(name, arguments, pointwise, frozenset(written), returned, kernel)


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


_schemas: dict[Any, _Schema] = {}


class Discipline(torch.overrides.TorchFunctionMode):
    """Within it operations of the CPU refuse the device's generators, as they do CUDA's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        ours = isinstance(kwargs.get("generator"), DeviceGenerator)
        if ours and isinstance(found, Tensor) and found.device.type == "cpu":
            raise wrong_generator("cpu", NAME)
        return found


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the CPU's operation on the same bytes, after checking what CUDA would check."""
    schema = _schemas.get(operation)
    if schema is None:
        schema = _schemas[operation] = _Schema.of(operation)
    if schema.name in ("_copy_from", "_copy_from_and_resize"):
        return _copy(*args, **kwargs)
    if schema.name == "set_" and len(args) > 1 and not isinstance(args[1], Tensor):
        return operation.redispatch(_CPU_KEY, *args, **kwargs)
    with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
        call = _Call(schema, bool(args) and _is_on_device(args[0]))
        cpu_args = [call.take(v, schema.arguments[i]) for i, v in enumerate(args)]
        cpu_kwargs = {name: call.take(v, name) for name, v in kwargs.items()}
        _count(operation, schema, cpu_args, kwargs)
        kernel = _REPLACED.get(schema.name, operation)
        if schema.name in _UNWRAPS_NUMBERS and any(isinstance(a, int | float) for a in args):
            kernel = operation._overloadpacket  # a number in a tensor's place lost its wrapping
        return call.give(kernel(*cpu_args, **cpu_kwargs))


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


class _Call:
    """The arguments of one call, to the CPU and back."""

    def __init__(self, schema: _Schema, first_on_device: bool) -> None:
        self.schema, self.first_on_device = schema, first_on_device
        self.storages: dict[int, Any] = {}  # CPU storage -> device storage
        self.ours: dict[str, tuple[Tensor, Tensor]] = {}  # argument -> device and CPU tensor

    def take(self, value: Any, argument: str) -> Any:
        """An argument as the CPU's operation wants it, refused where CUDA would."""
        if isinstance(value, list | tuple):
            return [self._one(v, argument) for v in value]
        return self._one(value, argument)

    def _one(self, value: Any, argument: str) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == NAME else value
        if isinstance(value, Original):
            if not is_of_device(value):
                raise wrong_generator(NAME, "cpu")
            return value
        if not isinstance(value, Tensor):
            return value
        if value.device.type == NAME:
            found = on_cpu(value)
            self.storages[found.untyped_storage()._cdata] = value.untyped_storage()
            self.ours[argument] = value, found
            return found
        if value.device.type == "cpu" and not self._may_be_on_cpu(value, argument):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and cpu! (aten::{self.schema.name}, argument {argument})"
            )
        return value

    def _may_be_on_cpu(self, value: Tensor, argument: str) -> bool:
        name = self.schema.name
        if argument in self.schema.written:
            return False
        if argument == "indices" and name in _INDEXED and self.first_on_device:
            counting.synchronised("copy to device")
            return True
        return value.dim() == 0 and (self.schema.pointwise or name in _TAKES_CPU_NUMBERS)

    def give(self, found: Any) -> Any:
        """Results of the CPU as tensors of the device; what was written to stays the same."""
        for argument in self.schema.written & self.ours.keys():
            self._follow(*self.ours[argument])
        if not isinstance(found, list | tuple):
            return self._back(found, 0)
        each = [self._back(value, i) for i, value in enumerate(found)]
        return tuple(each) if isinstance(found, tuple) else each

    def _back(self, value: Any, place: int) -> Any:
        returned = self.schema.returned
        argument = returned[place] if place < len(returned) else None
        if argument in self.ours:
            return self.ours[argument][0]
        if not isinstance(value, Tensor):
            return value
        storage = self.storages.get(value.untyped_storage()._cdata)
        return on_device(value) if storage is None else over(storage, value)

    def _follow(self, device: Tensor, cpu: Tensor) -> None:
        """An operation in place may have resized or restrided its argument."""
        memory = cpu.untyped_storage()
        storage = self.storages.get(memory._cdata)
        geometry = (
            (t.size(), t.stride(), t.storage_offset(), t.untyped_storage().nbytes())
            for t in (device, cpu)
        )
        if storage is not None and len({*geometry}) == 1:
            return
        if storage is None or storage.nbytes() != memory.nbytes():
            storage = storage_over(memory)
        lay(device, storage, cpu)


def _copy(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    here, there = source.device.type, destination.device.type
    with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
        a = on_cpu(source) if here == NAME else source
        b = on_cpu(destination) if there == NAME else destination
        if here == there:
            counting.launched("copy_")
        elif non_blocking:
            counting.copied_asynchronously()
        else:  # CUDA waits for copies from the host too, as its memory is pageable
            counting.synchronised("copy to host" if there == "cpu" else "copy to device")
        b.copy_(a)
    return destination


def _count(operation: Any, schema: _Schema, args: list[Any], kwargs: dict[str, Any]) -> None:
    if schema.name in _INDEXED and _counts_a_mask(schema.name, args):
        counting.synchronised("boolean mask")
        counting.launched("aten.nonzero.default")
    kind = counting.SYNCHRONISING.get(schema.name)
    told = schema.name == "repeat_interleave" and kwargs.get("output_size") is not None
    if kind is not None and not told:
        counting.synchronised(kind)
    if schema.launches:
        counting.launched(str(operation))


def _counts_a_mask(name: str, args: list[Any]) -> bool:
    """Whether an index is a mask whose true entries the host must count."""
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not ("put" in name and args[2].numel() == 1)  # that is masked_fill


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: Any,
) -> Any:  # fmt: skip
    bias = [weight.size(1) * groups if transposed else weight.size(0)]
    return aten.convolution_backward(
        grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask
    )


_REPLACED: dict[str, Callable[..., Any]] = {
    "_efficientzerotensor": torch.zeros,
    "convolution_overrideable": aten.convolution.default,
    "convolution_backward_overrideable": _convolution_backward,
    "record_stream": lambda *_: None,
}


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """One kernel forward and one back, as on CUDA, where the CPU has such a kernel."""
    plain = query.dim() == 4 and not dropout_p and not enable_gqa
    fits = value.shape[-1] == query.shape[-1] and (
        attn_mask is None or (attn_mask.dtype == query.dtype and not attn_mask.requires_grad)
    )
    if plain and fits:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
