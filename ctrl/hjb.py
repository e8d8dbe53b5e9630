"""The Hamilton-Jacobi-Bellman equation of one or two state coordinates, by finite differences.

    d_t v + gam log int exp(H(t, x, a, v_x, v_xx) / gam) da - delta v = 0      gam > 0
    d_t v + max_a H - delta v = 0                                              gam = 0
    H = b . v_x + 1/2 tr(sigma sigma' v_xx) + r,   v(T, x) = terminal reward
    v = what is paid at the exit, on the walls of the problem's domain, if it has one

([WZZ20] equation 13). The optimal policy is Gibbs, exp(H / gam) over its integral; for gam = 0 the
maximum over the nodes of the action grid, which costs O(distance of the nodes^2) of the value.

Space: a controlled Markov chain (``ctrl.markov_chain``), of order 2 where the noise is strong
enough for its spacing. Time: implicit. What remains is one nonlinear system for each time, which
policy iteration solves; on it, that is Newton's method: quadratic, and monotone from any start.

All of this is in float64 on the CPU, where the problem's functions are called; what comes of it,
``GridFunction``, can be asked on any device (``solution.value.to("cuda")``).

Sources  [KD01] Kushner & Dupuis 2001, numerical methods for stochastic control problems in
         continuous time, 2nd edition, chapters 5 and 6.
         [WZZ20] Wang, Zariphopoulou & Zhou 2020, reinforcement learning in continuous time and
         space: a stochastic control approach, JMLR 21.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.action_grid import ActionGrid, gauss_legendre, trapezoid
from ctrl.bellman import Improvement, PolicyIteration, Solved, backward, gibbs, greedy
from ctrl.exploration import drawn_actions
from ctrl.markov_chain import MarkovChain, absorbing_points, exit_rewards, markov_chain
from ctrl.policy import DeterministicPolicy, GaussianPolicy, Policy, RandomPolicy, mean_action
from ctrl.problem import ControlProblem
from ctrl.state_grid import Axis, GridFunction, grid_points
from ctrl.time_homogeneity import require_time_homogeneous

__all__ = [
    "ActionGrid",
    "Axis",
    "GridFunction",
    "Solution",
    "evaluate_discounted",
    "evaluate_finite_horizon",
    "gauss_legendre",
    "solve_discounted",
    "solve_finite_horizon",
    "trapezoid",
]


@dataclass(frozen=True, eq=False)
class Solution:
    """Value and policy that solve the HJB equation on a grid, functions of (t, x) each.

    Attributes:
        value: V, reward, [paths]; its ``table`` is [times, *nodes].
        mean_action: of the optimal policy, [paths, *action].
        action_std: its standard deviation, of each coordinate, [paths, *action].
        end_mass: probability that it gives to the outermost action nodes, [paths]. Where that is
            not small, the answer is that of actions bounded as the action grid is.
        residual: largest violation of the discrete equation, reward/time.
        iterations: policy iterations, the most that one time took.
    """

    value: GridFunction
    mean_action: GridFunction
    action_std: GridFunction
    end_mass: GridFunction
    residual: float
    iterations: int

    def policy(self) -> DeterministicPolicy | GaussianPolicy:
        """The optimal policy, to be simulated: its mean, and its standard deviation if not 0.

        Where that differs between states by less than 5 % (the walls aside) it is the average,
        a function of time; else a function of (t, states). At walls both are those of a drift that
        is cut off.
        """
        if not bool(self.action_std.table.any()):
            return DeterministicPolicy(self.mean_action)
        inside = self.action_std.table  # at a wall the drift is cut off, and with it the policy
        for i, axis in enumerate(self.action_std.axes):
            inside = inside if axis.periodic else inside.narrow(i + 1, 1, axis.nodes - 2)
        flat = inside.flatten(1, len(self.action_std.axes))  # [times, points, *action]
        std = flat.mean(1)
        if bool(((flat - std.unsqueeze(1)).abs() > 0.05 * std.unsqueeze(1)).any()):
            return GaussianPolicy(self.mean_action, self.action_std)
        return GaussianPolicy(
            self.mean_action, GridFunction((), self.action_std.times, std).at_time
        )


def solve_discounted(
    problem: ControlProblem,
    axes: tuple[Axis, ...],
    actions: ActionGrid,
    *,
    differences: Literal["monotone", "central"] = "monotone",
    tolerance: float = 1e-9,
    iterations: int = 100,
) -> Solution:
    """Without end and discounted: delta v = gam log int exp(H / gam) da, at all times the same.

    Args:
        problem: of infinite horizon, its coefficients the same at all times, its SDE Ito.
        axes: the grid of the states [paths, dim], dim 1 or 2. A reflecting wall keeps the process
            on the grid, which moves the value near it: take axes wider than what is needed. Where
            the problem has a domain, nodes on and beyond its walls are absorbing, with what is paid
            there as the value: let the first or last node of an axis be on the wall.
        actions: over which the policy is optimised.
        differences: "monotone", or "central" (``ctrl.markov_chain.markov_chain``).
        tolerance: largest last change of v, in units of 1 + max |v|.
        iterations: allowed before giving up.

    Raises:
        ValueError: the problem is not of this kind; it has not as many coordinates as ``axes``; a
            coefficient is not finite or has a wrong shape; the noises are correlated too strongly
            for the grid and monotone differences; one action node has most of the mass of the Gibbs
            policy, so that the action grid is too coarse.
        RuntimeError: no convergence.
    """
    _check(problem, axes, differences)
    if not math.isinf(problem.horizon):
        raise ValueError(
            f"horizon must be infinite, got {problem.horizon}; solve_finite_horizon is for others"
        )
    with torch.no_grad(), _on_the_cpu():
        points = grid_points(axes)
        discount = _positive_discount(problem, axes)
        for action in actions.nodes[[0, len(actions.nodes) // 2, -1]].to(points):
            require_time_homogeneous(problem, points, action.expand(len(points), *action.shape))
        each, monotone = actions.nodes.unsqueeze(1), differences == "monotone"
        chain = markov_chain(problem, axes, 0.0, each, monotone=monotone)
        start = chain.rewards.new_zeros(chain.rewards.shape[1])
        solved = PolicyIteration(tolerance, iterations).solve(
            chain, _best(problem, actions), discount(0.0), torch.zeros_like(start), start
        )
        return _solution(problem, axes, actions, torch.zeros(1), iter([solved]))


def solve_finite_horizon(
    problem: ControlProblem,
    axes: tuple[Axis, ...],
    actions: ActionGrid,
    *,
    steps: int,
    order: Literal[1, 2] = 2,
    differences: Literal["monotone", "central"] = "monotone",
    tolerance: float = 1e-9,
    iterations: int = 100,
) -> Solution:
    """Back from the terminal reward in equal implicit steps.

    Args:
        problem: of finite horizon, its SDE Ito.
        axes: as for ``solve_discounted``.
        actions: over which the policy is optimised.
        steps: in time.
        order: of the error in time. 1: backward Euler, which keeps a monotone scheme monotone. 2:
            the backward differentiation formula of two steps (the first by backward Euler), stable
            for steps of any size but monotone for none: take 1 for a rough terminal reward.
        differences: "monotone", or "central" (``ctrl.markov_chain.markov_chain``).
        tolerance: as for ``solve_discounted``.
        iterations: allowed at each time.

    Raises:
        ValueError: as for ``solve_discounted``, or ``steps`` or ``order`` is not allowed.
        RuntimeError: no convergence.
    """
    _check(problem, axes, differences)
    with torch.no_grad(), _on_the_cpu():
        each = actions.nodes.unsqueeze(1)
        method, improve = PolicyIteration(tolerance, iterations), _best(problem, actions)

        def at(t: float) -> tuple[MarkovChain, Improvement]:
            monotone = differences == "monotone"
            return markov_chain(problem, axes, t, each, monotone=monotone), improve

        times = _times(problem, steps, order)
        discount = _discount(problem, axes)
        solved = backward(at, times, _terminal(problem, axes), discount, method, order)
        return _solution(problem, axes, actions, times, solved)


def evaluate_discounted(
    problem: ControlProblem,
    policy: Policy,
    axes: tuple[Axis, ...],
    *,
    action_nodes: int = 8,
    differences: Literal["monotone", "central"] = "monotone",
) -> GridFunction:
    """The value of a given policy, entropy included, without end and discounted.

    Args:
        problem: as for ``solve_discounted``.
        policy: deterministic or Gaussian, the same at all times.
        axes: as for ``solve_discounted``.
        action_nodes: of the Gauss-Hermite rule for each coordinate of a random action.
        differences: as for ``solve_discounted``.

    Raises:
        ValueError: as for ``solve_discounted``.
    """
    _check(problem, axes, differences)
    if not math.isinf(problem.horizon):
        raise ValueError(f"horizon must be infinite, got {problem.horizon}")
    with torch.no_grad(), _on_the_cpu():
        points = grid_points(axes)
        discount = _positive_discount(problem, axes)
        taken = mean_action(policy, points.new_tensor(0.0), points)
        require_time_homogeneous(problem, points, taken, policy)
        monotone = differences == "monotone"
        chain, mean = _given(problem, policy, axes, 0.0, action_nodes, monotone)
        zero = chain.rewards.new_zeros(chain.rewards.shape[1])
        best, mass = mean(chain.hamiltonian(zero))
        source = chain.residual(best, discount(0.0), zero)
        v = chain.resolvent(mass, discount(0.0), source)
        return _function(axes, torch.zeros(1), [v])


def evaluate_finite_horizon(
    problem: ControlProblem,
    policy: Policy,
    axes: tuple[Axis, ...],
    *,
    steps: int,
    order: Literal[1, 2] = 2,
    action_nodes: int = 8,
    differences: Literal["monotone", "central"] = "monotone",
) -> GridFunction:
    """The value of a given policy, entropy included, over a finite horizon.

    Args:
        problem: as for ``solve_finite_horizon``.
        policy: deterministic or Gaussian.
        axes: as for ``solve_discounted``.
        steps: in time.
        order: in time, as for ``solve_finite_horizon``.
        action_nodes: of the Gauss-Hermite rule for each coordinate of a random action.
        differences: as for ``solve_discounted``.

    Raises:
        ValueError: as for ``solve_finite_horizon``.
    """
    _check(problem, axes, differences)
    with torch.no_grad(), _on_the_cpu():

        def at(t: float) -> tuple[MarkovChain, Improvement]:
            return _given(problem, policy, axes, t, action_nodes, differences == "monotone")

        times = _times(problem, steps, order)
        solved = backward(
            at,
            times,
            _terminal(problem, axes),
            _discount(problem, axes),
            PolicyIteration(1e-9, 5),
            order,
        )
        return _function(axes, times, [one.v for one in solved])


def _times(problem: ControlProblem, steps: int, order: int) -> Float[Tensor, " times"]:
    if math.isinf(problem.horizon):
        raise ValueError("horizon must be finite; solve_discounted is for infinite ones")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer, at least 1, got {steps!r}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    return torch.linspace(0, problem.horizon, steps + 1, dtype=torch.float64)


def _discount(problem: ControlProblem, axes: tuple[Axis, ...]) -> Callable[[float], float | Tensor]:
    """The rate of discounting of a time, a number or one at every point, 1/time."""
    points = grid_points(axes)

    def at(t: float) -> float | Tensor:
        rate = problem.discount_at(points.new_tensor(t), points)
        return rate.to(points) if isinstance(rate, Tensor) else rate

    return at


def _positive_discount(
    problem: ControlProblem, axes: tuple[Axis, ...]
) -> Callable[[float], float | Tensor]:
    """The same, refused where it is 0 on all of the grid and paths never end."""
    discount = _discount(problem, axes)
    if problem.domain is None and not bool(torch.as_tensor(discount(0.0)).any()):
        raise ValueError(
            "discount must be positive where the horizon is infinite and no domain is left, got 0"
        )
    return discount


def _given(
    problem: ControlProblem,
    policy: Policy,
    axes: tuple[Axis, ...],
    t: float,
    action_nodes: int,
    monotone: bool,
) -> tuple[MarkovChain, Improvement]:
    """The chain of a policy's own actions, and their mean."""
    points = grid_points(axes)
    time = points.new_tensor(t)
    mean = mean_action(policy, time, points)
    entropy = points.new_zeros(len(points))
    rule = [(1.0, mean)]
    if policy.is_random:
        if not isinstance(policy, RandomPolicy):
            raise TypeError(f"policy must have a density, got {type(policy).__name__}")
        rule = list(drawn_actions(policy, time, mean, action_nodes, points))
        if problem.temperature:
            entropy = policy.entropy(time, points)
    weights = points.new_tensor([weight for weight, _ in rule]).unsqueeze(1)
    actions = torch.stack([action for _, action in rule])
    chain = markov_chain(problem, axes, t, actions, monotone=monotone)
    bonus = problem.temperature * entropy
    return chain, lambda H: ((weights * H).sum(0) + bonus, weights.expand_as(H))


def _best(problem: ControlProblem, actions: ActionGrid) -> Improvement:
    if problem.temperature == 0:
        return greedy
    return gibbs(actions.weights, problem.temperature)


def _terminal(problem: ControlProblem, axes: tuple[Axis, ...]) -> Float[Tensor, " points"]:
    points = grid_points(axes)
    absorbing = absorbing_points(problem, axes, problem.horizon)
    if absorbing is not None:
        paid = exit_rewards(problem, problem.horizon, points, absorbing)
        without = replace(problem, domain=None, exit_reward=None)
        return torch.where(absorbing, paid, _terminal(without, axes))
    if problem.terminal_reward is None:
        return points.new_zeros(len(points))
    v = problem.terminal_reward(points)
    if v.shape != points.shape[:1] or not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"terminal_reward must return [{len(points)}] finite numbers, one for each state, got "
            f"{list(v.shape)}"
        )
    return v.to(points)


def _solution(
    problem: ControlProblem,
    axes: tuple[Axis, ...],
    actions: ActionGrid,
    times: Tensor,
    solved: Iterator[Solved],
) -> Solution:
    ends = actions.ends().to(torch.float64)
    nearest = _nearest_inside(problem, axes)
    v: list[Tensor] = []
    moments: list[tuple[Tensor, Tensor]] = []
    end_mass: list[Tensor] = []
    residual, iterations = 0.0, 0
    for one in solved:
        largest = float(one.mass.max())
        if problem.temperature > 0 and largest > 0.6:
            raise ValueError(
                f"actions must resolve the Gibbs policy, but one node has {largest:.2g} of its "
                "mass (at most 0.6): take more nodes, or temperature 0"
            )
        v.append(one.v)
        mass = one.mass if nearest is None else one.mass[:, nearest]
        moments.append(actions.moments(mass))
        end_mass.append(ends @ mass)
        residual, iterations = max(residual, one.residual), max(iterations, one.iterations)
    return Solution(
        value=_function(axes, times, v),
        mean_action=_function(axes, times, [mean for mean, _ in moments]),
        action_std=_function(axes, times, [std for _, std in moments]),
        end_mass=_function(axes, times, end_mass),
        residual=residual,
        iterations=iterations,
    )


def _nearest_inside(problem: ControlProblem, axes: tuple[Axis, ...]) -> Tensor | None:
    """Whose policy stands at each point: at an absorbing one, which has none, its neighbour's."""
    end = 0.0 if math.isinf(problem.horizon) else problem.horizon
    absorbing = absorbing_points(problem, axes, end)
    if absorbing is None:
        return None
    points = grid_points(axes) / torch.tensor([axis.spacing for axis in axes]).to(torch.float64)
    inside, nearest = (~absorbing).nonzero().squeeze(1), torch.arange(len(points))
    some = [torch.cdist(each, points[inside]).argmin(1) for each in points[absorbing].split(64)]
    nearest[absorbing] = inside[torch.cat(some)]
    return nearest


def _function(axes: tuple[Axis, ...], times: Tensor, rows: list[Tensor]) -> GridFunction:
    """The solution on the grid, from values that were computed from the last time to the first."""
    table = torch.stack(rows[::-1])
    shape = [axis.nodes for axis in axes]
    return GridFunction(axes, times, table.view(len(rows), *shape, *table.shape[2:]))


@contextmanager
def _on_the_cpu() -> Generator[None, None, None]:
    """Calls of a user's functions with tensors of the CPU, refused by name where these do not fit.

    Raises:
        ValueError: the functions hold tensors of another device.
    """
    try:
        yield
    except RuntimeError as error:
        if "device" not in str(error):
            raise
        raise ValueError(
            "the problem's and the policy's functions must take tensors of the CPU, where the HJB "
            f"equation is solved: move what they hold there (.cpu()). Torch says: {error}"
        ) from error


def _check(problem: ControlProblem, axes: tuple[Axis, ...], differences: str) -> None:
    if not isinstance(problem, ControlProblem):
        raise TypeError(f"problem must be a ControlProblem, got {type(problem).__name__}")
    if not 1 <= len(axes) <= 2 or not all(isinstance(axis, Axis) for axis in axes):
        raise ValueError(f"axes must be one or two of Axis, got {axes}")
    if differences not in ("monotone", "central"):
        raise ValueError(f"differences must be 'monotone' or 'central', got {differences!r}")
    problem.dynamics.require_calculus("ito", "the HJB solver")
    problem.dynamics.require_no_jumps("the HJB solver's grid has no integral over their sizes")
