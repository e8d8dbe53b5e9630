"""A factor, or an offset, planted into what a function returns; and which functions there are."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from verification.planting import Edit, _function

FACTOR, OFFSET = 1.37, 0.29
_CHANGED = "__import__('importlib').import_module('tests.verification.scaled_returns').{}"


def scaled(value: Any) -> Any:
    """Numbers times a factor; integers rolled by one place, truth values negated."""
    return _each(value, lambda x: FACTOR * x, lambda x: x.roll(1, 0) if x.ndim else x)


def shifted(value: Any) -> Any:
    """Numbers plus an offset that differs from element to element; integers plus one."""

    def shift(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x + OFFSET
        order = torch.arange(1, 1 + x.numel(), dtype=x.dtype, device=x.device)
        return x + OFFSET * order.sin().view(x.shape)

    return _each(value, shift, lambda x: x + 1)


def _each(value: Any, change: Callable[[Any], Any], place: Callable[[Any], Any]) -> Any:
    """A change of all numbers that a value holds."""
    if isinstance(value, float):
        return change(value)
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            return ~value
        return change(value) if value.is_floating_point() else place(value)
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(_each(part, change, place) for part in value)
    if isinstance(value, dict):
        return {name: _each(part, change, place) for name, part in value.items()}
    return value


def changed_returns(target: str, how: str) -> Edit | None:
    """The edit by which all that a function returns is changed; None if it returns nothing.

    A function that returns another one is changed in what that one returns, and a generator in what
    it yields.
    """
    source = "".join(_lines(_function(target)))
    node = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(node, ast.FunctionDef)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    values = sorted(_values(node), key=lambda value: -value.lineno)
    if not body or not values:
        return None
    indent = len(source) - len(source.lstrip())
    lines = source.splitlines(keepends=True)

    def place(line: int, column: int) -> int:
        return sum(len(line.encode()) for line in lines[: line - 1]) + column + indent

    text = source.encode()
    first, last = place(body[0].lineno, -indent), len(text)
    new = text
    for value in values:
        begin = place(value.lineno, value.col_offset)
        end = place(value.end_lineno or 0, value.end_col_offset or 0)
        new = (
            new[:begin]
            + f"{_CHANGED.format(how)}(({new[begin:end].decode()}))".encode()
            + new[end:]
        )
    return Edit(target, text[first:last].decode(), new[first:].decode())


def _lines(function: FunctionType) -> list[str]:
    lines, first = inspect.findsource(function.__code__)
    return inspect.getblock(lines[first:])


def _values(node: ast.FunctionDef) -> list[ast.expr]:
    """What a function returns or yields, or what the functions return that it returns."""
    inner = {each.name: each for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
    values = list[ast.expr]()
    for each in _own(node):
        value = each.value if isinstance(each, ast.Return | ast.Yield) else None
        if isinstance(value, ast.Name) and value.id in inner:
            values += _values(inner[value.id])
        elif isinstance(value, ast.Lambda):
            values.append(value.body)
        elif value is not None and not isinstance(value, ast.Constant):
            values.append(value)
    return values


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, but not in functions within it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own(child)


def functions_of(module: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions, methods and properties that a module defines, by their dotted names."""
    source = inspect.getsource(importlib.import_module(module))
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            yield f"{module}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{module}.{node.name}.{member.name}", member


def returns_numbers(node: ast.FunctionDef) -> bool:
    """Whether a function is annotated to return numbers that are not integers, and returns any."""
    words = {
        each.id if isinstance(each, ast.Name) else each.attr
        for each in ast.walk(node.returns or ast.Constant(None))
        if isinstance(each, ast.Name | ast.Attribute)
    }
    known = {"Float", "Tensor", "float", "State", "Level", "Times", "Values"}
    return bool(words & known) and bool(_values(node))
