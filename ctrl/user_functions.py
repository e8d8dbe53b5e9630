"""Functions that users bring: how they are called, and what they must return and leave alone."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import require

Result = TypeVar("Result")


def call(name: str, function: Callable[..., Result], *inputs: Tensor, noted: bool = True) -> Result:
    """function(*inputs), refused where it writes into an input; its errors say where it was called.

    Costs a look at the inputs' version counters, no copy and no synchronisation. Inference tensors
    have no such counter: there the function is given copies.

    Args:
        name: of the function, for the error.
        function: that the user brought.
        inputs: time, states and actions, as it takes them.
        noted: whether an error of the function gets a note, as by ``located``.

    Raises:
        ValueError: an input was changed in place.
    """
    if torch.compiler.is_compiling():  # a graph has no version counters
        return function(*inputs)
    before = []
    for one in inputs:
        if one.is_inference():
            copies = [each.clone() for each in inputs]
            return located(name, function, *copies) if noted else function(*copies)
        before.append(one._version)
    try:
        result = function(*inputs)
    except Exception as fault:
        if noted:
            _locate(fault, name, inputs)
        raise
    if [each._version for each in inputs] != before:
        raise ValueError(
            f"{name} must not write into its inputs, the states and actions of the paths, but it "
            "changed one in place: let it begin with a copy (x = x.clone()), or use operations "
            "that are not in place (torch.nn.ReLU() instead of ReLU(inplace=True))"
        )
    return result


def located(name: str, function: Callable[..., Result], *inputs: Tensor) -> Result:
    """function(*inputs), whose error is raised with a note of its name and of what it was given.

    Torch's own errors (a network in float32 that is given float64, shapes that do not fit) tell
    neither.

    Args:
        name: of the function, for the note.
        function: that the user brought.
        inputs: as it takes them.
    """
    try:
        return function(*inputs)
    except Exception as fault:
        _locate(fault, name, inputs)
        raise


def _locate(fault: Exception, name: str, inputs: Sequence[Tensor]) -> None:
    if not hasattr(fault, "__notes__"):  # the innermost function is the one at fault
        given = ", ".join(f"{list(each.shape)} {each.dtype}" for each in inputs)
        fault.add_note(f"in {name}, which was called with {given}")


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


def require_order(name: str, function: Callable[..., object], order: str) -> None:
    """Refuse a function whose own names say that it takes the state before the time.

    Where both shapes broadcast, as in lambda x, t, a: a - x, it would silently compute something
    else. Names that say nothing pass.

    Args:
        name: of the function, for the error.
        function: that the user brought.
        order: of the arguments that it must take, for the error.

    Raises:
        TypeError: the first argument has the name of a state and a later one that of a time.
    """
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a built-in
        return
    if names and names[0] in _STATES and not _TIMES.isdisjoint(names[1:]):
        raise TypeError(
            f"{name} must take {order}, the time before the states, got ({', '.join(names)})"
        )


_STATES = frozenset({"x", "y", "z", "state", "states"})
_TIMES = frozenset({"t", "time", "times"})


def one_a_path(name: str, value: Tensor, paths: int) -> Float[Tensor, " paths"]:
    """``value``, refused where it is not one number a path.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another shape.
    """
    if not isinstance(value, Tensor):
        raise no_tensor(name, value, f"[{paths}], one number a path", f"({paths},)")
    if value.shape != (paths,):
        raise ValueError(
            f"{name} must return [{paths}], one number a path, got {list(value.shape)}"
            f"{_one_a_path_by(value, paths)}"
        )
    return value


def _one_a_path_by(value: Tensor, paths: int) -> str:
    """What makes one number a path of it, where that can be told."""
    if value.ndim == 0:
        return ": a sum over all paths? .sum(-1) sums over the coordinates of each"
    if len(value) != paths:
        return ""
    if value.shape[1:].numel() == 1:
        return ": .flatten() drops its last axis"
    return ": .flatten(1).sum(1) sums over the coordinates of each path"


def no_tensor(name: str, value: object, wanted: str, shape: str) -> TypeError:
    """The error where a function returned something else than a tensor.

    Args:
        name: of the function.
        value: that it returned: a number, None or anything else.
        wanted: in words.
        shape: as it is written in code.
    """
    if isinstance(value, Real):
        return TypeError(
            f"{name} must return a tensor {wanted}, got the number {value}: "
            f"x.new_full({shape}, {value}) is that for states x"
        )
    return TypeError(f"{name} must return a tensor {wanted}, got {type(value).__name__}")


def like_states(name: str, value: Tensor, states: Tensor) -> Tensor:
    """``value``, refused where adding it to the states would broadcast or cast.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has not the states' shape and dtype.
    """
    if not isinstance(value, Tensor):
        wanted = f"{list(states.shape)} in {states.dtype}, as the states are"
        raise no_tensor(name, value, wanted, "x.shape")
    if value.shape != states.shape or value.dtype != states.dtype:
        raise ValueError(
            f"{name} must return {list(states.shape)} in {states.dtype}, as the states are, got "
            f"{list(value.shape)} in {value.dtype}{_like_states_by(value, states)}"
        )
    return value


def _like_states_by(value: Tensor, states: Tensor) -> str:
    """What makes states of it, where that can be told."""
    if value.shape == states.shape:
        return ": cast it, .to(x.dtype), or the network that makes it, network.to(x.dtype)"
    if value.ndim == 1 and states.shape == (len(value), 1):
        return ": .unsqueeze(1) adds the axis of the coordinates (as x[:, :1], not x[:, 0])"
    try:
        fits = torch.broadcast_shapes(value.shape, states.shape) == states.shape
    except RuntimeError:  # the shapes have nothing to do with each other
        fits = False
    return ": .expand_as(x) of states x repeats it, where that is meant" if fits else ""


def all_finite(name: str, value: Tensor) -> Tensor:
    """``value``, refused where it is not finite.

    Raises:
        ValueError: it is infinite or NaN somewhere.
    """
    require(torch.isfinite(value).all(), lambda: _not_finite(name, value))
    return value


def _not_finite(name: str, value: Tensor) -> ValueError:
    bad = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).sum())
    which = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero()[0])
    return ValueError(
        f"{name} must be finite, but it is not on {bad} of {len(value)} paths, the first of them "
        f"path {which}"
    )
