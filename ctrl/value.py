"""Value functions along paths: their generator, and the martingale that characterises them.

    L^a V = d_t V + b(t, x, a) . grad V + 1/2 tr(sigma sigma' Hess V)
    dM = e^{-discount h} V(t + h, X_{t+h}) - V(t, X_t) + (r - average) h

V is the value of the policy that made the paths if and only if the sums of dM are a martingale
([JZ22a] Proposition 1).

Sources  [JZ22a] Jia & Zhou 2022, policy evaluation and temporal-difference learning in continuous
         time and space, JMLR 23.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.paths import (
    Paths,
    all_finite,
    ends_at_horizon,
    one_a_path,
    over_nodes,
    terminal_rewards,
)
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE

Value = Callable[[Tensor, Tensor], Tensor]
"""(time [], states [paths, *event]) -> [paths], reward; a network, or an exact answer."""


def values(value: Value, problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths nodes"]:
    """V at every node; at the horizon the terminal reward, which V is pinned to.

    Raises:
        ValueError: V is not one finite number for each path.
    """

    def at(t: Tensor, x: Tensor) -> Tensor:
        return one_a_path("value", value(t, x), len(x))

    found = all_finite("value", over_nodes(at, paths))
    if not ends_at_horizon(problem, paths.grid):
        return found
    terminal = terminal_rewards(problem, paths.states[:, -1])
    return torch.cat([found[:, :-1], terminal.unsqueeze(1)], dim=1)


def martingale_increments(
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    rewards: Float[Tensor, "paths steps"],
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths steps"]:
    """dM of every step, in that step's money: reward.

    Args:
        value: V.
        problem: whose discount and terminal reward count.
        paths: along which.
        rewards: the reward of every step, integrated over it.
        average_reward: per unit of time, in ergodic problems; 0 in others.

    Raises:
        ValueError: ``rewards`` has not one entry for each step, or V is not finite.
    """
    along = values(value, problem, paths)
    if rewards.shape != (len(along), along.shape[1] - 1):
        raise ValueError(
            f"rewards must be {[len(along), along.shape[1] - 1]}, one for each step, got "
            f"{list(rewards.shape)}"
        )
    h = paths.grid.steps.to(along)
    keep = torch.exp(-problem.discount * h)
    return keep * along[:, 1:] - along[:, :-1] + rewards - average_reward * h


def discount_factors(problem: ControlProblem, paths: Paths) -> Float[Tensor, " steps"]:
    """e^{-discount (t_k - t_0)}: what a reward of each step is worth at the first node."""
    nodes = paths.grid.nodes[:-1]
    return torch.exp(-problem.discount * (nodes - nodes[0])).to(paths.states)


def generator(
    sde: ControlledSDE,
    value: Value,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
) -> Float[Tensor, " paths"]:
    """L^a V at (t, x, a), reward/time: the drift of V(t, X_t) while the action is held.

    By forward-mode differentiation: V must be made of torch operations that are twice
    differentiable in x and once in t, and must treat every path by itself. Costs two evaluations of
    V for each Brownian motion, batched.

    Args:
        sde: the dynamics; of a Stratonovich equation, those of its Ito form.
        value: V.
        t: time, [].
        states: x.
        actions: a.
    """
    sde = sde.to_ito()
    states = states.contiguous()  # forward mode cannot differentiate at an expanded tensor
    drift = sde.drift_at(t, states, actions).contiguous()
    transport = torch.func.jvp(value, (t, states), (torch.ones_like(t), drift))[1]

    def at(x: Tensor) -> Tensor:
        return value(t, x)

    def curvature(direction: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return torch.func.jvp(at, (x,), (direction,))[1]

        return torch.func.jvp(slope, (states,), (direction,))[1]

    columns = _columns(sde, t, states, actions)
    spread = torch.func.vmap(curvature)(columns.contiguous()).sum(0)
    return one_a_path("value", transport + 0.5 * spread, len(states))


def _columns(
    sde: ControlledSDE, t: Tensor, states: Tensor, actions: Tensor
) -> Float[Tensor, " motions paths *event"]:
    """What each Brownian motion moves the states by, one direction a motion."""
    sigma = torch.as_tensor(
        sde.diffusion_at(t, states, actions), dtype=states.dtype, device=states.device
    )
    if sde.noise == "general":
        return sigma.movedim(-1, 0)
    sigma = sigma.expand_as(states)
    if sde.noise == "scalar":
        return sigma.unsqueeze(0)
    coordinates = torch.eye(states[0].numel()).to(states)
    return coordinates.view(-1, 1, *states.shape[1:]) * sigma
