"""Shapes and types that annotations promise, checked at every call at half of jaxtyping's cost.

jaxtyping's import hook decorates every function with ``jaxtyping.jaxtyped``, which binds arguments
to a copy of the signature and checks them twice: before the call, and once more with what it
returns. That takes a third of the time of a test that trains. Here each argument and what is
returned are checked once, by the same checker, with the same memory of the sizes of axes.

Where annotations are words, or a function yields or awaits, jaxtyping's own decorator stays.
"""

import contextlib
import functools
import inspect
import io
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_THEIRS = jaxtyping.jaxtyped
_WRAPPERS = dict[tuple[Any, ...], tuple[Any, Any]]()  # of the code and hints of a closure
_CHECKER = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def jaxtyped(thing: Any = None, *, typechecker: Any = None) -> Any:
    """In place of ``jaxtyping.jaxtyped``, as the import hook calls it."""
    if thing is not None:
        return _THEIRS(thing, typechecker=typechecker)
    theirs = _THEIRS(typechecker=typechecker)
    return lambda it: _checked(it) if inspect.isfunction(it) and _is_plain(it) else theirs(it)


def _checks_of(function: Any) -> Callable[..., Any]:
    """The checker's wrapper; one that serves each function that another makes at its every call."""
    if not function.__closure__:
        return _CHECKER(function)
    hints = function.__annotations__
    key = (function.__code__, *hints, *map(_hint, hints.values()))
    try:
        hash(key)
    except TypeError:  # of the arguments of a ParamSpec
        return _CHECKER(function)
    if key not in _WRAPPERS:
        cells = tuple(types.CellType() for _ in function.__closure__)  # keep nothing alive
        stand_in = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells
        )
        stand_in.__annotations__, stand_in.__qualname__ = hints, function.__qualname__
        stand_in.__module__ = function.__module__
        _WRAPPERS[key] = stand_in, _CHECKER(stand_in)
    stand_in, wrapper = _WRAPPERS[key]
    if wrapper is stand_in:  # there is nothing to check
        return function
    kept = wrapper.__kwdefaults__ or {}  # what the wrapper's code names, the function among it
    own = {k: function if v is stand_in else v for k, v in kept.items()}
    if own == kept:
        return _CHECKER(function)
    checks = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, function.__name__, wrapper.__defaults__
    )
    checks.__kwdefaults__ = own
    return checks


def _hint(hint: Any) -> Any:
    """What is the same for hints that say the same; jaxtyping makes another class each time."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.__name__, hint.dtype, hint.array_type, hint.dim_str
    parts = hint if isinstance(hint, list) else typing.get_args(hint)  # a list: of a Callable
    return (typing.get_origin(hint), *map(_hint, parts)) if parts else hint or repr(hint)


def _is_plain(function: Callable[..., Any]) -> bool:
    """Whether annotations are types, not words that name them, and a call returns at once."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return False
    written = {k: type(None) if v is None else v for k, v in function.__annotations__.items()}
    try:
        return typing.get_type_hints(function, include_extras=True) == written
    except Exception:  # as jaxtyping does: there it is no annotation at all
        return False


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    checked = _checks_of(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _THEIRS("context"):
            try:
                return checked(*args, **kwargs)
            except jaxtyping.TypeCheckError as error:
                if not hasattr(error, "__notes__"):  # of the innermost call
                    with contextlib.redirect_stdout(io.StringIO()) as sizes:
                        jaxtyping.print_bindings()
                    called = f"{function.__qualname__}{inspect.signature(function)}"
                    error.add_note(f"In {called}.\n{sizes.getvalue()}")
                raise

    return call
