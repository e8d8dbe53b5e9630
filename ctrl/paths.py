"""Time grids, sampled paths, and integrals along them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.problem import ControlProblem


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Nodes t_0 < ... < t_steps of a discretisation, validated once, here, for everyone."""

    nodes: Float[Tensor, " nodes"]

    def __post_init__(self) -> None:
        if self.nodes.ndim != 1 or len(self.nodes) < 2:
            raise ValueError(f"nodes must be [at least 2], got {list(self.nodes.shape)}")
        if not self.nodes.is_floating_point():
            raise TypeError(f"nodes must be floating point, got {self.nodes.dtype}")
        if not bool(torch.isfinite(self.nodes).all()):
            raise ValueError(f"nodes must be finite, got {self.nodes.tolist()}")
        if (bad := self.nodes.diff() <= 0).any():
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"nodes must increase strictly, but nodes[{k}] = {self.nodes[k]:g} and "
                f"nodes[{k + 1}] = {self.nodes[k + 1]:g}; to run backwards in noise time, "
                "reverse the schedule, not the grid"
            )

    @property
    def steps(self) -> Float[Tensor, " steps"]:
        """Step sizes, time."""
        return self.nodes.diff()


def uniform_grid(
    horizon: float,
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> TimeGrid:
    """``steps`` equal steps from 0 to ``horizon``.

    Nodes are double precision unless asked otherwise: in float32 a step loses digits.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if not 0 < horizon < float("inf"):
        raise ValueError(f"horizon must be positive and finite, got {horizon}")
    return TimeGrid(torch.linspace(0, horizon, steps + 1, dtype=dtype, device=device))


@dataclass(frozen=True, eq=False)
class Paths:
    """Sampled paths; parts that were not kept are None.

    Stored time-major, viewed path-major.

    Attributes:
        states: X at every node.
        actions: a at the left end of every step, held over it.
        increments: W(t + h) - W(t), sqrt(time).
        grid: the nodes.
        weights: of the paths, where they are not equal.
    """

    states: Float[Tensor, "paths nodes *event"]
    actions: Float[Tensor, "paths steps *action"] | None
    increments: Float[Tensor, "paths steps *noise"] | None
    grid: TimeGrid
    weights: Float[Tensor, " paths"] | None = None


def ito_sum(
    integrand: Float[Tensor, "paths steps *noise"], increments: Float[Tensor, "paths steps *noise"]
) -> Float[Tensor, " paths"]:
    """Ito integral int f . dW along each path, the integrand at the left end of each step."""
    if integrand.shape != increments.shape:
        raise ValueError(
            f"integrand must have the increments' shape {list(increments.shape)}, got "
            f"{list(integrand.shape)}"
        )
    return (integrand * increments).flatten(1).sum(1)


def time_integral(rates: Float[Tensor, "paths steps"], grid: TimeGrid) -> Float[Tensor, " paths"]:
    """Time integral int f dt along each path, f at the left end of each step (error O(h))."""
    if rates.shape[1] != len(grid.steps):
        raise ValueError(
            f"rates must be [paths, {len(grid.steps)}] to fit the grid, got {list(rates.shape)}"
        )
    return (rates * grid.steps.to(rates)).sum(1)


def running_rewards(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths steps"]:
    """Running reward of every step, integrated over it (left end), undiscounted, reward."""
    if paths.actions is None:
        raise ValueError("paths must have kept their actions to compute running rewards")
    steps = paths.grid.steps.to(paths.states)
    if problem.running_reward is None:
        return paths.states.new_zeros(len(paths.states), len(steps))
    each = [
        problem.running_reward(t, paths.states[:, k], paths.actions[:, k])
        for k, t in enumerate(paths.grid.nodes[:-1].to(paths.states))
    ]
    return torch.stack(each, dim=1) * steps


def returns_to_go(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths nodes"]:
    """Discounted reward from every node to the horizon, in that node's money."""
    rewards = running_rewards(problem, paths)
    final = paths.states[:, -1]
    terminal = (
        problem.terminal_reward(final)
        if problem.terminal_reward
        else rewards.new_zeros(len(rewards))
    )
    keep = torch.exp(-problem.discount * paths.grid.steps.to(rewards))
    returns = [terminal]
    for k in range(rewards.shape[1] - 1, -1, -1):
        returns.append(rewards[:, k] + keep[k] * returns[-1])
    return torch.stack(returns[::-1], dim=1)
