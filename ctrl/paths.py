"""Time grids, sampled paths, and integrals along them."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.problem import ControlProblem


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Nodes t_0 < ... < t_steps of a discretisation, validated once, here, for everyone."""

    nodes: Float[Tensor, " nodes"]

    def __post_init__(self) -> None:
        if not isinstance(self.nodes, Tensor) or not self.nodes.is_floating_point():
            kind = self.nodes.dtype if isinstance(self.nodes, Tensor) else type(self.nodes).__name__
            raise TypeError(f"nodes must be a floating point tensor, got {kind}")
        if self.nodes.ndim != 1 or len(self.nodes) < 2:
            raise ValueError(f"nodes must be [at least 2], got {list(self.nodes.shape)}")
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

    Raises:
        ValueError: ``steps`` is not a positive integer or ``horizon`` not positive and finite.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if not isinstance(horizon, Real) or not 0 < horizon < float("inf"):
        raise ValueError(f"horizon must be a positive, finite number, got {horizon!r}")
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

    def __post_init__(self) -> None:
        paths, nodes = len(self.states), len(self.grid.nodes)
        begins = {"states": (paths, nodes), "weights": (paths,)}
        begins |= dict.fromkeys(("actions", "increments"), (paths, nodes - 1))
        for name, begin in begins.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape[: len(begin)]) != begin:
                raise ValueError(
                    f"{name} must begin with {list(begin)} to fit the states and the grid, got "
                    f"{list(value.shape)}"
                )


def ito_sum(
    integrand: Float[Tensor, "paths steps *noise"], increments: Float[Tensor, "paths steps *noise"]
) -> Float[Tensor, " paths"]:
    """Ito integral int f . dW along each path, the integrand at the left end of each step.

    Raises:
        ValueError: the shapes differ.
    """
    if integrand.shape != increments.shape:
        raise ValueError(
            f"integrand must have the increments' shape {list(increments.shape)}, got "
            f"{list(integrand.shape)}"
        )
    return (integrand * increments).flatten(1).sum(1)


def time_integral(rates: Float[Tensor, "paths steps"], grid: TimeGrid) -> Float[Tensor, " paths"]:
    """Time integral int f dt along each path, f at the left end of each step (error O(h)).

    Raises:
        ValueError: ``rates`` has not one entry for each step of ``grid``.
    """
    if rates.ndim != 2 or rates.shape[1] != len(grid.steps):
        raise ValueError(
            f"rates must be [paths, {len(grid.steps)}] to fit the grid, got {list(rates.shape)}"
        )
    return (rates * grid.steps.to(rates)).sum(1)


def running_rewards(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths steps"]:
    """Running reward of every step, integrated over it (left end), undiscounted, reward.

    Raises:
        ValueError: the paths have not kept their actions, or the reward is not one finite number
            for each path.
    """
    steps = paths.grid.steps.to(paths.states)
    reward = problem.running_reward
    if reward is None:
        return paths.states.new_zeros(len(paths.states), len(steps))
    if paths.actions is None:
        raise ValueError('paths must have kept their actions: simulate(..., keep=("actions", ...))')
    times = paths.grid.nodes[:-1].to(paths.states)
    moments = zip(times, paths.states[:, :-1].unbind(1), paths.actions.unbind(1), strict=True)
    each = [_paid("running_reward", reward, paths, *moment) for moment in moments]
    return torch.stack(each, dim=1) * steps


def returns_to_go(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths nodes"]:
    """Discounted reward from every node to the horizon, in that node's money.

    Raises:
        ValueError: the grid does not end where the terminal reward is paid; a reward is not one
            finite number for each path; or the problem rewards entropy, which paths do not show.
    """
    if problem.temperature:
        raise ValueError(
            f"problem.temperature must be 0, got {problem.temperature:g}: the entropy is the "
            "policy's, not the paths'; pay for it in running_reward"
        )
    rewards = running_rewards(problem, paths)
    terminal = rewards.new_zeros(len(rewards))
    if problem.terminal_reward is not None:
        end = float(paths.grid.nodes[-1])
        if abs(end - problem.horizon) > 1e-6 * problem.horizon:  # grids may be float32
            raise ValueError(
                f"grid must end at the horizon {problem.horizon:g}, where the terminal reward is "
                f"paid, got {end:g}"
            )
        terminal = _paid("terminal_reward", problem.terminal_reward, paths, paths.states[:, -1])
    keep = torch.exp(-problem.discount * paths.grid.steps.to(rewards))
    returns = [terminal]
    for k in range(rewards.shape[1] - 1, -1, -1):
        returns.append(rewards[:, k] + keep[k] * returns[-1])
    return torch.stack(returns[::-1], dim=1)


def _paid(
    name: str, reward: Callable[..., Tensor], paths: Paths, *arguments: Tensor
) -> Float[Tensor, " paths"]:
    value = reward(*arguments)
    if value.shape != (len(paths.states),):
        raise ValueError(f"{name} must return [{len(paths.states)}], got {list(value.shape)}")
    if bad := int((~torch.isfinite(value)).sum()):
        raise ValueError(f"{name} must be finite, but it is not on {bad} of {len(value)} paths")
    return value
