"""Uniform grids over one or two state coordinates, and functions tabulated on them."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import require, sent

BOUNDARIES = ("reflecting", "periodic")


@dataclass(frozen=True)
class Axis:
    """Equally spaced nodes of one state coordinate.

    Attributes:
        low: first node, state.
        high: last node, state; of a periodic axis low + period, which is ``low`` again and has no
            node of its own.
        nodes: how many, at least 4.
        boundary: "reflecting" or "periodic".
    """

    low: float
    high: float
    nodes: int
    boundary: Literal["reflecting", "periodic"] = "reflecting"

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {BOUNDARIES}, got {self.boundary!r}")
        if isinstance(self.nodes, bool) or not isinstance(self.nodes, int) or self.nodes < 4:
            raise ValueError(f"nodes must be an integer, at least 4, got {self.nodes!r}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"low and high must be finite and low < high, got {self.low} and {self.high}"
            )

    @property
    def periodic(self) -> bool:
        """Whether ``high`` is ``low`` again."""
        return self.boundary == "periodic"

    @property
    def spacing(self) -> float:
        """Between neighbours, state."""
        return (self.high - self.low) / (self.nodes - (not self.periodic))

    def points(self) -> Float[Tensor, " nodes"]:
        """The nodes, float64."""
        return self.low + self.spacing * torch.arange(self.nodes, dtype=torch.float64)


def grid_points(axes: tuple[Axis, ...]) -> Float[Tensor, "points dim"]:
    """All combinations of the axes' nodes, the last axis fastest, float64."""
    mesh = torch.meshgrid(*(axis.points() for axis in axes), indexing="ij")
    return torch.stack([one.reshape(-1) for one in mesh], dim=-1)


def neighbours(axes: tuple[Axis, ...], move: tuple[int, ...]) -> Tensor:
    """Index of the point that is ``move`` nodes away from each point, [points].

    Around a periodic axis; mirrored at a reflecting wall, so that the function has slope 0 there.
    """
    along: list[Tensor] = []
    for axis, step in zip(axes, move, strict=True):
        index = torch.arange(axis.nodes) + step
        last = axis.nodes - 1
        index = index % axis.nodes if axis.periodic else last - (last - index.abs()).abs()
        along.append(index)
    index = along[0]
    for axis, more in zip(axes[1:], along[1:], strict=True):
        index = index.unsqueeze(-1) * axis.nodes + more
    return index.reshape(-1)


@dataclass(frozen=True, eq=False)
class GridFunction:
    """A function of (t, x), linear between the nodes of time and multilinear in the state.

    Its error is O(spacing^2); its gradient in x jumps at nodes and its second derivative is none.
    It takes states in any floating dtype and on any device, and answers in the same; ``to`` spares
    a copy of the table at every call.

    Attributes:
        axes: one for each coordinate of the state.
        times: at which it is tabulated, equally spaced; one time alone says that the function is
            the same at all times.
        table: its values, [times, *nodes of the axes, *event].
    """

    axes: tuple[Axis, ...]
    times: Float[Tensor, " times"]
    table: Float[Tensor, "times ..."]

    def __call__(self, t: Tensor, states: Float[Tensor, "paths dim"]) -> Float[Tensor, "paths ..."]:
        """At one time [] and the states [paths, dim]: [paths, *event].

        Raises:
            ValueError: a time or a state outside of the grid (periodic axes go around), or not
                finite; states of another shape or not floating.
        """
        if states.ndim != 2 or states.shape[1] != len(self.axes) or not states.is_floating_point():
            raise ValueError(
                f"states must be floating, [paths, {len(self.axes)}], as the grid has that many "
                f"axes; got {list(states.shape)} in {states.dtype}"
            )
        corners = [_between(axis, i, states[:, i]) for i, axis in enumerate(self.axes)]
        points = math.prod(axis.nodes for axis in self.axes)
        event = self.table.shape[1 + len(self.axes) :]
        table = sent(self.table, states.device).reshape(len(self.times) * points, -1)
        index, weight = _corners(corners, self.axes, states.device)
        if len(self.times) == 1:
            interpolated = _mixed(table, index, weight)
        else:
            k, share = self._between_times(t, states.device)
            before, after = (_mixed(table, index + i * points, weight) for i in (k, k + 1))
            interpolated = torch.lerp(before, after, share.to(before))
        return interpolated.to(states.dtype).reshape(len(states), *event)

    def to(self, device: torch.device | str) -> "GridFunction":
        """The same function with its table on a device."""
        return replace(self, table=sent(self.table, device))

    def at_time(self, t: Tensor) -> Float[Tensor, "..."]:
        """The table at one time [], linear between times: [*nodes of the axes, *event].

        Raises:
            ValueError: a time outside of the grid.
        """
        if len(self.times) == 1:
            return self.table[0]
        k, share = self._between_times(t, self.table.device)
        before, after = self.table.index_select(0, torch.stack([k, k + 1]))
        return torch.lerp(before, after, share.to(before))

    def _between_times(self, t: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Index of the time before t, and how far t is from it to the next, in [0, 1]."""
        times = self.times.tolist()
        first, last, slack = times[0], times[-1], 1e-6 * (times[-1] - times[0])  # for float32
        now = sent(torch.as_tensor(t), device, torch.float64)

        def refused() -> ValueError:
            return ValueError(f"t must be one time in [{first:g}, {last:g}], got {t}")

        if now.ndim:
            raise refused()
        require((now >= first - slack) & (now <= last + slack), refused)
        position = (now.clamp(first, last) - first) / (times[1] - times[0])
        k = position.detach().long().clamp(0, len(times) - 2)
        return k, position - k


def _between(axis: Axis, i: int, x: Float[Tensor, " paths"]) -> tuple[Tensor, Tensor, Tensor]:
    """The nodes to the left and to the right, and how far x is from the left one, in [0, 1]."""
    position = (x.to(torch.float64) - axis.low) / axis.spacing
    require(
        torch.isfinite(position).all(),
        lambda: ValueError(f"states must be finite, coordinate {i} is not"),
    )
    if axis.periodic:
        left = position.detach().floor()
        return left.long() % axis.nodes, (left.long() + 1) % axis.nodes, position - left
    slack = 1e-6 * axis.nodes  # a state may have been float32
    require(
        ~((position < -slack) | (position > axis.nodes - 1 + slack)).any(),
        lambda: ValueError(
            f"states must be on the grid, in [{axis.low:g}, {axis.high:g}] for coordinate {i}, got "
            f"values from {float(x.min()):g} to {float(x.max()):g}; solve on a wider grid"
        ),
    )
    position = position.clamp(0, axis.nodes - 1)
    # at least 0 for what is not a number too, which is refused when the device is read
    left = position.detach().floor().long().clamp(0, axis.nodes - 2)
    return left, left + 1, position - left


def _corners(
    between: list[tuple[Tensor, Tensor, Tensor]], axes: tuple[Axis, ...], device: torch.device
) -> tuple[Tensor, Float[Tensor, "corners paths"]]:
    """The points around each state and their weights, both [corners, paths]."""
    index = torch.zeros((1, 1), dtype=torch.long, device=device)
    weight = torch.ones((1, 1), dtype=torch.float64, device=device)
    for axis, (left, right, share) in zip(axes, between, strict=True):
        nodes, shares = torch.stack([left, right]), torch.stack([1 - share, share])
        index = (index.unsqueeze(1) * axis.nodes + nodes).flatten(0, 1)
        weight = (weight.unsqueeze(1) * shares).flatten(0, 1)
    return index, weight


def _mixed(
    table: Float[Tensor, "points columns"],
    index: Tensor,
    weight: Float[Tensor, "corners paths"],
) -> Float[Tensor, "paths columns"]:
    return (weight.unsqueeze(-1) * table[index]).sum(0)
