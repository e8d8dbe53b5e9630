"""Normals that are functions of their index: the law, the formula, and who draws them.

The law needs no statistics: where Philox's words are independent and uniform, Box and Muller's
pairs are independent normals, but for the grid on which 31 or 52 bits put the radius, and 24 or 52
the angle. What is checked is the formula, number by number, from integers on; then what a number
does not depend on; and the moments, in case the words are not what they are said to be.
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ctrl
from ctrl import compiled_normals
from ctrl.counter_normals import fill, key_of
from ctrl.noise import PathStreams
from verification.claim import Check, Sampled, Setting, claim, pathwise, sampled, stated, wrong
from verification.closed_form import counter_normals as closed

FILL, RADIUS = "ctrl.counter_normals.fill", "ctrl.counter_normals._radius"
KINDS = ((np.dtype(np.float32), torch.float32), (np.dtype(np.float64), torch.float64))
ROWS, GROUPS, ROW, GROUP = 3, 4, 2, 5


Array = npt.NDArray[Any]


def drawn(dtype: np.dtype, key: Array, rows: int, groups: int, row: int, group: int) -> Array:
    """So many rows from ``row`` on, so many groups from ``group`` on, by numpy."""
    out = np.empty((rows, 256 * groups), dtype)
    fill(out, key, row=row, group=group, scales=np.ones(rows))
    return out


def compiled(dtype: np.dtype, key: Array, rows: int, groups: int, row: int, group: int) -> Array:
    """The same by C; by numpy where there is no compiler."""
    library = compiled_normals.build()
    if library is None:
        return drawn(dtype, key, rows, groups, row, group)
    out = np.empty((rows, 256 * groups), dtype)
    scales = np.ones(rows)
    compiled_normals.CompiledRows(library, out, key, row, group, scales, piece=3).draw_all()
    return out


@claim(
    statement="""
        Number q of row k is sqrt(-2 log u) times cosine or sine of an angle, of the words that
        Philox4x64-10 gives for (key, k, q): independent standard normals. They do not depend on
        which rows and groups are drawn together, nor on whether numpy or C draws.
        """,
    source="Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; Box & Muller 1958",
    wrongs=[
        wrong("log u for 2 log u", RADIUS, "-2 * math.log(2)", "-math.log(2)"),
        wrong("logarithm cut short", RADIUS, "range(_LOG[bits])", "range(_LOG[bits] - 4)"),
        wrong("radius without the root", RADIUS, "np.sqrt(radius, out=radius)", "radius"),
        wrong("half of the plane", RADIUS, "words << (bits - 1)", "0 * words"),
        wrong(
            "quarter of the plane", "ctrl.counter_normals._exchange_where_odd",
            "mask &= first ^ second", "mask &= 0 * first",
        ),
        wrong(
            "radius and angle of the same words", "ctrl.counter_normals._normals",
            "polar(*halves)", "polar(halves[0], halves[0])",
        ),
        wrong(
            "cosine twice", "ctrl.counter_normals._normals",
            "[radius * cosine, radius * sine]", "[radius * cosine, radius * cosine]",
        ),
        wrong("row left out of the counter", FILL, "[first, row, 0, 0]", "[first, 0, 0, 0]"),
        wrong("group within the batch", FILL, "first = group * (", "first = 0 * ("),
        wrong("one noise for all rows", FILL, "2**64 - words // 4", "2**256 - words // 4"),
        wrong("rows that overlap", FILL, "2**64 - words // 4", "1 - words // 4"),
        wrong(
            "row and group exchanged", FILL, "counter=np.array([first, row, 0, 0]",
            "counter=np.array([row, first, 0, 0]",
        ),
    ],
)  # fmt: skip
def counter_normals(setting: Setting) -> Iterator[Check | Sampled]:
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


WIDTHS = "ctrl.noise_sources.Streamed.__init__"
PATHS, STEPS = 768, 5  # of dimension 2: six groups of 256 numbers


@claim(
    statement="""
        simulate(..., workers=n) gives the same bits for every n and every batch, whether rows are
        drawn into the paths' memory ahead of time (batches of whole groups) or beside it.
        """,
    source="by construction: every number is a function of its index",
    wrongs=[
        wrong(
            "numbers local to a batch", "ctrl.noise.PathStreams._numbers",
            "range(self.first_path * width, (self.first_path + paths) * width)",
            "range(paths * width)",
        ),
        wrong(
            "a batch's first group forgotten", "ctrl.noise.PathStreams.drawn_into",
            "group=group,", "group=0,",
        ),
        wrong(
            "widths left out ahead of time", "ctrl.noise.PathStreams.drawn_into",
            "scales=widths,", "",
        ),
        wrong(
            "rows taken in the order of their chunk's memory", "ctrl.drawn_ahead.rows",
            "enumerate(out)", "enumerate(out[::-1])",
        ),
        wrong("variance for width", WIDTHS, "math.sqrt(h)", "h"),
    ],
)  # fmt: skip
def workers_and_batches(setting: Setting) -> Iterator[Check]:
    """Batches of whole groups and not, one worker and two, in memory and beside it."""
    nodes = setting.tensor([0.0, 0.0625, 0.3125, 0.375, 0.4375, 1.4375])  # roots of steps are exact
    sde = ctrl.ControlledSDE(lambda t, x, a: a - 0.4 * x, lambda t, x: 0.7)
    problem, grid = ctrl.ControlProblem(sde, 1.4375), ctrl.TimeGrid(nodes)
    policy = ctrl.GaussianPolicy(lambda t, x: 0.1 * x, std=0.5)

    def rolled(split: tuple[int, ...], workers: int, differentiable: bool) -> tuple[Tensor, ...]:
        first, parts = 0, []
        for paths in split:
            streams = PathStreams(setting.seed, ("workers",), first)
            start = setting.tensor([[0.8, -0.3]]).repeat(paths, 1)
            parts.append(
                ctrl.simulate(
                    problem, policy, start, grid, generator=streams, workers=workers,
                    differentiable=differentiable,
                )
            )  # fmt: skip
            first += paths
        return tuple(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("states", "actions", "increments")
        )

    dtype, h = np.dtype(str(setting.dtype).removeprefix("torch.")), nodes.diff()[:, None]
    numbers = [
        torch.from_numpy(
            drawn(dtype, key_of(setting.seed, "workers", kind, str(setting.dtype)), STEPS, 6, 0, 0)
        ).view(STEPS, PATHS, 2)
        for kind in ("increments", "actions")
    ]
    increments, normals = (each.movedim(0, 1).to(setting.device) for each in numbers)
    increments = increments * h.sqrt()
    x, states, actions = setting.tensor([[0.8, -0.3]]).repeat(PATHS, 1), [], []
    for k in range(STEPS):
        states.append(x)
        actions.append(0.1 * x + 0.5 * normals[:, k])
        x = x + (actions[k] - 0.4 * x) * h[k] + 0.7 * increments[:, k]
    want = torch.stack([*states, x], dim=1), torch.stack(actions, dim=1), increments
    for split in ((PATHS,), (256, 512), (100, 157, 211, 300)):
        for workers, graph in ((1, False), (2, False), (1, True)):
            label = f"{len(split)} batches, {workers} workers{', graph' if graph else ''}"
            names = ("states", "actions", "increments")
            for name, part, right in zip(names, rolled(split, workers, graph), want, strict=True):
                yield stated(pathwise(f"{name}, {label}", part.detach(), right), units=4.0)
