"""Plain data out of a pickle, without calling anything that the pickle names.

A pickle is a program: it may call whatever it can name. Here it can name only the four functions
by which numpy writes an array, and what answers to those names are stand-ins of our own that do
nothing but check their arguments; numpy itself is not called before all is read. What remains is
dictionaries, lists, numbers, strings and arrays of whole numbers.

Sources     The Python library's ``pickle``, "Restricting Globals". numpy's ``ndarray.__reduce__``
            and ``dtype.__reduce__``, whose arguments are read here.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

WHOLE_NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")  # numpy's codes: kind and bytes


class ForbiddenGlobal(ValueError):
    """A pickle asks for something to call that no plain array needs."""


def read_plain(path: Path) -> Any:
    """Dictionaries, lists, numbers, strings (Python 2's as bytes) and arrays from a pickle.

    Nothing that the file names is imported or called.

    Raises:
        ForbiddenGlobal: the file names anything but what numpy's plain arrays need.
        ValueError: it is no pickle, is truncated, goes on after its end, or holds an array of
            anything but whole numbers.
    """
    content = path.read_bytes()
    try:
        _require_ordinary_memo(content)
        stream = io.BytesIO(content)
        value = _with_arrays(_PlainUnpickler(stream, path).load())
    except ForbiddenGlobal:
        raise
    except Exception as error:  # foreign bytes make an unpickler raise anything
        raise ValueError(
            f"{path} is not a whole pickle of plain arrays ({type(error).__name__}: {error}); "
            "nothing in it was executed. Download it again"
        ) from error
    if left := len(content) - stream.tell():
        raise ValueError(f"{path} goes on for {left} bytes after its end; download it again")
    return value


def _require_ordinary_memo(content: bytes) -> None:
    """Refuse places in the memo that no writer counts up to: they alone would fill the memory."""
    for count, (code, argument, _) in enumerate(pickletools.genops(content)):
        stores = code.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if stores and (argument is None or argument > count + 1):
            raise ValueError(f"operation {count} stores in place {argument} of its memo")


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler for which only numpy's plain arrays have names."""

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        """A stand-in for what the pickle names; called by the library for every name."""
        stand_in = {
            ("numpy.core.multiarray", "_reconstruct"): _array,
            ("numpy._core.multiarray", "_reconstruct"): _array,
            ("numpy", "ndarray"): _ndarray,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): _encode,
        }.get((module, name))
        if stand_in is None:
            raise ForbiddenGlobal(
                f"{self._path} asks for {module}.{name}, which plain batches do not need; it was "
                "not executed. Do not trust this file: take the original, or the parquet files"
            )
        return _StandIn(stand_in)

    def persistent_load(self, pid: Any, /) -> Any:
        """Refused: a batch stands for itself."""
        raise ForbiddenGlobal(
            f"{self._path} refers to an object outside of it (persistent id {pid!r}), which plain "
            "batches do not; take the original, or the parquet files"
        )


class _StandIn:
    """What a pickle may call, and cannot change."""

    __slots__ = ("_call",)

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function has no state")


class _Dtype:
    """A dtype as pickled: its code, and its byte order once its state is read."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order not in ("<", "|", ">") or any(state[2:5]):
            raise ValueError(f"dtype {self.code} has the state {state!r:.60}")
        self.code = order + self.code


class _Array:
    """An array as pickled: shape, dtype and bytes, made one only when all is read."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: tuple[tuple[int, ...], str, bool, bytes] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        plain = isinstance(dtype, _Dtype) and isinstance(content, bytes) and type(shape) is tuple
        if not plain or any(type(length) is not int or length < 0 for length in shape):
            raise ValueError("an array must hold bytes, have a plain dtype and a shape of lengths")
        if math.prod(shape) * int(dtype.code[-1]) != len(content):
            raise ValueError(f"an array of shape {shape} cannot hold {len(content)} bytes")
        self.state = (shape, dtype.code, bool(fortran), content)

    def made(self) -> np.ndarray:
        if self.state is None:
            raise ValueError("an array has no content")
        shape, code, fortran, content = self.state
        return np.frombuffer(content, code).reshape(shape, order="F" if fortran else "C")


def _array(kind: Any, *_: Any) -> _Array:
    if not isinstance(kind, _StandIn) or kind._call is not _ndarray:
        raise ValueError("an array must be a numpy.ndarray")
    return _Array()


def _ndarray(*_: Any) -> None:
    raise ValueError("numpy.ndarray must not be called")


def _dtype(code: Any, *_: Any) -> _Dtype:
    if _text(code) not in WHOLE_NUMBERS:
        raise ValueError(f"arrays must hold whole numbers, not dtype {code!r}")
    return _Dtype(_text(code))


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or _text(encoding) != "latin1":
        raise ValueError("only a string is encoded, and only as latin1")
    return text.encode("latin1")


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _with_arrays(value: Any) -> Any:
    """A batch's dictionary with its arrays made; only the values of the outermost one can be."""
    if isinstance(value, dict):
        return {
            key: item.made() if isinstance(item, _Array) else item for key, item in value.items()
        }
    return value.made() if isinstance(value, _Array) else value
