"""Where the random numbers of a roll-out come from: the caller, a generator, streams, nowhere."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ctrl.devices import as_like, require, require_generator
from ctrl.drawn_ahead import Drawing, Threads
from ctrl.noise import Noise, PathStreams, fill_increments, steps_at_once
from ctrl.paths import TimeGrid
from ctrl.policy import Policy
from ctrl.sde import ControlledSDE
from ctrl.solvers import BlackBox, Solver


class Prescribed:
    """Noise that the caller brings."""

    shows_noise = True

    def __init__(self, noise: Noise, shape: tuple[int, ...], start: Tensor, grid: TimeGrid) -> None:
        if noise.increments.shape != shape:
            raise ValueError(
                f"increments must be {list(shape)} to fit start and grid, got "
                f"{list(noise.increments.shape)}"
            )
        if noise.step_sizes is not None:
            h, nodes = as_like(noise.step_sizes, grid.nodes), grid.nodes
            rounded = 2 * torch.finfo(nodes.dtype).eps * nodes.abs().max()  # of a node each
            require(
                ((h - grid.steps).abs() <= 1e-5 * h.max() + rounded).all(),
                lambda: ValueError(
                    "noise must be made for the steps of the grid, or its variance is that of "
                    f"others: those begin with {grid.steps[0]:g}, got step_sizes that begin with "
                    f"{h[0]:g}; make it of grid.steps"
                ),
            )
        for name in ("increments", "actions", "weights", "exits"):
            value = getattr(noise, name)
            if value is not None and (value.dtype != start.dtype or value.device != start.device):
                raise ValueError(
                    f"{name} must be {start.dtype} on {start.device}, as start is, got "
                    f"{value.dtype} on {value.device}"
                )
        self.noise, self.weights, self.shape = noise, noise.weights, shape

    def for_exits(self, k: int) -> Float[Tensor, " paths"]:
        """Uniform numbers for the exits of step k."""
        if self.noise.exits is None:
            raise ValueError(
                "noise must hold exits: whether a path crosses a wall between two nodes is drawn; "
                "stopping=AtNodes() needs none"
            )
        return self.noise.exits[:, k]

    def increment(self, k: int, h: float, into: Tensor | None) -> Tensor:
        """W(t + h) - W(t) of step k, in ``into`` if that is given."""
        increment = self.noise.increments[:, k]
        return increment if into is None else into.copy_(increment)

    def for_action(self, k: int, mean: Tensor) -> Tensor:
        """Standard normals for the actions of step k."""
        if self.noise.actions is None:
            raise ValueError("noise must hold actions: the policy draws its actions")
        if self.noise.actions.shape[2:] != mean.shape[1:]:
            raise ValueError(
                f"noise.actions must be [paths, steps, *{list(mean.shape[1:])}] to fit the "
                f"policy's actions, got {list(self.noise.actions.shape)}"
            )
        return self.noise.actions[:, k]

    def for_jumps(self, k: int, kinds: int, like: Tensor) -> Tensor:
        """Standard normals for the numbers of jumps of step k."""
        jumps = self.noise.jumps
        if jumps is None or jumps.shape[2] != kinds or jumps.dtype != like.dtype:
            raise ValueError(
                f"noise.jumps must be [paths, steps, {kinds}] in {like.dtype}: the sde jumps"
            )
        return jumps[:, k]

    def for_marks(self, k: int, kind: int, j: int, begin: int, dim: int, like: Tensor) -> Tensor:
        """Standard normals for the marks of the j-th jumps of step k."""
        if dim == 0:
            return like.new_empty(len(like), 0)
        marks = self.noise.marks
        if marks is None or marks.shape[2] <= j or marks.shape[3] < begin + dim:
            raise ValueError(
                f"noise.marks must be [paths, steps, {j + 1} or more, {begin + dim} or more]: "
                f"step {k} has {j + 1} jumps on some path"
            )
        return marks[:, k, j, begin : begin + dim]


class Drawn:
    """Noise from a generator, drawn as it is needed."""

    weights = None
    shows_noise = True

    def __init__(
        self, generator: Generator, shape: tuple[int, ...], start: Tensor, grid: TimeGrid
    ) -> None:
        require_generator(generator, start.device, "start")
        self.generator, self.shape, self.like = generator, shape, start
        self.at_once = steps_at_once(start.new_empty(shape[:1] + shape[2:]))
        self.widths = grid.steps.sqrt().tolist()
        self.kept: Tensor | None = None  # where increments stay, time-major, if they do
        self.block = start  # the steps that were drawn last

    def increment(self, k: int, h: float, into: Tensor | None) -> Tensor:
        """W(t + h) - W(t) of step k; on the CPU in ``into`` if that is given."""
        row = self.shape[:1] + self.shape[2:]
        if self.at_once == 1:
            into = self.like.new_empty(row) if into is None else into
            fill_increments(into.unsqueeze(0), self.widths[k : k + 1], self.generator)
            return into
        if k % self.at_once == 0:
            widths = self.widths[k : k + self.at_once]
            many = len(widths)
            kept = self.kept
            self.block = self.like.new_empty(many, *row) if kept is None else kept[k : k + many]
            fill_increments(self.block, widths, self.generator)
        return self.block[k % self.at_once]

    def for_exits(self, k: int) -> Float[Tensor, " paths"]:
        """Uniform numbers for the exits of step k."""
        return self.like.new_empty(self.shape[0]).uniform_(generator=self.generator)

    def for_action(self, k: int, mean: Tensor) -> Tensor:
        """Standard normals for the actions of step k."""
        return torch.empty_like(mean).normal_(generator=self.generator)

    def for_jumps(self, k: int, kinds: int, like: Tensor) -> Tensor:
        """Standard normals for the numbers of jumps of step k."""
        return like.new_empty(len(like), kinds).normal_(generator=self.generator)

    def for_marks(self, k: int, kind: int, j: int, begin: int, dim: int, like: Tensor) -> Tensor:
        """Standard normals for the marks of the j-th jumps of step k."""
        return like.new_empty(len(like), dim).normal_(generator=self.generator)


class Streamed:
    """Noise that belongs to paths, whatever batch they are in."""

    weights = None
    shows_noise = True

    def __init__(
        self,
        streams: PathStreams,
        shape: tuple[int, ...],
        start: Tensor,
        grid: TimeGrid,
        by: Threads,
    ) -> None:
        self.streams, self.shape, self.by = streams, shape, by
        self.like = start.new_empty(shape[0], *shape[2:])
        self.widths = [math.sqrt(h) for h in grid.steps.tolist()]
        self.ahead: Drawing | None = None  # of increments, in memory that the roll-out has
        self.brownian: Iterator[Tensor] | None = None  # of increments, where there is none
        self.interior = streams.rows("interior", shape[0], self.like)
        self.others = dict[tuple[str | int, ...], tuple[int, Iterator[Tensor]]]()
        self.drawn: Iterator[Tensor] | None = None
        self.leaving = streams.rows("exits", shape[0], start.new_empty(shape[0]))

    def for_exits(self, k: int) -> Float[Tensor, " paths"]:
        """Uniform numbers for the exits of step k."""
        return torch.special.ndtr(next(self.leaving))

    def draw_into(self, memory: Tensor) -> None:
        """Draw all increments there, time-major, before they are asked for; where that can be."""
        self.ahead = self.streams.drawn_into(memory, "increments", widths=self.widths, by=self.by)

    def increment(self, k: int, h: float, into: Tensor | None) -> Tensor:
        """W(t + h) - W(t) of step k, in ``into`` if that is given."""
        if self.ahead is not None:
            assert into is not None
            self.ahead.wait_for(k)
            return into
        if self.brownian is None:
            self.brownian = self.streams.rows(
                "increments", self.shape[0], self.like, widths=self.widths, by=self.by
            )
        row = next(self.brownian)
        return row.clone() if into is None else into.copy_(row)  # a graph may hold on to it

    def for_action(self, k: int, mean: Tensor) -> Tensor:
        """Standard normals for the actions of step k."""
        if self.drawn is None:
            one = [1.0] * len(self.widths)
            self.drawn = self.streams.rows("actions", len(mean), mean, widths=one, by=self.by)
        return next(self.drawn).clone()  # a graph or the action may hold on to it

    def for_jumps(self, k: int, kinds: int, like: Tensor) -> Tensor:
        """Standard normals for the numbers of jumps of step k."""
        return self._row(("jumps",), k, kinds, like)

    def for_marks(self, k: int, kind: int, j: int, begin: int, dim: int, like: Tensor) -> Tensor:
        """Standard normals for the marks of the j-th jumps of step k."""
        if dim == 0:
            return like.new_empty(len(like), 0)
        return self._row(("marks", kind, j), k, dim, like)

    def _row(self, name: tuple[str | int, ...], k: int, width: int, like: Tensor) -> Tensor:
        """Row k of a stream of its own, whatever rows were asked for before."""
        if name not in self.others:
            written = "-".join(str(part) for part in name)
            rows = self.streams.rows(written, len(like), like.new_empty(len(like), width))
            self.others[name] = (0, rows)
        taken, rows = self.others[name]
        for _ in range(k - taken):  # steps in which no path of this batch needed it
            next(rows)
        self.others[name] = (k + 1, rows)
        return next(rows).clone()


class Silent:
    """No Brownian noise: the simulator has its own."""

    weights = None
    shows_noise = False
    shape = ()

    def __init__(self, generator: Generator | PathStreams | None, by: Threads) -> None:
        self.generator, self.by = generator, by
        self.drawn: Iterator[Tensor] | None = None

    def for_exits(self, k: int) -> Tensor:
        """None: the law of what a black box does between two nodes is not known."""
        raise AssertionError("a BlackBox stops at nodes alone")

    def increment(self, k: int, h: float, into: Tensor | None) -> Tensor:
        """Nothing."""
        return torch.empty(0)

    def for_action(self, k: int, mean: Tensor) -> Tensor:
        """Standard normals for the actions of step k."""
        if isinstance(self.generator, PathStreams):
            if self.drawn is None:
                self.drawn = self.generator.rows("actions", len(mean), mean, by=self.by)
            return next(self.drawn).clone()
        assert self.generator is not None
        require_generator(self.generator, mean.device, "the action")
        return torch.empty_like(mean).normal_(generator=self.generator)


Source = Prescribed | Drawn | Streamed | Silent


def source_of(
    sde: ControlledSDE,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    noise: Noise | None,
    generator: Generator | PathStreams | None,
    by: Threads,
) -> Source:
    """The source that fits what the caller gave, refused by name where nothing does.

    Args:
        sde: whose noise is needed.
        policy: which may draw its actions.
        start: states at the first node; the noise has their dtype and device.
        grid: the nodes.
        solver: a ``BlackBox`` has its own noise.
        noise: explicit numbers, or
        generator: to draw them from.
        by: the threads that draw streams.

    Raises:
        ValueError: both or neither of noise and generator are given, or they do not fit.
        TypeError: one of them is not what its name says.
    """
    if noise is not None and not isinstance(noise, Noise):
        raise TypeError(
            f"noise must be a Noise, got {type(noise).__name__}; ctrl.Noise(increments) makes one"
        )
    if generator is not None and not isinstance(generator, Generator | PathStreams):
        raise TypeError(
            f"generator must be a torch.Generator or noise.PathStreams, got {generator!r}; of a "
            "seed: torch.Generator().manual_seed(0)"
        )
    if isinstance(solver, BlackBox):
        if noise is not None:
            raise ValueError("noise must be None: a BlackBox brings its own; give a generator")
        if generator is None and policy.is_random:
            raise ValueError("generator must be given: the policy draws its actions")
        return Silent(generator, by)
    shape = (len(start), len(grid.steps), *sde.noise_shape(tuple(start.shape[1:])))
    if noise is not None and generator is None:
        return Prescribed(noise, shape, start, grid)
    if noise is not None or generator is None:
        what = "neither" if generator is None else "both"
        raise ValueError(
            f"give exactly one of noise and generator, got {what}; a generator is "
            "torch.Generator().manual_seed(0), say"
        )
    if isinstance(generator, PathStreams):
        return Streamed(generator, shape, start, grid, by)
    return Drawn(generator, shape, start, grid)
