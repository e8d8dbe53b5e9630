"""One step of time after the other, on parallel paths that never end."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ctrl.paths import Paths, TimeGrid
from ctrl.policy import Policy, mean_action
from ctrl.problem import ControlProblem
from ctrl.simulate import simulate
from ctrl.solvers import Solver
from ctrl.time_homogeneity import require_time_homogeneous


@dataclass(frozen=True, eq=False)
class OnlineStep:
    """One step of online experience.

    Attributes:
        time: since the start.
        paths: one step of every parallel path.
        average_reward: the current estimate, reward/time.
    """

    time: float
    paths: Paths
    average_reward: float


def one_step_paths(
    problem: ControlProblem,
    policy: Policy,
    start: Float[Tensor, " paths *event"],
    step_size: float,
    steps: int,
    generator: Generator,
    solver: Solver | None = None,
) -> Iterator[Paths]:
    """Paths of one step each, every one going on from where the last one ended.

    The clock of each is [0, step_size]: for time-homogeneous problems. The policy may be changed in
    between.

    Raises:
        ValueError: the problem has an end, a domain or a discount, its coefficients or the policy
            change with time, or there is not at least one step.
    """
    if problem.horizon < float("inf") or problem.discount:
        raise ValueError(
            "problem must be ergodic (infinite horizon, no discount) to be learned online, got "
            f"horizon {problem.horizon:g} and discount {problem.discount}"
        )
    if problem.domain is not None:
        raise ValueError("problem.domain must be None to be learned online: these paths never end")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with torch.no_grad():
        actions = mean_action(policy, start.new_tensor(0.0), start)
    require_time_homogeneous(problem, start, actions, policy)
    grid = TimeGrid(torch.tensor([0.0, step_size], dtype=torch.float64))
    states = start
    for _ in range(steps):
        paths = simulate(problem, policy, states, grid, solver, generator=generator)
        yield paths
        states = paths.states[:, -1]
