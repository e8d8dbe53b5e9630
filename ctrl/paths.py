"""Time grids, sampled paths, and integrals along them.

Sources  [JZ22b] Jia & Zhou 2022, policy gradient and actor-critic, JMLR 23.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require
from ctrl.estimate import require_probabilities
from ctrl.policy import Policy, RandomPolicy, mean_action
from ctrl.problem import ControlProblem
from ctrl.user_functions import all_finite, call, one_a_path


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
        weights: of the paths, non-negative, summing to 1, where they are not equal: of a
            quadrature rule, or ``girsanov.importance_weights``.
        rewards: running reward of every step, integrated over it, where the simulator pays it
            rather than the problem.
        black_box: whether a simulator computed the states, and not the problem's ``sde``: then what
            needs the dynamics (q-rates, path likelihoods) refuses the paths.
        jumps: how many of each kind every step had.
    """

    states: Float[Tensor, "paths nodes *event"]
    actions: Float[Tensor, "paths steps *action"] | None
    increments: Float[Tensor, "paths steps *noise"] | None
    grid: TimeGrid
    weights: Float[Tensor, " paths"] | None = None
    rewards: Float[Tensor, "paths steps"] | None = None
    black_box: bool = False
    jumps: Float[Tensor, "paths steps kinds"] | None = None

    def __post_init__(self) -> None:
        for name in ("states", "actions", "increments", "weights", "rewards", "jumps"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (value is not None or name == "states"):
                raise TypeError(
                    f"{name} must be a torch tensor, got {type(value).__name__}; "
                    "torch.as_tensor(...) makes one of an array or a list"
                )
        if not isinstance(self.grid, TimeGrid):
            raise TypeError(
                f"grid must be a TimeGrid, got {type(self.grid).__name__}; TimeGrid(nodes) makes "
                "one of times"
            )
        paths, nodes = len(self.states), len(self.grid.nodes)
        begins = {"states": (paths, nodes), "weights": (paths,)}
        begins |= dict.fromkeys(("actions", "increments", "rewards", "jumps"), (paths, nodes - 1))
        for name, begin in begins.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape[: len(begin)]) != begin:
                raise ValueError(
                    f"{name} must begin with {list(begin)} to fit the states and the grid, got "
                    f"{list(value.shape)}"
                )
            if value is None:
                continue
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {value.dtype}")
            if name in ("weights", "rewards") and value.ndim != len(begin):
                raise ValueError(f"{name} must be {list(begin)}, got {list(value.shape)}")
            if name != "weights":
                self._require_finite(name, value.detach())
        if self.weights is not None:
            require_probabilities("weights", self.weights)

    def _require_finite(self, name: str, values: Tensor) -> None:
        total = values.sum()
        if values.device.type == "cpu" and bool(torch.isfinite(total)):
            return  # a sum of finite numbers may overflow, so it only acquits
        whole = torch.isfinite(values).reshape(*values.shape[:2], -1).all(2).all(0)
        require(whole.all(), lambda: self._not_finite(name, whole))

    def _not_finite(self, name: str, whole: Tensor) -> ValueError:
        k = int((~whole).nonzero()[0])
        return ValueError(
            f"{name} are not finite from node {k} (t = {self.grid.nodes[k]:g}) on: drift, "
            "diffusion, policy or start are too large for the step; refine the grid or bound them"
        )


def require_dynamics(paths: Paths) -> None:
    """Refuse paths that were not simulated by the problem's ``sde``, where its coefficients count.

    Raises:
        ValueError: a black box simulated them.
    """
    if paths.black_box:
        raise ValueError(
            "paths must be those of problem.sde, whose coefficients are needed here, but a black "
            "box simulated them; use what learns from paths alone: ctrl.martingale, the losses of "
            "ctrl.q_learning, policy_gradient.return_gradient or temporal_difference_gradient"
        )


def require_memoryless(policy: Policy, paths: Paths) -> None:
    """Refuse a policy whose mean action depends on more than (t, x).

    Along stored paths a policy is evaluated at many steps at once, in no order: the probability of
    an action would silently be that of other inputs. Costs three evaluations of one step: twice at
    the first, and elsewhere in between.

    Raises:
        ValueError: the same (t, x) had two mean actions.
    """
    times, states = as_like(paths.grid.nodes, paths.states), paths.states.detach()
    elsewhere = (times[-2], states[:, -2]) if len(times) > 2 else (times[0], states[:, -1])
    with torch.no_grad():
        first = mean_action(policy, times[0], states[:, 0]).clone()
        mean_action(policy, *elsewhere)
        again = mean_action(policy, times[0], states[:, 0])
    # the same kernels on the same numbers; some of a GPU's sum in no fixed order
    slack = 1e3 * torch.finfo(first.dtype).eps * first.abs().max()
    if first.shape != again.shape:
        raise ValueError(_MEMORY)
    require(((again - first).abs() <= slack).all(), lambda: ValueError(_MEMORY))


_MEMORY = (
    "policy.mean must be a function of (t, x) alone, but it gave two actions for the same (t, x): "
    "it has a memory (or draws random numbers, as dropout does). Make what it remembers part of "
    "the state, and switch dropout off (module.eval())"
)


def kept_actions(paths: Paths) -> Float[Tensor, "paths steps *action"]:
    """The actions of the paths.

    Raises:
        ValueError: they were not kept.
    """
    if paths.actions is None:
        raise ValueError('paths must have kept their actions: simulate(..., keep=("actions", ...))')
    return paths.actions


def over_steps(
    function: Callable[..., Tensor],
    paths: Paths,
    *more: Float[Tensor, "paths steps ..."],
    copies: int = 1,
) -> Float[Tensor, "paths steps *result"]:
    """function(t, x, ...) at the left end of every step.

    Many steps at once where ``torch.func.vmap`` can; one after the other where it cannot (control
    flow that depends on values).

    Args:
        function: of (t [], states [paths, *event], one slice [paths, *one] of each of ``more``);
            without side effects.
        paths: whose states and times it is given.
        more: what else, for every step; the actions, say.
        copies: how many tensors of the states' size the function has in memory at a time; the
            more, the fewer steps are taken at once.

    Raises:
        ValueError: the function writes into what it is given, which are the stored paths.
    """
    times = as_like(paths.grid.nodes[:-1], paths.states)
    return _along(function, times, paths.states[:, :-1], *more, copies=copies)


def over_nodes(
    function: Callable[[Tensor, Tensor], Tensor], paths: Paths
) -> Float[Tensor, "paths nodes *result"]:
    """function(t, x) at every node, the last one too; else as ``over_steps``."""
    return _along(function, as_like(paths.grid.nodes, paths.states), paths.states)


_CHUNK = 2**22  # bytes of states at a time: what a step makes of them should stay in cache


def _along(
    function: Callable[..., Tensor], times: Tensor, *rows: Tensor, copies: int = 1
) -> Tensor:
    def along(times: Tensor, *rows: Tensor) -> Tensor:
        widest = max(row[:, 0].numel() * row.element_size() for row in rows)
        chunk = max(1, _CHUNK // max(1, copies * widest))
        in_dims = (0, *[1] * len(rows))
        try:
            at_once = torch.func.vmap(function, in_dims, out_dims=1, chunk_size=chunk)
            return at_once(times, *rows)
        except RuntimeError:  # not vectorisable; a real fault is raised again by the loop
            moments = zip(times, *[each.unbind(1) for each in rows], strict=True)
            return torch.stack([function(*moment) for moment in moments], dim=1)

    return call("a function of (t, x) along paths", along, times, *rows)


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
    return (rates * as_like(grid.steps, rates)).sum(1)


def running_rewards(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths steps"]:
    """Running reward of every step, integrated over it (left end), undiscounted, reward.

    It is the reward that the paths were paid, where their simulator pays it.

    Raises:
        ValueError: the paths have not kept their actions, or the reward is not one finite number
            for each path.
    """
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
        return paths.states.new_zeros(len(paths.states), len(steps))

    def rate(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return one_a_path("running_reward", reward(t, x, a), len(x))

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
    problem: ControlProblem, paths: Paths, policy: Policy | None
) -> Float[Tensor, "paths steps"]:
    """Running reward with the entropy's share, -temperature log pi(a_k | t_k, x_k) h_k.

    The expectation of the second over a_k is the temperature's worth of entropy ([JZ22b] p).

    Raises:
        ValueError: the temperature is not 0 and ``policy`` is not one that draws its actions.
    """
    rewards = running_rewards(problem, paths)
    if not problem.temperature:
        return rewards
    if not isinstance(policy, RandomPolicy):
        kind = "none" if policy is None else type(policy).__name__
        raise ValueError(
            f"policy must be one that draws its actions and knows their density, got {kind}: "
            f"problem.temperature = {problem.temperature:g} pays for its entropy"
        )
    require_memoryless(policy, paths)
    log_prob = over_steps(policy.log_prob, paths, kept_actions(paths))
    return rewards - problem.temperature * log_prob * as_like(paths.grid.steps, rewards)


def ends_at_horizon(problem: ControlProblem, grid: TimeGrid) -> bool:
    """Whether the last node is the horizon, where the terminal reward is paid."""
    gap = abs(float(grid.nodes[-1]) - problem.horizon)
    return math.isfinite(problem.horizon) and gap <= 1e-6 * problem.horizon  # float32 grids


def require_whole(problem: ControlProblem, grid: TimeGrid) -> None:
    """Refuse paths that end before the horizon, where a sum to the horizon is asked for.

    Raises:
        ValueError: the last node is not the horizon (an infinite one has no end).
    """
    if not ends_at_horizon(problem, grid):
        raise ValueError(
            f"grid must end at the horizon {problem.horizon:g}, or what comes after its end is "
            f"left out, got {float(grid.nodes[-1]):g}; where the horizon is infinite or the paths "
            "are cut short, use what puts a value function at their end: martingale.ctd0 or "
            "ctd_lambda, q_learning.orthogonality_loss, temporal_difference_gradient"
        )


def returns_to_go(
    problem: ControlProblem, paths: Paths, policy: Policy | None = None
) -> Float[Tensor, "paths nodes"]:
    """Discounted reward from every node to the horizon, discounted to that node's time.

    Args:
        problem: which pays.
        paths: with their actions.
        policy: that drew the actions; needed where the problem rewards its entropy.

    Raises:
        ValueError: the grid does not end at the horizon (an infinite one has no end); a reward is
            not one finite number for each path; or the policy is missing.
    """
    require_whole(problem, paths.grid)
    rewards = regularised_rewards(problem, paths, policy)
    terminal = terminal_rewards(problem, paths.states[:, -1])
    discount = discount_rates(problem, paths)
    keep = torch.exp(-discount * as_like(paths.grid.steps, rewards))
    returns = [terminal]
    for k in range(rewards.shape[1] - 1, -1, -1):
        returns.append(rewards[:, k] + keep[..., k] * returns[-1])
    return torch.stack(returns[::-1], dim=1)


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
