"""Pictures of paths, values and policies; needs the extra ``plots``.

Every function draws into the axes that it is given, or into a new figure, and returns the axes:
``axes.figure.savefig(...)``. Nothing global is touched, so it works without a display.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ctrl.paths import Paths, common_grid
from ctrl.policy import Policy
from ctrl.squashed_policy import SquashedGaussianPolicy
from ctrl.value import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_paths(
    paths: Paths, *, coordinate: int = 0, show: int = 30, axes: "Axes | None" = None
) -> "Axes":
    """Some paths of one coordinate, and the mean of all with the band that holds 90 % of them.

    Args:
        paths: to draw; events are flattened.
        coordinate: of the flattened state.
        show: how many paths are drawn as lines.
        axes: to draw into; new ones if not given.

    Raises:
        ValueError: there is no such coordinate, or ``show`` is negative.
    """
    states = paths.states.detach().reshape(*paths.states.shape[:2], -1)
    if not 0 <= coordinate < states.shape[2]:
        raise ValueError(f"coordinate must be in 0 .. {states.shape[2] - 1}, got {coordinate}")
    if show < 0:
        raise ValueError(f"show must be at least 0, got {show}")
    axes = _axes(axes)
    times, one = common_grid(paths).nodes.cpu().numpy(), _array(states[..., coordinate])
    shares = np.full(len(one), 1 / len(one)) if paths.weights is None else _array(paths.weights)
    low, high = (_quantile(one, shares, level) for level in (0.05, 0.95))
    axes.fill_between(times, low, high, color="tab:blue", alpha=0.15, lw=0)
    # evenly through the total weight: the first paths of a quadrature are a corner of it
    drawn = np.searchsorted(np.cumsum(shares), (np.arange(show) + 0.5) / max(show, 1))
    for path in one[np.unique(drawn.clip(max=len(one) - 1))]:
        axes.plot(times, path, color="tab:blue", alpha=0.35, linewidth=0.7)
    mean = shares @ one
    axes.plot(times, mean, color="black", linewidth=1.6, label="mean")
    axes.set(xlabel="time", ylabel=f"state {coordinate}", xlim=(times[0], times[-1]))
    axes.legend(frameon=False)
    return axes


def plot_value(
    value: Value,
    states: Tensor | tuple[Tensor, Tensor],
    times: Sequence[float] = (0.0,),
    *,
    axes: "Axes | None" = None,
) -> "Axes":
    """V over one coordinate at several times, or over two at one time.

    Args:
        value: V.
        states: points [n] of a scalar state, or two axes [n], [m] of a state of two coordinates.
        times: at which; one only for two coordinates.
        axes: to draw into; new ones if not given.

    Raises:
        ValueError: there are several times for two coordinates, or none at all.
    """
    if not times:
        raise ValueError("times must not be empty")
    axes = _axes(axes)
    if isinstance(states, Tensor):
        for share, time in zip(_shades(len(times)), times, strict=True):
            heights = value(states.new_tensor(time), states.unsqueeze(1)).detach()
            label = f"t = {time:g}"
            axes.plot(_array(states), _array(heights), color=_colour(share), label=label)
        axes.set(xlabel="state", ylabel="value (reward)")
        axes.legend(frameon=False)
        return axes
    if len(times) > 1:
        raise ValueError(f"times must be one for two coordinates, got {list(times)}")
    first, second = states
    points = torch.cartesian_prod(first, second)
    heights = value(first.new_tensor(times[0]), points).detach().view(len(first), len(second))
    shown = axes.contourf(_array(first), _array(second), _array(heights.T), levels=24)
    bar = axes.figure.colorbar(shown, ax=axes)
    bar.set_label("value (reward)")
    axes.set(xlabel="state 0", ylabel="state 1", title=f"t = {times[0]:g}")
    return axes


def plot_policy(
    policy: Policy,
    states: Tensor,
    times: Sequence[float] = (0.0,),
    *,
    coordinate: int = 0,
    axes: "Axes | None" = None,
) -> "Axes":
    """Mean action over a scalar state, with a band of one standard deviation where it is random.

    Args:
        policy: to draw.
        states: points [n].
        times: at which; a line each.
        coordinate: of the action.
        axes: to draw into; new ones if not given.

    Raises:
        ValueError: there are no times, or the action has no such coordinate.
    """
    if not times:
        raise ValueError("times must not be empty")
    axes = _axes(axes)
    points = states.unsqueeze(1)
    for share, time in zip(_shades(len(times)), times, strict=True):
        t = states.new_tensor(time)
        mean = policy.mean(t, points).detach()
        if mean.ndim != 2 or not 0 <= coordinate < mean.shape[1]:
            raise ValueError(
                f"coordinate must be one of an action vector's, got {coordinate} for actions "
                f"{list(mean.shape[1:])}"
            )
        line = _array(mean[:, coordinate])
        axes.plot(_array(states), line, color=_colour(share), label=f"t = {time:g}")
        if policy.is_random:
            width = _array(_std(policy, t, mean, points)[:, coordinate])
            axes.fill_between(
                _array(states), line - width, line + width, color=_colour(share), alpha=0.15, lw=0
            )
    drawn = " (mean, one standard deviation)" if policy.is_random else ""
    axes.set(xlabel="state", ylabel=f"action {coordinate}{drawn}")
    axes.legend(frameon=False)
    return axes


def _std(policy: Policy, t: Tensor, mean: Tensor, points: Tensor) -> Tensor:
    """Standard deviation of every coordinate of the action."""
    if isinstance(policy, SquashedGaussianPolicy):
        return policy.moments(t, points)[1].detach()
    # act is affine in its noise: the variance is the sum over unit normals
    variance = torch.zeros_like(mean)
    for j in range(mean.shape[1]):
        unit = torch.zeros_like(mean)
        unit[:, j] = 1
        variance = variance + (policy.act(mean, t, unit, points).detach() - mean).square()
    return variance.sqrt()


def _axes(axes: "Axes | None") -> "Axes":
    if axes is not None:
        return axes
    from matplotlib.figure import Figure

    return Figure(figsize=(6.0, 3.8), layout="constrained").subplots()


def _quantile(values: Any, weights: Any, level: float) -> Any:
    """The least value of each column below which this share of the weight lies, or more."""
    order = np.argsort(values, axis=0)
    reached = np.cumsum(weights[order], axis=0) >= level * weights.sum() * (1 - 1e-12)
    return np.take_along_axis(values, order, axis=0)[reached.argmax(0), np.arange(values.shape[1])]


def _array(values: Tensor) -> Any:
    return values.detach().double().cpu().numpy()


def _shades(count: int) -> list[float]:
    return [0.1 + 0.75 * k / max(1, count - 1) for k in range(count)]


def _colour(share: float) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](share)
