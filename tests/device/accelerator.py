"""A simulated accelerator: the device "sim", with the CPU's memory and CUDA's discipline.

Tensors of "sim" and of the CPU may not meet, generators belong to their device, ``.numpy()`` is
refused; autograd, views, optimisers, autocast, ``torch.func``, checkpointing, ``Module.to`` work.
``counting`` tells launches and synchronisations. It cannot see races, pinned memory, memory limits,
CUDA's numerics, several GPUs, or branches on ``device.type == "cuda"``.

It rests on private symbols of torch and replaces ``torch.Generator``, so it needs a process of its
own: ``make test-device``. ``test_accelerator.py`` says first whether a new torch still has them.
"""

import contextlib
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.device import counting, operations
from tests.device.generators import Generator
from tests.device.memory import NAME, memory_of, storage_over

NEEDS = (2, 10)  # torch's version, from which on a device can be made in Python
SUPPORTED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= NEEDS

_LOWER = (
    "matmul", "mm", "bmm", "addmm", "addmv", "mv", "addbmm", "baddbmm", "linear", "einsum",
    "conv1d", "conv2d", "conv3d", "conv_transpose2d.input", "_convolution",
    "scaled_dot_product_attention", "prelu",
)  # fmt: skip
_FLOAT32 = (
    "softmax.int", "log_softmax.int", "layer_norm", "group_norm", "exp", "log", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "sum", "sum.dim_IntList", "prod", "cumsum", "norm.Scalar", "mse_loss",
    "cross_entropy_loss", "nll_loss", "softplus", "erfinv", "rsqrt", "reciprocal", "sinh", "cosh",
    "tan", "acos", "asin", "log10", "log2", "log1p", "expm1", "nuclear_norm", "dist", "renorm",
)  # fmt: skip
"""What autocast runs in the lower precision, and what in float32: CUDA's lists."""


class Backend:
    """What torch asks of a device's module."""

    @staticmethod
    def is_initialized() -> bool:
        """Always."""
        return True

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def current_device() -> int:
        """The only one."""
        return 0

    @staticmethod
    def device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def set_device(device: Any) -> None:
        """There is nothing to choose."""

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Wait, which is counted."""
        counting.synchronised("synchronize")

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """There is no global stream."""

    @staticmethod
    def manual_seed(seed: int) -> None:
        """There is no global stream."""

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        """The CPU's."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        """The CPU's."""
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        """Types of autocast."""
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def is_bf16_supported() -> bool:
        """As on a recent GPU."""
        return True

    @staticmethod
    def empty_cache() -> None:
        """There is no cache."""

    @staticmethod
    def is_autocast_enabled() -> bool:
        """Whether autocast is on for this device."""
        return torch.is_autocast_enabled(NAME)


_installed: list[torch.library.Library] = []  # kept: a library that is collected is undone


def install() -> None:
    """Make the device, once a process.

    Raises:
        RuntimeError: torch is too old for it.
    """
    if _installed:
        return
    if not SUPPORTED:
        raise RuntimeError(f"the simulated accelerator needs torch 2.10, got {torch.__version__}")
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend)
    anything = torch.library.Library("_", "IMPL")
    anything.fallback(operations.run, "PrivateUse1")
    anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name in _composite_names():
        aten.impl(name, _kernel(_overload(name)), "PrivateUse1")
    for names, lower in ((_LOWER, True), (_FLOAT32, False)):
        for name in names:
            with contextlib.suppress(AttributeError):  # of another version of torch
                aten.impl(name, _autocast(_overload(name), lower), "AutocastPrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        aten.impl("scaled_dot_product_attention", operations.attention, key)
    for key in ("Conjugate", "Negative"):
        aten.impl("_copy_from", torch.library.fallthrough_kernel, key)
    _installed.extend([anything, aten])
    _replace()


def _replace() -> None:
    """Parts of torch that know only the devices that it was built with."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # .to() keeps each parameter
    torch.Generator = Generator  # pyright: ignore[reportAttributeAccessIssue]  # on purpose
    torch.set_autocast_dtype(NAME, torch.bfloat16)
    base: Any = torch.storage._StorageBase
    clone, to = base.clone, torch.storage.UntypedStorage.to

    def cloned(self: Any) -> Any:  # copy.deepcopy of a tensor
        return storage_over(memory_of(self).clone()) if self.device.type == NAME else clone(self)

    def moved(self: Any, *, device: Any, non_blocking: bool = False) -> Any:  # torch.load
        if torch.device(device).type == NAME and self.device.type == "cpu":
            return storage_over(self.clone())
        return to(self, device=device, non_blocking=non_blocking)

    base.clone, base.to = cloned, moved


def _composite_names() -> list[str]:
    """Operations of the CPU that would be taken apart before they reach the fallback."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = (
        "CompositeExplicitAutograd",
        "CompositeExplicitAutogradNonFunctional",
        "CompositeImplicitAutograd",
    )
    names = ["convolution_overrideable", "convolution_backward_overrideable"]
    for full in torch._C._dispatch_get_all_op_names():
        foreach = "::_foreach_" in full
        if not full.startswith("aten::") or not (foreach or has(full, "CPU")):
            continue
        if foreach or any(has(full, key) for key in composite):
            names.append(full.removeprefix("aten::"))
    return names


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _kernel(operation: Any) -> Any:
    return lambda *args, **kwargs: operations.run(operation, *args, **kwargs)


def _autocast(operation: Any, lower: bool) -> Any:
    guard = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if value.device.type != NAME or value.dtype == torch.float64:
            return value
        return value.to(torch.get_autocast_dtype(NAME) if lower else torch.float32)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(guard):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel
