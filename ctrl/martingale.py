"""Policy evaluation by martingale conditions.

J is the value function of the policy that made the paths if and only if J(T, .) is the terminal
reward and
    M_t = e^{-discount t} J(t, X_t) + int_0^t e^{-discount u} (r + temperature p) du
is a martingale ([JZ22a] Proposition 1), if and only if E int xi_t dM_t = 0 for every adapted xi
(Proposition 2). p = -log pi(a_t | t, X_t) for policies that draw their actions.

Under misspecification each method has its own limit as the steps vanish ([JZ22a] section 4):
    martingale_loss  the L2 projection of the true value
    ctd0, clstd      the solution of the moment equation E int d_theta J dM = 0
    ctd_lambda       the moment equation of decayed features; without decay, the projection again
    cgtd_loss        the moment equation, or the nearest to it that there is
(The sum of squared dM, a tempting loss, tends to E int sigma^2 |grad J|^2 dt instead and is wrong.)

All take a ``policy`` where the problem rewards entropy, and an ``average_reward`` in ergodic
problems, whose J is known up to a constant ([JZ22b] section 5).

Sources  [JZ22a] Jia & Zhou 2022, policy evaluation and temporal-difference learning in continuous
         time and space, JMLR 23.  [JZ22b] the same, policy gradient and actor-critic, JMLR 23.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.advantages import continuous_gae
from ctrl.devices import as_like
from ctrl.paths import OwnTimes, Paths, TimeGrid, over_nodes, stop, while_running
from ctrl.policy import Policy
from ctrl.problem import ControlProblem
from ctrl.returns import discount_rates, regularised_rewards, returns_to_go
from ctrl.user_functions import all_finite, located, no_tensor
from ctrl.value import Value, discount_factors, martingale_increments, values

TestFunctions = Callable[[Paths], Tensor]
"""paths -> [paths, steps, tests]: xi of every step, a function of that path's past alone."""
Features = Callable[[Tensor, Tensor], Tensor]
"""(time [], states [paths, *event]) -> [paths, features]."""


def increments(
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    policy: Policy | None = None,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths steps"]:
    """dM of every step, reward: e^{-discount h} J_{k+1} - J_k + (r + temperature p) h.

    Args:
        value: J.
        problem: which pays.
        paths: with their actions.
        policy: that drew them; needed where the problem rewards its entropy.
        average_reward: per unit of time, in ergodic problems.

    Raises:
        ValueError: a value or reward is not one finite number a path, or the policy is missing.
    """
    rewards = regularised_rewards(problem, paths, policy)
    return martingale_increments(value, problem, paths, rewards, average_reward)


def martingale_loss(
    value: Value, problem: ControlProblem, paths: Paths, policy: Policy | None = None
) -> Float[Tensor, " paths"]:
    """int_0^T |M_T - M_t|^2 dt of every path, reward^2 time ([JZ22a] equation 18).

    = sum_k h_k e^{-2 discount t_k} (G_k - J_k)^2, G the realised return to go. Its gradient goes
    through J.

    Args:
        value: J.
        problem: which pays; of finite horizon.
        paths: with their actions, to the horizon.
        policy: that drew them; needed where the problem rewards its entropy.

    Raises:
        ValueError: the grid ends before the horizon, as any does where that is infinite.
    """
    returns = returns_to_go(problem, paths, policy)
    gap = (returns - values(value, problem, paths))[:, :-1]
    h = as_like(paths.grid.steps, gap)
    return (h * (discount_factors(problem, paths) * gap).square()).sum(1)


def orthogonality(
    tests: TestFunctions,
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    policy: Policy | None = None,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths tests"]:
    """int_0^T xi_t dM_t of every path and test function; each has mean 0 for the true value.

    Args:
        tests: adapted test functions; ``features_along`` makes them of functions of (t, x).
        value: J.
        problem: which pays.
        paths: with their actions.
        policy: that drew them; needed where the problem rewards its entropy.
        average_reward: per unit of time, in ergodic problems.

    Raises:
        ValueError: a test function looks at its own step's action or noise or at the future of the
            path, or mixes paths (then the mean need not be 0 for the true value); or its shape is
            not [paths, steps, tests].
    """
    dm = increments(value, problem, paths, policy, average_reward)
    return moments(tests, dm, problem, paths, sees_action=False)


def moments(
    tests: TestFunctions,
    increments: Float[Tensor, "paths steps"],
    problem: ControlProblem,
    paths: Paths,
    *,
    sees_action: bool,
) -> Float[Tensor, "paths tests"]:
    """sum_k e^{-discount t_k} xi_k dM_k for adapted xi.

    Args:
        tests: paths -> [paths, steps, tests].
        increments: dM, each discounted to its own step's time.
        problem: whose discount counts.
        paths: that both belong to.
        sees_action: whether xi may depend on the action of its own step.

    Raises:
        ValueError: xi looks ahead, is not finite or has another shape.
    """
    xi = tests(paths)
    if xi.ndim != 3 or xi.shape[:2] != increments.shape:
        begin = list(increments.shape)
        raise ValueError(f"tests must return [*{begin}, tests], got {list(xi.shape)}")
    require_adapted(tests, paths, sees_action=sees_action)
    weighted = discount_factors(problem, paths) * increments
    return torch.einsum("pk,pkm->pm", weighted, all_finite("tests", xi))


def features_along(features: Features) -> TestFunctions:
    """Test functions of the present, xi_k = phi(t_k, X_k)."""
    return lambda paths: _features_at_nodes(features, paths)[:, :-1]


def _features_at_nodes(features: Features, paths: Paths) -> Float[Tensor, "paths nodes features"]:
    """Features at every node, refused where they are not a row for each path."""

    def at(t: Tensor, x: Tensor) -> Tensor:
        return _rows(located("features", features, t, x), len(x))

    return over_nodes(at, paths)


def _rows(phi: Tensor, paths: int, count: int | None = None) -> Float[Tensor, "paths features"]:
    if not isinstance(phi, Tensor):
        raise no_tensor("features", phi, _wanted(paths, count), f"({paths}, 1)")
    if phi.ndim != 2 or len(phi) != paths or count not in (None, phi.shape[1]):
        remedy = ": .unsqueeze(1) makes one a column" if phi.shape == (paths,) else ""
        wanted = _wanted(paths, count)
        raise ValueError(f"features must return {wanted}, got {list(phi.shape)}{remedy}")
    return phi


def _wanted(paths: int, count: int | None) -> str:
    return f"[{paths}, {'features' if count is None else count}]"


def require_adapted(tests: TestFunctions, paths: Paths, *, sees_action: bool) -> None:
    """Refuse test functions that look ahead.

    Each step's future is replaced by other numbers, on two of the paths, and xi of that step must
    not move. So every step is tried, in one call of ``tests`` with two paths for each.

    Args:
        tests: paths -> [paths, steps, tests].
        paths: the paths that it will be used on.
        sees_action: whether the action of its own step counts as known (it does for q-rates, not
            for values: dM of that step depends on it).

    Raises:
        ValueError: xi of some step depends on what comes after it, or not on the given paths.
    """
    steps, few = paths.states.shape[1] - 1, min(2, len(paths.states))

    grid = paths.grid
    if isinstance(grid, OwnTimes):  # any times will do: it is the same function of each path
        first, last = float(grid.nodes.min()), float(grid.nodes.max())
        nodes = torch.linspace(first, last, steps + 1, dtype=grid.nodes.dtype)
        grid = TimeGrid(nodes.to(grid.nodes.device))

    def probes(change: bool) -> Paths:
        def altered(whole: Tensor | None, known: int) -> Tensor | None:
            if whole is None:
                return None
            rows = whole[:few].detach().repeat(steps, *[1] * (whole.ndim - 1))
            if not change:
                return rows
            probe = torch.arange(steps, device=rows.device).repeat_interleave(few)
            node = torch.arange(rows.shape[1], device=rows.device)
            future = (node[None] >= probe[:, None] + known).view(
                *rows.shape[:2], *[1] * (rows.ndim - 2)
            )
            return torch.where(future, 0.7 - 1.3 * rows, rows)

        ends = paths.ends
        if ends is not None:  # when a path ends is part of its future too
            ends = ends[:few].repeat(steps)
            probe = torch.arange(steps, device=ends.device).repeat_interleave(few).to(ends)
            other = torch.where(ends == probe + 1, steps, probe + 1)
            ends = torch.where((ends > probe) & change, other, ends).to(paths.ends)

        states = altered(paths.states, 1)
        assert states is not None
        altered_paths = replace(
            paths,
            states=states,
            actions=altered(paths.actions, int(sees_action)),
            increments=altered(paths.increments, 0),
            rewards=altered(paths.rewards, 0),
            jumps=altered(paths.jumps, 0),
            weights=None,
            ends=None,
            terminated=None,
            grid=grid,
        )
        return altered_paths if ends is None else stop(altered_paths, ends)

    with torch.no_grad():
        before, after = tests(probes(False)), tests(probes(True))
    probe = torch.arange(steps, device=before.device).repeat_interleave(few)
    if before.shape[:2] != (len(probe), steps) or after.shape != before.shape:
        raise ValueError(
            f"tests must be made of the paths that they are given, [{len(probe)}, {steps}, tests] "
            f"for {len(probe)} of them, got {list(before.shape)}"
        )
    row = torch.arange(len(before), device=before.device)
    gap = (before[row, probe] - after[row, probe]).abs().reshape(len(row), -1).amax(1)
    scale = before[row, probe].abs().reshape(len(row), -1).amax(1)
    # batched arithmetic rounds differently
    changed = gap > 1e3 * torch.finfo(gap.dtype).eps * scale
    if bool(changed.any()):
        k = int(probe[changed.nonzero()[0, 0]])
        raise ValueError(
            f"tests must be adapted: at step {k} a test function "
            "changes with what happens after it (or with other paths); let it depend on its own "
            "path up to that node alone"
        )


def ctd0(
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    policy: Policy | None = None,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " paths"]:
    """Continuous TD(0): a loss whose gradient is -int d_theta J dM ([JZ22a] section 4.2).

    Descending it is the semi-gradient update theta += d_theta J dM; dM is held fixed. Only the
    gradient of this number means something.

    Args:
        value: J.
        problem: which pays.
        paths: with their actions.
        policy: that drew them; needed where the problem rewards its entropy.
        average_reward: per unit of time, in ergodic problems.
    """
    dm = increments(value, problem, paths, policy, average_reward).detach()
    along = values(value, problem, paths)[:, :-1]
    return -(discount_factors(problem, paths) * along * dm).sum(1)


def ctd_lambda(
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    decay: float,
    policy: Policy | None = None,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " paths"]:
    """Continuous TD(lambda): a loss whose gradient is -int xi dM ([JZ22a] section 4.2).

    xi_t = int_0^t e^{-decay (t - u)} d_theta J du, that is lambda = e^{-decay} for a unit of time,
    on any grid. Summed by parts: -sum_k h_k d_theta J_k A_k, A the generalised advantage at this
    rate. In undiscounted problems and without decay this is half the martingale loss's gradient.

    Args:
        value: J.
        problem: which pays.
        paths: with their actions.
        decay: of the past features, 1/time; at least 0 and finite (``ctd0`` is the other end).
        policy: that drew the actions; needed where the problem rewards its entropy.
        average_reward: per unit of time, in ergodic problems.

    Raises:
        ValueError: ``decay`` is negative or not finite.
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be at least 0 and finite, got {decay}")
    along = values(value, problem, paths)
    h = as_like(paths.grid.steps, along)
    rewards = regularised_rewards(problem, paths, policy) - average_reward * h
    discount = discount_rates(problem, paths)
    running = None if paths.ends is None else paths.running
    advantages = continuous_gae(along, rewards, h, decay, discount, running).detach()
    return -(discount_factors(problem, paths) * h * along[:, :-1] * advantages).sum(1)


@dataclass(frozen=True, eq=False)
class LinearValue:
    """J(t, x) = base(t, x) + coefficients . features(t, x), a ``Value``.

    Attributes:
        features: (t, states) -> [paths, features].
        coefficients: one of each feature, reward.
        base: a value to add, such as the terminal reward; 0 if left out.
        average_reward: of an ergodic problem, reward/time.
    """

    features: Features
    coefficients: Float[Tensor, " features"]
    base: Value | None = None
    average_reward: float = 0.0

    def __call__(self, t: Tensor, states: Float[Tensor, " paths *event"]) -> Tensor:
        """J at (t, x), reward."""
        phi = _rows(self.features(t, states), len(states), len(self.coefficients))
        fitted = phi @ self.coefficients
        return fitted if self.base is None else fitted + self.base(t, states)


def clstd(
    features: Features,
    problem: ControlProblem,
    paths: Paths,
    policy: Policy | None = None,
    *,
    base: Value | None = None,
    ergodic: bool = False,
) -> LinearValue:
    """Continuous least-squares TD: the root of E int phi dM = 0 ([JZ22a] section 4.3).

    Args:
        features: phi(t, x); in an ergodic problem without a constant, which J does not determine.
        problem: which pays.
        paths: with their actions; their weights count.
        policy: that drew the actions; needed where the problem rewards its entropy.
        base: a known part of J (the terminal reward, say, where the features vanish at T).
        ergodic: whether to find the average reward too, with the test function 1.

    Returns:
        The value function, with the average reward where it was asked for.

    Raises:
        ValueError: the features do not determine the coefficients, or a feature is not finite.
    """
    if ergodic and (problem.discount or math.isfinite(problem.horizon)):
        raise ValueError(
            "problem must be undiscounted and of infinite horizon to be ergodic, got discount "
            f"{problem.discount} and horizon {problem.horizon:g}"
        )
    phi = all_finite("features", _features_at_nodes(features, paths))

    def column(j: int) -> Value:
        return lambda t, x: features(t, x)[:, j]

    h = as_like(paths.grid.steps, paths.states)
    nothing = phi.new_zeros(phi.shape[0], phi.shape[1] - 1)
    unpaid = replace(problem, terminal_reward=None, exit_reward=None)
    moves = [martingale_increments(column(j), unpaid, paths, nothing) for j in range(phi.shape[2])]
    known = base if base is not None else _zero
    rewards = regularised_rewards(problem, paths, policy)
    constant = martingale_increments(known, problem, paths, rewards)
    tests = phi[:, :-1]
    if ergodic:
        moves.append(-while_running(h.expand_as(nothing), paths))
        tests = torch.cat([tests, torch.ones_like(tests[..., :1])], dim=2)
    weights = paths.weights
    if weights is None:
        weights = torch.full_like(phi[:, 0, 0], 1 / len(phi))
    discounts = discount_factors(problem, paths)
    weighted = weights[:, None, None] * discounts[..., None] * tests
    matrix = torch.einsum("pki,pkj->ij", weighted, torch.stack(moves, dim=2))
    target = -torch.einsum("pki,pk->i", weighted, constant)
    if bool(torch.linalg.cond(matrix) > 0.1 / torch.finfo(matrix.dtype).eps):
        raise ValueError(
            "features do not determine the coefficients: some combination of them is a martingale "
            "along these paths (a constant, in an ergodic or undiscounted problem), or they depend "
            "on one another"
        )
    solution = torch.linalg.solve(matrix, target)
    if not ergodic:
        return LinearValue(features, solution, base)
    return LinearValue(features, solution[:-1], base, float(solution[-1]))


def cgtd_loss(
    tests: TestFunctions,
    value: Value,
    problem: ControlProblem,
    paths: Paths,
    policy: Policy | None = None,
    average_reward: float | Float[Tensor, ""] = 0.0,
    *,
    weighting: Literal["identity", "covariance"] = "identity",
) -> Float[Tensor, ""]:
    """Continuous gradient TD: m' A m / 2 of the mean m = E int xi dM ([JZ22a] section 4.4).

    With A = 1, or A = (E int xi xi' dt)^{-1}. The square of a sample mean is biased up by its
    variance, O(1 / paths), which does not move the root where there is one.

    Args:
        tests: adapted test functions, at least as many as parameters.
        value: J; the gradient goes through it, in dM.
        problem: which pays.
        paths: with their actions; their weights count.
        policy: that drew the actions; needed where the problem rewards its entropy.
        average_reward: per unit of time, in ergodic problems.
        weighting: A.

    Raises:
        ValueError: ``weighting`` is unknown, or as ``orthogonality``.
    """
    if weighting not in ("identity", "covariance"):
        raise ValueError(f"weighting must be 'identity' or 'covariance', got {weighting!r}")
    each = orthogonality(tests, value, problem, paths, policy, average_reward)
    weights = each.new_full((len(each),), 1 / len(each)) if paths.weights is None else paths.weights
    mean = weights @ each
    if weighting == "identity":
        return 0.5 * mean.square().sum()
    xi, h = tests(paths).detach(), as_like(paths.grid.steps, each)
    xi = while_running(xi, paths)
    covariance = torch.einsum("pk,pki,pkj->ij", weights[:, None] * h, xi, xi)
    return 0.5 * mean @ torch.linalg.solve(covariance, mean)


def _zero(t: Tensor, states: Tensor) -> Tensor:
    return states.new_zeros(len(states))
