"""Calls are refused and accepted as jaxtyping's own decorator does it, each value checked once."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, ParamSpec

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int64, TypeCheckError
from torch import Tensor

import ctrl
from tests import checked_types

P = ParamSpec("P")
ours = checked_types.jaxtyped(typechecker=beartype)
theirs = checked_types._THEIRS(typechecker=beartype)


def shapes(
    x: Float[Tensor, "paths steps"], y: Float[Tensor, " paths"] | None = None, *, wrong: int = 0
) -> Float[Tensor, " paths"]:
    return x.sum(1)[: len(x) - wrong]


def event(
    x: Float[Tensor, " paths *event"], y: Float[Tensor, " *event"]
) -> Float[Tensor, " paths"]:
    return x.flatten(1).sum(1)


def rest(*x: Float[Tensor, " n"], **named: Int64[Tensor, " n"]) -> None:
    return None


def plain(kind: Literal["a", "b"], of: Sequence[int] | None, call: Callable[[int], int]) -> str:
    return kind if of is None else call(len(of))  # pyright: ignore[reportReturnType]  # wrong


def nothing(x: int) -> None:
    return x or None  # pyright: ignore[reportReturnType]  # wrong where it is not 0


def unannotated(x, y=2, *more, z=3, **named):
    return x


def within(x: Float[Tensor, " n"]) -> bool:
    kind: Any = Float[Tensor, " n"]
    return isinstance(torch.zeros(3), kind)


def in_words(x: "int") -> "str":
    return str(x) if x else x  # pyright: ignore[reportReturnType]  # wrong where it is 0


def unknown(x: "Unheard") -> int:  # noqa: F821  # pyright: ignore  # as under TYPE_CHECKING
    return x


def pieces(x: Float[Tensor, " n"]) -> Iterator[int]:
    yield from range(len(x))


def raises(x: int) -> int:
    raise TypeError("its own")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (shapes, (zeros(3, 2),), {}),
    (shapes, (zeros(3, 2), zeros(3)), {}),
    (shapes, (zeros(3, 2), zeros(2)), {}),
    (shapes, (zeros(3, 2), zeros(1)), {}),
    (shapes, (zeros(3),), {}),
    (shapes, (zeros(3, 2).long(),), {}),
    (shapes, ([1.0],), {}),
    (shapes, (zeros(3, 2),), {"wrong": 1}),
    (shapes, (zeros(3, 2),), {"wrong": "1"}),
    (shapes, (), {"y": zeros(3), "x": zeros(3, 2)}),
    (shapes, (), {}),
    (shapes, (zeros(3, 2), None, 0), {}),
    (shapes, (zeros(3, 2),), {"other": 0}),
    (event, (zeros(3, 2, 4), zeros(2, 4)), {}),
    (event, (zeros(3, 2, 4), zeros(4, 2)), {}),
    (rest, (zeros(3), zeros(3)), {"a": zeros(3).long()}),
    (rest, (zeros(3), zeros(2)), {}),
    (rest, (zeros(3),), {"a": zeros(2).long()}),
    (plain, ("a", None, len), {}),
    (plain, ("c", None, len), {}),
    (plain, ("a", ["x"], len), {}),
    (plain, ("a", [1], abs), {}),
    (plain, ("a", None, 3), {}),
    (nothing, (0,), {}),
    (nothing, (1,), {}),
    (unannotated, (1, 2, 3), {"z": 4, "k": 5}),
    (unannotated, (), {}),
    (within, (zeros(3),), {}),
    (within, (zeros(2),), {}),
    (in_words, (1,), {}),
    (in_words, ("1",), {}),
    (in_words, (0,), {}),
    (unknown, (1,), {}),
    (unknown, ("1",), {}),
    (pieces, (zeros(3),), {}),
    (pieces, ([3],), {}),
    (raises, (1,), {}),
    (raises, ("1",), {}),
]


def end(call: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What it returns, or what it raises."""
    try:
        made = call(*arguments, **named)
    except Exception as error:
        # the words of a refusal are the checker's, those of a missing argument Python's
        return type(error), str(error) == "its own"
    made = list(made) if inspect.isgenerator(made) else made
    return made.tolist() if isinstance(made, Tensor) else made


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case[0].__name__)
def test_a_call_ends_as_with_jaxtypings_decorator(case):
    function, arguments, named = case
    expected = end(theirs(function), arguments, named)
    assert end(ours(function), arguments, named) == expected
    if function.__name__ not in ("in_words", "unknown", "pieces"):
        assert ours(function).__code__ is not theirs(function).__code__


def test_what_is_compared_is_refused_as_often_as_accepted():
    refused = [end(ours(f), a, n) for f, a, n in CALLS]
    errors = [e for e in refused if isinstance(e, tuple) and e[0] is TypeCheckError]
    assert 15 <= len(errors) <= len(CALLS) - 12


def test_sizes_of_axes_are_forgotten_between_calls_and_known_within():
    call = ours(shapes)
    for n in (3, 4):
        with pytest.raises(TypeCheckError) as caught:
            call(zeros(n, 2), zeros(5))
        assert any(f"paths={n}" in note for note in caught.value.__notes__)
        assert len(call(zeros(n, 2), zeros(n))) == n

    def outer(x: Float[Tensor, "paths steps"]) -> Tensor:
        return call(x[:2])  # another number of paths within

    assert len(ours(outer)(zeros(5, 3))) == 2


def made(value: Any, kind: Any = int, default: int = 1, checker: Any = ours) -> Any:
    """A function that is made anew at each call."""

    @checker
    def inner(x: Float[Tensor, " n"], y: kind = default) -> Float[Tensor, " n"] | None:  # pyright: ignore[reportInvalidTypeForm]  # varies
        return value if y else None

    return inner


def test_functions_made_anew_return_their_own_and_are_checked_by_their_own_hints():
    one, two, words = made(zeros(3)), made(zeros(2), default=0), made(zeros(3), kind=str)
    assert one(zeros(3)).shape == (3,)
    assert two(zeros(3)) is None
    assert two(zeros(2), 1).shape == (2,)
    assert words(zeros(3), "a").shape == (3,)
    for call, *arguments in ((one, zeros(2)), (two, zeros(3), 1), (one, zeros(3), "a")):
        with pytest.raises(TypeCheckError):
            call(*arguments)
    with pytest.raises(TypeCheckError):
        words(zeros(3), 1)
    assert inspect.unwrap(one) is not inspect.unwrap(made(zeros(3)))


def test_functions_of_any_arguments_may_be_made_anew():
    def counted(call: Callable[P, int]) -> Callable[P, int]:
        @ours
        def inner(*args: P.args, **kwargs: P.kwargs) -> int:
            return call(*args, **kwargs)

        return inner

    assert counted(len)([1, 2]) == 2
    with pytest.raises(TypeCheckError):
        counted(str)(3)  # pyright: ignore[reportArgumentType]  # wrong


def test_functions_made_anew_are_checked_by_code_made_once_that_keeps_none_alive():
    before = len(checked_types._WRAPPERS)
    for _ in range(2):
        value = zeros(3)
        gone, call = weakref.ref(value), made(value, kind=float)
        assert call(zeros(3), 1.0) is value
        del value, call
        assert gone() is None
    assert len(checked_types._WRAPPERS) == before + 1


def test_the_packages_are_checked_so():
    """The hook has decorated functions, methods and data classes with what stands here."""
    grid = ctrl.uniform_grid(1.0, steps=2)
    assert ctrl.uniform_grid.__code__ is ours(shapes).__code__
    assert inspect.unwrap(ctrl.uniform_grid) is not ctrl.uniform_grid
    with pytest.raises(TypeCheckError):
        dataclasses.replace(grid, nodes=torch.zeros(2, 2))
    with pytest.raises(TypeCheckError):
        ctrl.noise.steps_at_once(torch.zeros)  # pyright: ignore[reportArgumentType]


def test_as_users_run_it_nothing_is_checked(as_users_run_it):
    one: Any = "1"
    for decorated in (ours, theirs):
        assert decorated(nothing)(one) == decorated(in_words)(one) == one
    assert jaxtyping.jaxtyped is checked_types.jaxtyped
