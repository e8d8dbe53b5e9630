"""Functions that users bring: how they are called, and what they must return and leave alone."""

import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import require

Result = TypeVar("Result")


def call(name: str, function: Callable[..., Result], *inputs: Tensor) -> Result:
    """function(*inputs), refused where it writes into an input, which are stored paths.

    Costs a look at the inputs' version counters, no copy and no synchronisation. Inference tensors
    have no such counter: there the function is given copies.

    Args:
        name: of the function, for the error.
        function: that the user brought.
        inputs: time, states and actions, as it takes them.

    Raises:
        ValueError: an input was changed in place.
    """
    if torch.compiler.is_compiling():  # a graph has no version counters
        return function(*inputs)
    for one in inputs:
        if one.is_inference():
            return function(*(each.clone() for each in inputs))
    before = [each._version for each in inputs]
    result = function(*inputs)
    if [each._version for each in inputs] != before:
        raise ValueError(
            f"{name} must not write into its inputs, the states and actions of the paths, but it "
            "changed one in place: let it begin with a copy (x = x.clone()), or use operations "
            "that are not in place (torch.nn.ReLU() instead of ReLU(inplace=True))"
        )
    return result


def own_memory(x: Tensor) -> Tensor:
    """A contiguous copy. At a view, forward mode allocates tangents for all that it is a view of.

    And it cannot differentiate at an expanded tensor.
    """
    return x.clone(memory_format=torch.contiguous_format)


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether the function can be called with so many arguments; True where it does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a built-in
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def one_a_path(name: str, value: Tensor, paths: int) -> Float[Tensor, " paths"]:
    """``value``, refused where it is not one number a path.

    Raises:
        ValueError: it has another shape.
    """
    if value.shape != (paths,):
        raise ValueError(
            f"{name} must return [{paths}], one number a path, got {list(value.shape)}"
        )
    return value


def all_finite(name: str, value: Tensor) -> Tensor:
    """``value``, refused where it is not finite.

    Raises:
        ValueError: it is infinite or NaN somewhere.
    """
    require(torch.isfinite(value).all(), lambda: _not_finite(name, value))
    return value


def _not_finite(name: str, value: Tensor) -> ValueError:
    bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).sum())
    return ValueError(f"{name} must be finite, but it is not on {bad} of {len(value)} paths")
