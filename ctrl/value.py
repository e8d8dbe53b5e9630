"""Value functions along paths: their generator, and the martingale that characterises them.

    L^a V = d_t V + b(t, x, a) . grad V + 1/2 tr(sigma sigma' Hess V)
            + intensity E_z[V(t, x + sizes) - V(t, x)] for every kind of jumps
    dM = e^{-discount h} V(t + h, X_{t+h}) - V(t, X_t) + (r - average) h

V is the value of the policy that made the paths if and only if the sums of dM are a martingale
([JZ22a] Proposition 1).

Sources  [JZ22a] Jia & Zhou 2022, policy evaluation and temporal-difference learning in continuous
         time and space, JMLR 23.
         [H89] Hutchinson 1989, a stochastic estimator of the trace of the influence matrix for
         Laplacian smoothing splines, Communications in Statistics 18.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.paths import (
    Paths,
    ends_at_horizon,
    finished,
    over_nodes,
    require_kinds,
    while_running,
)
from ctrl.problem import ControlProblem
from ctrl.returns import at_exits, discount_rates, terminal_rewards
from ctrl.sde import ControlledSDE
from ctrl.user_functions import all_finite, located, one_a_path, own_memory

Value = Callable[[Tensor, Tensor], Tensor]
"""(time [], states [paths, *event]) -> [paths], reward; a network, or an exact answer."""


def values(value: Value, problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths nodes"]:
    """V at every node; what is paid at the horizon, or where a path is over, which V is pinned to.

    Raises:
        ValueError: V is not one finite number for each path.
    """
    require_kinds(problem, paths)

    def at(t: Tensor, x: Tensor) -> Tensor:
        return evaluated(value, t, x)

    unpinned = over_nodes(at, paths)
    if paths.ends is not None:
        return all_finite("value", _pinned(unpinned, problem, paths))
    unpinned = all_finite("value", unpinned)
    if not ends_at_horizon(problem, paths.grid):
        return unpinned
    terminal = terminal_rewards(problem, paths.states[:, -1])
    return torch.cat([unpinned[:, :-1], terminal.unsqueeze(1)], dim=1)


def evaluated(
    value: Value, t: Tensor, states: Float[Tensor, " paths *event"]
) -> Float[Tensor, " paths"]:
    """V(t, x), refused where it is not one number a path.

    A sum over the paths, or [paths, 1], has derivatives too: those of something else.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another shape.
    """
    return one_a_path("value", located("value", value, t, states), len(states))


def _pinned(unpinned: Tensor, problem: ControlProblem, paths: Paths) -> Tensor:
    """What is paid at the end of a path that is over there, from that node on."""
    paid = at_exits(problem, paths, terminal_rewards(problem, paths.states[:, -1]))
    ended = torch.nn.functional.pad(~paths.running, (0, 1), value=True)
    return torch.where(ended & finished(problem, paths).unsqueeze(1), paid.unsqueeze(1), unpinned)


def martingale_increments(
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    rewards: Float[Tensor, "paths steps"],
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths steps"]:
    """dM of every step, discounted to that step's time: reward; 0 after a path's end.

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
    h = as_like(paths.grid.steps, along)
    discount = discount_rates(problem, paths)
    keep = torch.exp(-discount * h)
    dm = keep * along[:, 1:] - along[:, :-1] + rewards - average_reward * h
    return while_running(dm, paths)


def discount_factors(problem: ControlProblem, paths: Paths) -> Float[Tensor, "*paths steps"]:
    """e^{-discount (t_k - t_0)}: what a reward of each step is worth at the first node.

    [steps], or [paths, steps] where the rate of discounting is a function or paths have own times.
    """
    discount = discount_rates(problem, paths)
    if isinstance(discount, Tensor):
        over = discount * as_like(paths.grid.steps, discount)
        return torch.exp(over - over.cumsum(1))
    nodes = paths.grid.nodes[..., :-1]
    return as_like(torch.exp(-discount * (nodes - nodes[..., :1])), paths.states)


def generator(
    sde: ControlledSDE,
    value: Value,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
    probes: Float[Tensor, "paths probes *noise"] | None = None,
) -> Float[Tensor, " paths"]:
    """L^a V at (t, x, a), reward/time: the drift of V(t, X_t) while the action is held.

    By forward-mode differentiation: V must be made of torch operations that are twice
    differentiable in x and once in t, and must treat every path by itself. The trace costs two
    evaluations of V for each Brownian motion, some at a time; or for each probe z, if there are
    probes: the mean of z'Mz / 2, M = sigma' Hess V sigma, is unbiased for tr M / 2 wherever
    E zz' = 1. For independent random signs its variance is sum_{i != j} M_ij^2 / (2 probes), the
    least of all laws of independent coordinates ([H89]), and 0 where M is diagonal. The integral
    over the sizes of jumps is by the rule of their marks.

    Args:
        sde: the dynamics; of a Stratonovich equation, those of its Ito form.
        value: V.
        t: time, [].
        states: x.
        actions: a.
        probes: one Brownian increment's shape each, of variance 1 (``noise.random_signs``).

    Raises:
        ValueError: V is not one number a path, the probes do not fit, or an intensity is negative.
    """
    sde = sde.to_ito()
    states = own_memory(states)
    along_drift = transport(sde, value, t, states, actions)

    def at(x: Tensor) -> Tensor:
        return evaluated(value, t, x)

    def curvature(direction: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return torch.func.jvp(at, (x,), (direction,))[1]

        return torch.func.jvp(slope, (states,), (direction,))[1]

    if probes is None:
        directions, share = _columns(sde, t, states, actions), 1.0
    else:
        noise = sde.noise_shape(tuple(states.shape[1:]))
        if probes.ndim < 2 or len(probes) != len(states) or tuple(probes.shape[2:]) != noise:
            raise ValueError(
                f"probes must be [{len(states)}, probes, *{list(noise)}], one Brownian increment "
                f"for each path and probe, got {list(probes.shape)}"
            )
        directions, share = _probed(sde, t, states, actions, probes), 1 / probes.shape[1]
    trace = along_drift.new_zeros(len(states))
    for some in directions:
        trace = trace + share * torch.func.vmap(curvature)(some).sum(0)
    total = along_drift + 0.5 * trace
    for kind in sde.jump_kinds:
        total = total + kind.rate_of_change(at, t, states, actions)
    return one_a_path("value", total, len(states))


def transport(
    sde: ControlledSDE,
    value: Value,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
) -> Float[Tensor, " paths"]:
    """d_t V + b(t, x, a) . grad V, reward/time: the part of the generator without noise or jumps.

    Args:
        sde: the dynamics, in the sense of Ito.
        value: V, once differentiable by ``torch.func.jvp``.
        t: time, [].
        states: x.
        actions: a.
    """
    drift = own_memory(sde.drift_at(t, states, actions))

    def at(s: Tensor, x: Tensor) -> Tensor:
        return evaluated(value, s, x)

    both = torch.func.jvp(at, (t, own_memory(states)), (torch.ones_like(t), drift))
    return both[1] + 0 * both[0]  # NaN where V is, whatever its derivative says


_CHUNK = 2**25  # bytes of directions at a time


def _columns(
    sde: ControlledSDE, t: Tensor, states: Tensor, actions: Tensor
) -> Iterator[Float[Tensor, " motions paths *event"]]:
    """Columns of sigma, one direction for each Brownian motion, some at a time."""
    sigma = as_like(sde.diffusion_at(t, states, actions), states)
    motions = math.prod(sde.noise_shape(tuple(states.shape[1:])))
    for some in _some_at_a_time(motions, states):
        if sde.noise == "general":
            yield own_memory(sigma[..., some].movedim(-1, 0))
        elif sde.noise == "scalar":
            yield own_memory(sigma.expand_as(states).unsqueeze(0))
        else:
            coordinates = torch.arange(motions, device=states.device)
            one_hot = (coordinates == coordinates[some].unsqueeze(1)).to(states)
            yield one_hot.view(-1, 1, *states.shape[1:]) * sigma.expand_as(states)


def _probed(
    sde: ControlledSDE, t: Tensor, states: Tensor, actions: Tensor, probes: Tensor
) -> Iterator[Float[Tensor, " probes paths *event"]]:
    """sigma z of every probe z, some at a time."""
    for some in _some_at_a_time(probes.shape[1], states):
        each = probes[:, some].to(states).unbind(1)
        yield torch.stack([sde.diffuse(t, states, z, actions) for z in each])


def _some_at_a_time(count: int, states: Tensor) -> Iterator[slice]:
    at_once = max(1, _CHUNK // max(1, states.numel() * states.element_size()))
    for begin in range(0, count, at_once):
        yield slice(begin, min(begin + at_once, count))
