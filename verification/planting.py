"""Wrong formulas, planted into the code that users run.

A variant is an edit of one function's source: a piece of its text, found there exactly once, is
replaced, the function is compiled anew and its code object exchanged. Whoever holds the function,
under whatever name and however it was imported, then runs the wrong formula; on leaving, the right
one is back. So what is shown to be rejected is the production code itself with one mistake in it,
and an edit that no longer fits the source cannot go unnoticed: it does not load.
"""

import ast
import functools
import importlib
import inspect
import linecache
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

from verification.answers import forgotten


class PlantingError(ValueError):
    """An edit does not fit the source that it is meant for."""


@dataclass(frozen=True)
class Edit:
    """One piece of a function's source, and what a mistaken author would have written.

    Attributes:
        target: dotted name of a function, method or property, as "ctrl.girsanov.path_kl".
        old: text that stands in its source exactly once, its docstring left aside.
        new: text in its place.
    """

    target: str
    old: str
    new: str

    def code(self) -> CodeType:
        """The function compiled with the mistake.

        Raises:
            PlantingError: the target is no Python function, or ``old`` is not there exactly once.
        """
        function = _function(self.target)
        right = function.__code__
        source = _source(function)
        at = self._place(source)
        body = source.body[:at] + self.new + source.body[at + len(self.old) :]
        text = "\n" * source.outer + source.before + body + source.after
        whole = compile(text, right.co_filename, "exec", dont_inherit=True)
        matches = [
            code
            for code in _inner(whole)
            if code.co_qualname == right.co_qualname and code.co_firstlineno == right.co_firstlineno
        ]
        if len(matches) != 1 or matches[0].co_freevars != right.co_freevars:
            raise PlantingError(f"{self.target} cannot be compiled by itself")
        return matches[0]

    def lines(self) -> tuple[str, str]:
        """The lines of source that differ, right and wrong, for a reader."""
        source = _source(_function(self.target))
        body, at = source.body, self._place(source)
        start = body.rfind("\n", 0, at) + 1
        end = body.find("\n", at + len(self.old))
        end = end if end >= 0 else len(body)
        wrong = body[start:at] + self.new + body[at + len(self.old) : end]
        return inspect.cleandoc(body[start:end]), inspect.cleandoc(wrong)

    def _place(self, source: "_Source") -> int:
        """Position of the text in the function's source, its docstring left aside."""
        places = [at for at in _positions(source.body, self.old) if at not in source.docstring]
        if len(places) != 1 or self.old == self.new:
            raise PlantingError(
                f"{self.old!r} must stand exactly once in {self.target} (and differ from what "
                f"replaces it), but stands there {len(places)} times"
            )
        return places[0]


@dataclass(frozen=True)
class _Source:
    """A function's source, and what stands around it in its module's statement.

    Attributes:
        body: the function's lines, its decorators first.
        docstring: the positions in them that are its docstring's.
        before: lines of the statement before them, such as those of the function's class.
        after: lines of the statement after them.
        outer: number of the module's lines before the statement.
    """

    body: str
    docstring: range
    before: str
    after: str
    outer: int


@contextmanager
def planted(*edits: Edit) -> Iterator[None]:
    """Run with these mistakes in the code; the right code is back at the end, come what may.

    Raises:
        PlantingError: an edit does not fit, or two of them change one function.
    """
    codes = [(_function(edit.target), edit.code()) for edit in edits]
    if len({id(function) for function, _ in codes}) < len(codes):
        raise PlantingError("edits must be of different functions: join those of one function")
    with ExitStack() as undo:
        if any(edit.target.startswith("verification.") for edit in edits):
            undo.enter_context(forgotten())
        for function, wrong in codes:
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = wrong
        yield


def _source(function: FunctionType) -> _Source:
    """The function's source as its file has it now."""
    name, first = function.__code__.co_filename, function.__code__.co_firstlineno
    linecache.checkcache(name)
    lines = linecache.getlines(name, function.__globals__)
    if not lines:
        raise PlantingError(f"the source of {function.__qualname__} cannot be read")
    found = _functions("".join(lines)).get(first)
    if found is None or found[1].name != function.__code__.co_name:
        raise PlantingError("the source has changed since it was imported")
    outer, node = found
    assert outer.end_lineno is not None
    assert node.end_lineno is not None
    start, end = _first(outer) - 1, outer.end_lineno
    body = lines[first - 1 : node.end_lineno]
    docstring = range(0)
    if ast.get_docstring(node, clean=False) is not None:
        string = node.body[0]
        assert string.end_lineno is not None
        above = body[: string.lineno - first]
        through = body[: string.end_lineno - first + 1]
        docstring = range(sum(map(len, above)) + string.col_offset, sum(map(len, through)))
    before, after = lines[start : first - 1], lines[node.end_lineno : end]
    return _Source("".join(body), docstring, "".join(before), "".join(after), start)


@functools.lru_cache(maxsize=64)
def _functions(text: str) -> dict[int, tuple[ast.stmt, ast.FunctionDef]]:
    """Every function of a file by its first line, with the module's statement that it is in."""
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        raise PlantingError(f"the source cannot be read: {error}") from error
    return {
        _first(node): (outer, node)
        for outer in module.body
        for node in ast.walk(outer)
        if isinstance(node, ast.FunctionDef)
    }


def _first(node: ast.stmt) -> int:
    """Line on which a statement begins, its decorators included."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _positions(text: str, piece: str) -> Iterator[int]:
    """Wherever a piece of text stands, also where its copies overlap."""
    at = text.find(piece)
    while at >= 0:
        yield at
        at = text.find(piece, at + 1)


def _function(target: str) -> FunctionType:
    """The function that a dotted name stands for, without its decorators."""
    parts = target.split(".")
    member: object = None
    for length in range(len(parts) - 1, 0, -1):
        try:
            member = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            try:
                member = (
                    getattr(member, part)
                    if isinstance(member, ModuleType)
                    else inspect.getattr_static(member, part)
                )
            except AttributeError:
                raise PlantingError(f"there is no {target}: no {part} in {member!r}") from None
        break
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    elif isinstance(member, staticmethod | classmethod):
        member = member.__func__
    member = inspect.unwrap(member) if callable(member) else member
    if not isinstance(member, FunctionType):
        raise PlantingError(f"{target} is no function written in Python, but {member!r}")
    return member


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)
