"""Standard normals by counter: number q of row k is a function of (key, k, q) and of nothing else.

    bits        Philox4x64-10 of the key and the counter: 256 random bits a call, no state ([S11])
    normals     sqrt(-2 log u) (cos a, sin a), u uniform on (0, 1], a on the circle ([BM58])

So rows may be drawn in any order, in pieces, by any number of threads. The numbers are also the
same, bit for bit, on every processor and with or without a compiler: they are made of operations
that IEEE 754 rounds correctly (+, -, *, /, square root, and integers), in one order, the logarithm,
sine and cosine by their series. What is left of these is below half a unit in the last place.

A row is made of groups of 256 numbers, 128 pairs: group g of row k takes the words of the calls
with counter (n, k, 0, 0), n = 1 + g c, ..., g c + c, where c = 32 in float32, 64 in float64. Half
of its words (of 32 or 64 bits) are radii, half are angles. ``numpy.random.Philox`` draws the
words, or C that does all at once (``ctrl.compiled_normals``), where there is a compiler.

Sources  [S11] Salmon, Moraes, Dror & Shaw 2011, Parallel random numbers: as easy as 1, 2, 3.
         [BM58] Box & Muller 1958, A note on the generation of random normal deviates.
"""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP = 256  # numbers that are drawn together
_WORDS = {np.dtype(np.float32): GROUP // 2, np.dtype(np.float64): GROUP}  # 64-bit words of a group

Array = npt.NDArray[Any]


def key_of(*name: object) -> npt.NDArray[np.uint64]:
    """Key of the rows with this name: the first 128 bits of its SHA-256."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def fill(out: Array, key: npt.NDArray[np.uint64], *, row: int, group: int, scales: Array) -> None:
    """Consecutive groups of consecutive rows, by numpy.

    Args:
        out: where to, [rows, numbers] in float32 or float64, a multiple of 256 numbers.
        key: of ``key_of``.
        row: index of the first row.
        group: index of the first group.
        scales: what each row is multiplied by, in the precision of ``out``.
    """
    words = _WORDS[out.dtype] * (out.shape[1] // GROUP)
    first = group * (_WORDS[out.dtype] // 4)
    bits = np.random.Philox(key=key, counter=np.array([first, row, 0, 0], dtype=np.uint64))
    drawn = np.empty((len(out), words), dtype=np.uint64)
    for part in drawn:
        part[:] = bits.random_raw(words)
        bits.advance(2**64 - words // 4)  # to the same groups of the next row
    normals = _normals(drawn, out.dtype).reshape(out.shape)
    np.multiply(normals, scales.astype(out.dtype)[:, None], out=out)


def _normals(words: npt.NDArray[np.uint64], dtype: npt.DTypeLike) -> Array:
    """Groups [groups, 2, 128] of their words."""
    polar = _polar32 if dtype == np.float32 else _polar64
    numbers: Array = words.view(np.uint32) if dtype == np.float32 else words
    halves = np.ascontiguousarray(numbers.reshape(-1, 2, GROUP // 2).swapaxes(0, 1))
    radius, cosine, sine = polar(*halves)
    _exchange_where_odd(halves[1], cosine, sine)
    return np.stack([radius * cosine, radius * sine], axis=1)


def _exchange_where_odd(words: Array, one: Array, other: Array) -> None:
    """Exchange numbers in place; by their bits, which is faster than a choice."""
    mask = np.negative((words & 1).view(f"i{words.itemsize}"))
    first, second = one.view(mask.dtype), other.view(mask.dtype)
    mask &= first ^ second
    first ^= mask
    second ^= mask


# The logarithm is that of 2^e m, m within [1/sqrt 2, sqrt 2]: log m = 2 artanh((m - 1) / (m + 1)).
# The angle is within pi/4 of an axis: the lowest bits choose which, and which end of it.
# Each series ends where its next term is below half a unit in the last place of the first.
_LOG = {32: 5, 64: 11}
_SINE = {32: 5, 64: 9}
_COSINE = {32: 6, 64: 9}


def _horner(x: Array, coefficients: list[float]) -> Array:
    """Sum of coefficients[j] x^j, from the last on."""
    kind = x.dtype.type
    value = x * kind(coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        value += kind(coefficient)
        value *= x
    value += kind(coefficients[0])
    return value


def _radius(mantissa: Array, exponent: Array, words: Array, bits: int) -> Array:
    """Square root of -2 log (2^exponent mantissa), negative where the word is odd."""
    kind = mantissa.dtype.type
    s = mantissa - kind(1)
    mantissa += kind(1)
    s /= mantissa
    series = _horner(s * s, [1 / (2 * j + 1) for j in range(_LOG[bits])])
    s *= kind(4)
    series *= s
    radius = exponent.astype(kind)
    radius *= kind(-2 * math.log(2))
    radius -= series
    np.sqrt(radius, out=radius)
    signs = radius.view(words.dtype)
    signs ^= words << (bits - 1)
    return radius


def _axes(angle: Array, bits: int) -> tuple[Array, Array]:
    """Cosine and sine of angles up to pi/4."""
    square = angle * angle
    cosine = _horner(square, [(-1) ** j / math.factorial(2 * j) for j in range(_COSINE[bits])])
    sine = _horner(square, [(-1) ** j / math.factorial(2 * j + 1) for j in range(_SINE[bits])])
    sine *= angle
    return cosine, sine


def _polar32(radii: Array, angles: Array) -> tuple[Array, Array, Array]:
    """Radius with its sign, cosine and sine, of 31 and 24 bits."""
    u = (radii >> 1).view(np.int32).astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-31)
    bits = u.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> 23  # the bits of 1 / sqrt 2
    bits -= exponent << 23
    radius = _radius(u, exponent, radii, 32)
    angle = ((angles >> 8).view(np.int32) - np.int32(2**23)).astype(np.float32)
    angle += np.float32(0.5)
    angle *= np.float32(math.pi / 2 * 2.0**-24)
    return radius, *_axes(angle, 32)


def _polar64(radii: Array, angles: Array) -> tuple[Array, Array, Array]:
    """Radius with its sign, cosine and sine, of 52 bits each."""
    one = np.uint64(0x3FF0000000000000)  # the bits of 1.0
    u = ((radii >> 12) | one).view(np.float64)
    u -= 1.0
    u += 2.0**-53
    bits = u.view(np.int64)
    exponent = (bits - np.int64(0x3FE6A09E667F3BCD)) >> 52  # the bits of 1 / sqrt 2
    bits -= exponent << 52
    radius = _radius(u, exponent, radii, 64)
    angle = ((angles >> 12) | one).view(np.float64)
    angle -= 1.5
    angle += 2.0**-53
    angle *= math.pi / 2
    return radius, *_axes(angle, 64)
