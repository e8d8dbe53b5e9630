"""What paths earn: running, entropy, exit and terminal rewards, discounts, and returns to go.

Rewards are those of the left end of a step, integrated over it (error O(h)).

Sources  [JZ22b] Jia & Zhou 2022, policy gradient and actor-critic, JMLR 23.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require
from ctrl.memory import AnyPolicy, PolicyWithMemory
from ctrl.paths import (
    Paths,
    ends_at_horizon,
    finished,
    kept_actions,
    log_probs,
    over_steps,
    require_kinds,
)
from ctrl.policy import RandomPolicy
from ctrl.problem import ControlProblem
from ctrl.user_functions import all_finite, call, located, one_a_path


def running_rewards(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths steps"]:
    """Running reward of every step, integrated over it (left end), undiscounted, reward.

    It is the reward that the paths were paid, where their simulator pays it.

    Raises:
        ValueError: the paths have not kept their actions, or the reward is not one finite number
            for each path.
    """
    require_kinds(problem, paths)
    reward = problem.running_reward
    if paths.rewards is not None:
        if reward is not None:
            raise ValueError(
                "problem.running_reward must be None for paths that were paid by their simulator "
                "(paths.rewards), or the reward would be counted twice or dropped"
            )
        return paths.rewards
    steps = as_like(paths.grid.steps, paths.states)
    if reward is None:
        return paths.states.new_zeros(len(paths.states), steps.shape[-1])

    def rate(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return one_a_path("running_reward", located("running_reward", reward, t, x, a), len(x))

    return all_finite("running_reward", over_steps(rate, paths, kept_actions(paths))) * steps


def discount_rates(problem: ControlProblem, paths: Paths) -> float | Float[Tensor, "paths steps"]:
    """The rate of discounting at the left end of every step, 1/time; a number if it is constant.

    Raises:
        ValueError: it is negative, not finite, or not one number a path.
    """
    if not callable(problem.discount):
        return problem.discount

    def rate(t: Tensor, x: Tensor) -> Tensor:
        return one_a_path("discount", as_like(problem.discount_at(t, x), x), len(x))

    return over_steps(rate, paths)


def regularised_rewards(
    problem: ControlProblem, paths: Paths, policy: AnyPolicy | None
) -> Float[Tensor, "paths steps"]:
    """Running reward with the entropy's share, -temperature log pi(a_k | t_k, x_k) h_k.

    The expectation of the second over a_k is the temperature's worth of entropy ([JZ22b] p).

    Raises:
        ValueError: the temperature is not 0 and ``policy`` is not one that draws its actions.
    """
    rewards = running_rewards(problem, paths)
    if not problem.temperature:
        return rewards
    if not isinstance(policy, RandomPolicy | PolicyWithMemory):
        kind = "none" if policy is None else type(policy).__name__
        raise ValueError(
            f"policy must be one that draws its actions and knows their density, got {kind}: "
            f"problem.temperature = {problem.temperature:g} pays for its entropy"
        )
    log_prob = log_probs(policy, paths)
    return rewards - problem.temperature * log_prob * as_like(paths.grid.steps, rewards)


def require_whole(problem: ControlProblem, paths: Paths) -> None:
    """Refuse paths that break off before they are over, where a sum to their end is asked for.

    Raises:
        ValueError: a path has not terminated and its last node is not the horizon (an infinite one
            has no end).
    """
    require_kinds(problem, paths)
    grid = paths.grid
    if paths.ends is not None:
        over = finished(problem, paths)
        require(over.all(), lambda: ValueError(_broken_off(problem, paths, over)))
        return
    if not ends_at_horizon(problem, grid):
        raise ValueError(
            f"grid must end at the horizon {problem.horizon:g}, or what comes after its end is "
            f"left out, got {float(grid.nodes[-1]):g}; where the horizon is infinite or the paths "
            f"are cut short, {_BOOTSTRAP}"
        )


def _broken_off(problem: ControlProblem, paths: Paths, over: Tensor) -> str:
    return (
        f"paths must be over at their ends, by termination or at the horizon {problem.horizon:g}, "
        f"but {int((~over).sum())} of {len(over)} break off before; take a longer grid, or "
        f"{_BOOTSTRAP}"
    )


_BOOTSTRAP = (
    "use what puts a value function at their end: martingale.ctd0 or ctd_lambda, "
    "q_learning.orthogonality_loss, temporal_difference_gradient"
)


def returns_to_go(
    problem: ControlProblem, paths: Paths, policy: AnyPolicy | None = None
) -> Float[Tensor, "paths nodes"]:
    """Discounted reward from every node to the path's end, discounted to that node's time.

    At the end, and in the rest after it, it is what is paid there.

    Its mean at the first node is what the policy is worth. The gradient of that in the policy's
    parameters goes through the paths, simulate(..., differentiable=True); of paths without a graph
    it is that of the rewards alone, which is not the policy gradient (``ctrl.policy_gradient``).

    Args:
        problem: which pays.
        paths: with their actions.
        policy: that drew the actions; needed where the problem rewards its entropy.

    Raises:
        ValueError: a path breaks off before the horizon (an infinite one has no end); a reward is
            not one finite number for each path; or the policy is missing.
    """
    require_whole(problem, paths)
    rewards = regularised_rewards(problem, paths, policy)
    terminal = at_exits(problem, paths, terminal_rewards(problem, paths.states[:, -1]))
    discount = discount_rates(problem, paths)
    keep = torch.exp(-discount * as_like(paths.grid.steps, rewards))
    returns, runs = [terminal], None if paths.ends is None else paths.running.unbind(1)
    for k in range(rewards.shape[1] - 1, -1, -1):
        ahead = rewards[:, k] + keep[..., k] * returns[-1]
        returns.append(ahead if runs is None else torch.where(runs[k], ahead, terminal))
    return torch.stack(returns[::-1], dim=1)


def at_exits(
    problem: ControlProblem, paths: Paths, terminal: Float[Tensor, " paths"]
) -> Float[Tensor, " paths"]:
    """What is paid at each path's end: the exit reward where it left the domain, else terminal.

    Args:
        problem: which pays.
        paths: that end.
        terminal: the terminal reward at the ends.

    Raises:
        ValueError: the exit reward is not one finite number for each path that left.
    """
    reward = problem.exit_reward
    if reward is None or paths.ends is None:
        return terminal
    left = paths.terminated
    if left is None:
        left = paths.ends < paths.states.shape[1] - 1
    nodes = as_like(paths.grid.nodes, paths.states)
    times = nodes[paths.ends] if nodes.ndim == 1 else nodes[:, -1]
    paid = call("exit_reward", reward, times, paths.states[:, -1])
    paid = torch.where(left, one_a_path("exit_reward", paid, len(left)), terminal)
    return all_finite("exit_reward", paid)


def terminal_rewards(
    problem: ControlProblem, states: Float[Tensor, " paths *event"]
) -> Float[Tensor, " paths"]:
    """Terminal reward of the states at the horizon; 0 where the problem pays none.

    Raises:
        ValueError: the reward is not one finite number for each path.
    """
    reward = problem.terminal_reward
    if reward is None:
        return states.new_zeros(len(states))
    value = call("terminal_reward", reward, states)
    return all_finite("terminal_reward", one_a_path("terminal_reward", value, len(states)))
