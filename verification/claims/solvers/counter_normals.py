"""Normals by counter: every number is a function of its index.

Number q of row k is sqrt(-2 log u) times cosine or sine of an angle, of the words that
Philox4x64-10 gives for (key, k, q): independent standard normals. They do not depend on
which rows and groups are drawn together, nor on whether numpy or C draws.
"""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ctrl import compiled_normals
from ctrl.counter_normals import key_of
from verification.claim import Check, Sampled, Setting, pathwise, sampled, stated
from verification.closed_form import counter_normals as closed
from verification.problems.counter_normals import Array, drawn

SOURCE = "Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; Box & Muller 1958"

KINDS = ((np.dtype(np.float32), torch.float32), (np.dtype(np.float64), torch.float64))
ROWS, GROUPS, ROW, GROUP = 3, 4, 2, 5


def compiled(dtype: np.dtype, key: Array, rows: int, groups: int, row: int, group: int) -> Array:
    """The same by C; by numpy where there is no compiler."""
    library = compiled_normals.build()
    if library is None:
        return drawn(dtype, key, rows, groups, row, group)
    out = np.empty((rows, 256 * groups), dtype)
    scales = np.ones(rows)
    compiled_normals.CompiledRows(library, out, key, row, group, scales, piece=3).draw_all()
    return out


def _law(setting: Setting) -> Iterator[Sampled]:
    """Moments, and correlations of what must be independent."""

    def batch(name: str, k: int) -> Tensor:  # [rows, groups, 2, 128]
        key = key_of(setting.seed, name, k)
        numbers = drawn(np.dtype(np.float32), key, 8, 16, 0, 0).astype(np.float64)
        return torch.from_numpy(numbers).view(8, 16, 2, 128)

    def batches(name: str, function: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        return (function(batch(name, k)).flatten() for k in count())

    squares, fourths = batches("2", lambda z: z**2), batches("4", lambda z: z**4 / 3)
    yield sampled("second moment", squares, 1.0, variance=2.1)
    yield sampled("fourth moment, over 3", fourths, 1.0, variance=11.5)
    independent = {
        "mean": lambda z: z,
        "the two of a pair": lambda z: z[:, :, 0] * z[:, :, 1],
        "squares of a pair": lambda z: (z[:, :, 0] ** 2 - 1) * (z[:, :, 1] ** 2 - 1) / 2,
        "neighbours": lambda z: z[..., :-1:2] * z[..., 1::2],
        "two groups": lambda z: z[:, ::2] * z[:, 1::2],
        "two rows": lambda z: z[::2] * z[1::2],
    }
    for name, function in independent.items():
        yield sampled(name, batches(name, function), 0.0, variance=1.1, scale=1.0)

    def keys(k: int) -> Tensor:
        return (batch("key", 2 * k) * batch("key", 2 * k + 1)).flatten()

    yield sampled("two keys", (keys(k) for k in count()), 0.0, variance=1.1, scale=1.0)


def checks(setting: Setting) -> Iterator[Check | Sampled]:
    """Number by number in both precisions, then pieces, then moments."""
    key = key_of(setting.seed, "claim")
    names = tuple(int(word) for word in key)
    for dtype, precision in KINDS:
        bits, label = 8 * dtype.itemsize, str(dtype)
        whole = drawn(dtype, key, ROWS, GROUPS, ROW, GROUP)
        want = np.array(
            [
                np.concatenate(
                    [
                        closed.group_of_normals(names, ROW + k, GROUP + g, bits)
                        for g in range(GROUPS)
                    ]
                )
                for k in range(ROWS)
            ]
        )
        # squares: where u is near 1 the root magnifies what is rounded in it
        got, exact = (x.astype(np.float64) * np.abs(x).astype(np.float64) for x in (whole, want))
        check = pathwise(f"signed squares, {label}", got, exact)
        yield stated(check, precision=precision, units=2.0)
        parts = [
            np.concatenate(
                [drawn(dtype, key, 1, n, ROW + k, GROUP + g) for g, n in ((0, 1), (1, 3))], axis=1
            )
            for k in range(ROWS)
        ]
        yield pathwise(f"in pieces, {label}", np.concatenate(parts), whole)
        by_c = compiled(dtype, key, ROWS, GROUPS, ROW, GROUP)
        yield pathwise(f"by C, {label}", by_c.astype(np.float64), whole.astype(np.float64))
    yield from _law(setting)


MISTAKES = """
ctrl.counter_normals._radius
    log u for 2 log u | -2 * math.log(2) => -math.log(2)
    logarithm cut short | range(_LOG[bits]) => range(_LOG[bits] - 4)
    radius without the root | np.sqrt(radius, out=radius) => radius
    half of the plane | words << (bits - 1) => 0 * words
ctrl.counter_normals._exchange_where_odd
    quarter of the plane | mask &= first ^ second => mask &= 0 * first
ctrl.counter_normals._normals
    radius and angle of the same words | polar(*halves) => polar(halves[0], halves[0])
    cosine twice | [radius * cosine, radius * sine] => [radius * cosine, radius * cosine]
ctrl.counter_normals.fill
    row left out of the counter | [first, row, 0, 0] => [first, 0, 0, 0]
    group within the batch | first = group * ( => first = 0 * (
    one noise for all rows | 2**64 - words // 4 => 2**256 - words // 4
    rows that overlap | 2**64 - words // 4 => 1 - words // 4
    row and group exchanged | counter=np.array([first, row, 0, 0] => counter=np.array([row, first, 0, 0]
"""
