"""Exact answers, each computed once.

A claim's body runs on the right code and on every mistake, and a closed form answers the same in
all of these runs: it calls nothing of the library, as a test asks. Only a mistake in
``verification`` itself can change an answer, so ``planting`` runs it without any (``forgotten``).
"""

import copy
import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.polynomial import Polynomial

_CLOSED_FORMS = "verification.closed_form."
_MEMORIES: list[dict[Hashable, Any]] = []

P = ParamSpec("P")
T = TypeVar("T")


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """The closed form, which answers the same arguments out of memory.

    Arguments are compared by their values: numbers, words, arrays, records of these and other
    closed forms. Each caller gets a copy of its own.

    Raises:
        ValueError: the function is none of ``closed_form``, and may call what is to be checked.
    """
    if not function.__module__.startswith(_CLOSED_FORMS):
        raise ValueError(f"{function.__module__} is no closed form: its answers may change")
    memory: dict[Hashable, T] = {}
    _MEMORIES.append(memory)

    @functools.wraps(function)
    def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        key = _value(args), _value(tuple(sorted(kwargs.items())))
        if key not in memory:
            memory[key] = copy.deepcopy(function(*args, **kwargs))
        return copy.deepcopy(memory[key])

    return answer


@contextmanager
def forgotten() -> Iterator[None]:
    """Compute every answer anew in here, and keep none of these."""
    before = [(memory, dict(memory)) for memory in _MEMORIES]
    for memory in _MEMORIES:
        memory.clear()
    try:
        yield
    finally:
        for memory in _MEMORIES:
            memory.clear()
        for memory, answers in before:
            memory.update(answers)


def _value(argument: object) -> Hashable:
    """What tells arguments apart: equal for two that every function answers alike.

    Raises:
        TypeError: an argument that has no value, such as a function of the library.
    """
    kind = type(argument)
    if argument is None or isinstance(argument, bool | int | float | complex | str | np.generic):
        return kind, repr(argument)  # tells 0.0 from -0.0, and 1 from True
    if isinstance(argument, np.ndarray) and not argument.dtype.hasobject:
        return argument.dtype.str, argument.shape, argument.tobytes()
    if isinstance(argument, Polynomial):
        return kind, _value((argument.coef, argument.domain, argument.window))
    if isinstance(argument, tuple | list):
        return kind, *map(_value, argument)
    if isinstance(argument, functools.partial):
        return kind, _value((argument.func, argument.args, *sorted(argument.keywords.items())))
    if is_dataclass(kind) and kind.__module__.startswith(_CLOSED_FORMS):
        return kind, *(_value(getattr(argument, field.name)) for field in fields(kind))
    if (
        isinstance(argument, FunctionType)
        and argument.__module__.startswith(_CLOSED_FORMS)
        and "<" not in argument.__qualname__  # no lambda, nothing inside a function
    ):
        return argument.__module__, argument.__qualname__
    raise TypeError(f"answers for {argument!r} cannot be remembered: it has no value to compare")
