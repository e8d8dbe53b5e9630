"""Numbers read out of tensors, inside ``torch.func.vmap`` too.

There a tensor stands for its whole batch and cannot be read; but its maximum over that batch can,
and that is what a decision for all of the batch needs.
"""

from typing import Any

import torch
from torch import Tensor


def largest(numbers: Tensor) -> float:
    """The largest entry, of the whole of a vectorised batch; NaN if there is one, 0 of none."""
    return float(_Largest.apply(numbers.detach())) if numbers.numel() else 0.0  # pyright: ignore[reportArgumentType]  # torch leaves it open


class _Largest(torch.autograd.Function):
    """A maximum that ``vmap`` takes over its batch; a constant."""

    @staticmethod
    def forward(numbers: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's new style
        return numbers.max()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, direction: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        return torch.zeros_like(direction.sum())

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], numbers: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        return _Largest.apply(numbers), None  # pyright: ignore[reportReturnType]  # as above
