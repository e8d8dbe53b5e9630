"""The q-rate, and learning it together with the value.

    q(t, x, a) = d_t V + b . grad V + 1/2 tr(sigma sigma' Hess V) + r - discount V
the rate at which acting a once beats following the policy; what is left of the Q-function when the
steps vanish ([JZ23] equation 14).

For a policy pi:    E_{a ~ pi}[ q - temperature log pi ] = 0                      (consistency)
At the optimum:     int exp(q / temperature) da = 1,  pi = exp(q / temperature)   (normalisation)
and (V, q) is the value and q-rate of pi, or the optimal pair, if and only if beside that
    e^{-discount s} V(s, X_s) + int e^{-discount u} (r - q)(u, X_u, a_u) du
is a martingale along paths of pi, or of any policy whatever ([JZ23] Theorems 6, 7 and 9).

Sources  [JZ23] Jia & Zhou 2023, q-learning in continuous time, JMLR 24.
         [TZ24] Tang & Zhou 2024, regret of exploratory policy improvement and q-learning,
         arXiv 2411.01302.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, readable, require
from ctrl.exploration import drawn_actions
from ctrl.martingale import TestFunctions, moments
from ctrl.paths import Paths, kept_actions, over_steps, require_dynamics, require_kinds
from ctrl.policy import MultivariateGaussianPolicy, RandomPolicy
from ctrl.problem import ControlProblem
from ctrl.returns import require_whole, running_rewards
from ctrl.user_functions import all_finite, call, one_a_path
from ctrl.value import Value, discount_factors, generator, martingale_increments, values

QRate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths], reward/time."""


def q_rate(
    problem: ControlProblem,
    value: Value,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
    probes: Float[Tensor, "paths probes *noise"] | None = None,
) -> Float[Tensor, " paths"]:
    """q(t, x, a) of a value function, reward/time ([JZ23] equation 14).

    Args:
        problem: whose dynamics, running reward and discount count.
        value: V; differentiable by ``torch.func.jvp``, twice in x and once in t.
        t: time, [].
        states: x.
        actions: a.
        probes: as for ``value.generator``; the exact trace if not given.

    Raises:
        ValueError: there is not one action for each state, or V or the reward is not one number a
            path.
    """
    if actions.ndim < 1 or len(actions) != len(states) or not len(states):
        raise ValueError(
            f"actions must begin with {len(states)}, one for each of at least one state, got "
            f"{list(actions.shape)}"
        )
    rate = generator(problem.dynamics, value, t, states, actions, probes)
    if problem.discount:
        rate = rate - problem.discount_at(t, states) * value(t, states)
    if problem.running_reward is not None:
        reward = call("running_reward", problem.running_reward, t, states, actions)
        rate = rate + one_a_path("running_reward", reward, len(states))
    return rate


def q_rates(
    problem: ControlProblem,
    value: Value,
    paths: Paths,
    probes: Float[Tensor, "paths steps probes *noise"] | None = None,
) -> Float[Tensor, "paths steps"]:
    """The q-rate of every action of the paths, reward/time.

    Args:
        problem: whose dynamics, running reward and discount count.
        value: as for ``q_rate``.
        paths: simulated by ``problem.sde``, with their actions.
        probes: random signs that estimate the trace of the Hessian without bias
            (``noise.random_signs``, ``value.generator``), for states of many dimensions; the exact
            trace, two evaluations of V for each Brownian motion, if not given.

    Raises:
        ValueError: a black box simulated the paths; V or one of its derivatives is not finite; or
            as ``q_rate``.
    """
    require_kinds(problem, paths)
    require_dynamics(paths)

    def at(t: Tensor, x: Tensor, a: Tensor, *signs: Tensor) -> Tensor:
        return q_rate(problem, value, t, x, a, *signs)

    event = tuple(paths.states.shape[2:])
    motions = math.prod(problem.dynamics.noise_shape(event)) if probes is None else probes.shape[2]
    more = () if probes is None else (probes,)
    each = over_steps(at, paths, kept_actions(paths), *more, copies=motions)
    return all_finite("q (of value, running_reward and sde)", each)


@dataclass(frozen=True, eq=False)
class GibbsQ:
    """q = temperature log pi: normalised exactly, and its Gibbs policy is pi.

    The optimal q-rate has this form ([JZ23] Proposition 8), so parametrise pi and learn this.

    Attributes:
        policy: pi, with a density.
        temperature: reward per nat and unit of time; positive.
    """

    policy: RandomPolicy
    temperature: float

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RandomPolicy):
            raise TypeError(f"policy must have a density, got {type(self.policy).__name__}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def __call__(self, t: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """q(t, x, a), reward/time."""
        return self.temperature * self.policy.log_prob(t, states, actions)


@dataclass(frozen=True, eq=False)
class ConsistentQ:
    """Any q, shifted so that E_{a ~ pi}[ q - temperature log pi ] = 0 for a Gaussian pi.

    The expectation is a Gauss-Hermite sum: exact for q polynomial in a of degree below 2 nodes, as
    in linear-quadratic problems.

    Attributes:
        q: (t, x, a) -> [paths], reward/time.
        policy: pi, one of the Gaussian policies.
        temperature: reward per nat and unit of time; may be 0.
        nodes: of the rule for each coordinate of the action.
    """

    q: QRate
    policy: RandomPolicy
    temperature: float
    nodes: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RandomPolicy):
            raise TypeError(f"policy must have a density, got {type(self.policy).__name__}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1, got {self.nodes}")

    def __call__(self, t: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """q(t, x, a) less its mean under the policy, plus the entropy's share, reward/time."""
        mean = self.policy.mean(t, states)
        average = torch.zeros_like(mean.flatten(1)[:, 0])
        for weight, action in drawn_actions(self.policy, t, mean, self.nodes, states):
            average = average + weight * self.q(t, states, action)
        entropy = self.policy.entropy(t, states)
        return self.q(t, states, actions) - average - self.temperature * entropy


def gibbs_policy(
    problem: ControlProblem,
    value: Value,
    action_dim: int,
    state: Float[Tensor, " *event"] | None = None,
) -> MultivariateGaussianPolicy:
    """Policy improvement: pi proportional to exp(q / temperature), for q quadratic in the action.

    With q(t, x, .) of Hessian -H and maximiser m it is N(m, temperature H^{-1}) ([JZ23] equation
    17). So it is where drift and action cost are linear and quadratic in the action, as for every
    diffusion model; where H depends on the state, so does the covariance. Slope and Hessian come
    from differences of q, which are exact for a quadratic.

    Args:
        problem: with a positive temperature.
        value: V of the policy to improve.
        action_dim: coordinates of the action.
        state: any one state, where H depends on t alone: it is taken there, once for all paths.

    Raises:
        ValueError: the temperature is 0. When the policy acts: q is not quadratic and concave in
            the action, or H depends on the state and one was given.
    """
    if problem.temperature <= 0:
        raise ValueError(f"problem.temperature must be positive, got {problem.temperature:g}")

    def mean(t: Tensor, states: Tensor) -> Tensor:
        slope, hessian = _quadratic(problem, value, action_dim, t, states)
        if state is not None:
            one = as_like(state, states).unsqueeze(0)
            here = _quadratic(problem, value, action_dim, t, one)[1]
            gap = (hessian - here).abs().max()
            require(~(gap > _digits(states) * here.abs().max()), lambda: ValueError(_NO_COVARIANCE))
        return torch.linalg.solve(-hessian, slope)

    def scale_at(t: Tensor, states: Tensor) -> Tensor:
        _, hessian = _quadratic(problem, value, action_dim, t, states)
        return _scale(hessian, problem.temperature)

    def scale(t: Tensor) -> Tensor:
        assert state is not None
        return scale_at(t, state.unsqueeze(0))[0]

    return MultivariateGaussianPolicy(mean, scale_at if state is None else scale)


def improved_policy(q: QRate, temperature: float, action_dim: int) -> MultivariateGaussianPolicy:
    """The Gibbs policy of a learned q that is quadratic in the action ([JZ23] equation 17).

    As ``gibbs_policy``, for a q that was learned from paths and needs no dynamics.

    Args:
        q: (t, x, a) -> [paths], reward/time; quadratic and concave in the action.
        temperature: positive, reward per nat and unit of time.
        action_dim: coordinates of the action.

    Raises:
        ValueError: the temperature is not positive. When the policy acts: q is not quadratic and
            concave in the action.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")

    def pieces(t: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        def of_action(a: Tensor) -> Tensor:
            return q(t, states, a.expand(len(states), action_dim))

        return _slope_and_hessian(of_action, action_dim, states)

    def mean(t: Tensor, states: Tensor) -> Tensor:
        slope, hessian = pieces(t, states)
        return torch.linalg.solve(-hessian, slope)

    def scale(t: Tensor, states: Tensor) -> Tensor:
        return _scale(pieces(t, states)[1], temperature)

    return MultivariateGaussianPolicy(mean, scale)


def _scale(
    hessian: Float[Tensor, "paths dim dim"], temperature: float
) -> Float[Tensor, "paths dim dim"]:
    """Cholesky factor of temperature (-Hessian)^{-1}."""
    factor, failed = torch.linalg.cholesky_ex(-hessian)
    concave = (failed == 0).all()
    if readable(concave):  # inside vmap nothing is, and the factor is NaN where there is none
        require(
            concave, lambda: ValueError("q is not concave in the action: no Gibbs policy exists")
        )
    precision = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky_ex(temperature * precision)[0]


def _quadratic(
    problem: ControlProblem, value: Value, dim: int, t: Tensor, states: Tensor
) -> tuple[Float[Tensor, "paths dim"], Float[Tensor, "paths dim dim"]]:
    """Slope and Hessian of the q-rate in the action, at 0."""

    def q(a: Tensor) -> Tensor:
        return q_rate(problem, value, t, states, a.expand(len(states), dim))

    return _slope_and_hessian(q, dim, states)


def _slope_and_hessian(
    q: Callable[[Tensor], Tensor], dim: int, states: Tensor
) -> tuple[Float[Tensor, "paths dim"], Float[Tensor, "paths dim dim"]]:
    """The same of any quadratic function of one action [dim]."""
    unit = torch.eye(dim, dtype=states.dtype, device=states.device)
    here, up, down = q(torch.zeros_like(unit[0])), [q(e) for e in unit], [q(-e) for e in unit]
    slope = torch.stack([(u - d) / 2 for u, d in zip(up, down, strict=True)], dim=1)
    rows = [
        [
            up[i] + down[i] - 2 * here if i == j else q(unit[i] + unit[j]) - up[i] - up[j] + here
            for j in range(dim)
        ]
        for i in range(dim)
    ]
    hessian = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    far, expected = q(2 * unit.sum(0)), here + 2 * slope.sum(1) + 2 * hessian.sum((1, 2))
    slack = _digits(states) * (far.abs().max() + here.abs().max())
    quadratic = ~((far - expected).abs().max() > slack)
    if not readable(quadratic):
        return slope, torch.where(quadratic, hessian, math.nan)
    require(
        quadratic,
        lambda: ValueError("q is not quadratic in the action, so the Gibbs policy is not Gaussian"),
    )
    return slope, hessian


_NO_COVARIANCE = (
    "the Hessian of q in the action depends on the state, so the Gibbs policy has no common "
    "covariance; leave out state, and each state gets its own"
)


def _digits(like: Tensor) -> float:
    """Relative accuracy of second differences: half the digits, at worst."""
    return torch.finfo(like.dtype).eps ** 0.5


def martingale_loss(
    value: Value, q: QRate, problem: ControlProblem, paths: Paths
) -> Float[Tensor, " paths"]:
    """int |M_T - M_t|^2 dt of every path, reward^2 time ([JZ23] equation 34). Offline, on-policy.

    sum_k h_k e^{-2 discount t_k} (terminal reward and (r - q) dt from k on, less V_k)^2. The
    gradient goes through V and q.

    It is stationary at the true pair only along paths of the policy that q's constraint is for:
    M_T depends on q, and d_psi q at a later time is then uncorrelated with M up to it, because
    E_pi[d_psi q] = 0. Off-policy it trades bias for variance; use ``orthogonality_loss``.

    Args:
        value: V.
        q: that satisfies its constraint by construction (``GibbsQ``, ``ConsistentQ``).
        problem: of finite horizon.
        paths: of q's own policy, with their actions, to the horizon.

    Raises:
        ValueError: the grid ends before the horizon, as any does where that is infinite; or a
            number is not finite.
    """
    require_whole(problem, paths)
    dm = increments(value, q, problem, paths)
    discounts = discount_factors(problem, paths)
    ahead = (discounts * dm).flip(1).cumsum(1).flip(1)  # e^{-discount t_k} (G_k - V_k)
    return (as_like(paths.grid.steps, dm) * ahead.square()).sum(1)


def orthogonality_loss(
    value: Value,
    q: QRate,
    problem: ControlProblem,
    paths: Paths,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " paths"]:
    """A loss whose gradient is -int (d_theta V + d_psi q) dM, dM held fixed. On- or off-policy.

    The semi-gradient q-learning of [JZ23] (Algorithms 1 to 3) with test functions xi = d_theta V
    and zeta = d_psi q, which are adapted. Offline over whole paths, online over paths of one step.
    Only the gradient of this number means something.

    Args:
        value: V.
        q: that satisfies its constraint by construction (``GibbsQ``, ``ConsistentQ``).
        problem: whose rewards and discount count.
        paths: with their actions, of any policy.
        average_reward: per unit of time, in ergodic problems.

    Raises:
        ValueError: a number is not finite.
    """
    dm = increments(value, q, problem, paths, average_reward).detach()
    along = values(value, problem, paths)[:, :-1] + rates(q, paths)
    return -(discount_factors(problem, paths) * along * dm).sum(1)


def increments(
    value: Value,
    q: QRate,
    problem: ControlProblem,
    paths: Paths,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths steps"]:
    """dM of every step: e^{-discount h} V_{k+1} - V_k + (r - q) h, discounted to that step's time.

    The entropy is in q: there is no further term for it, on- or off-policy.
    """
    rewards = running_rewards(problem, paths)
    paid = rewards - rates(q, paths) * as_like(paths.grid.steps, rewards)
    return martingale_increments(value, problem, paths, paid, average_reward)


def orthogonality(
    tests: TestFunctions,
    value: Value,
    q: QRate,
    problem: ControlProblem,
    paths: Paths,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths tests"]:
    """int xi dM of every path and test function; each has mean 0 for the true pair.

    Test functions may depend on the action of their own step, and some must: q has mean 0 under
    pi, so functions of the state alone cannot see it.

    Args:
        tests: adapted test functions, paths -> [paths, steps, tests].
        value: V.
        q: the q-rate.
        problem: whose rewards and discount count.
        paths: with their actions, of any policy.
        average_reward: per unit of time, in ergodic problems.

    Raises:
        ValueError: a test function looks ahead, or a number is not finite.
    """
    dm = increments(value, q, problem, paths, average_reward)
    return moments(tests, dm, problem, paths, sees_action=True)


def rates(q: QRate, paths: Paths) -> Float[Tensor, "paths steps"]:
    """q of every action of the paths, reward/time.

    Raises:
        ValueError: q is not one finite number for each path.
    """

    def at(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return one_a_path("q", q(t, x, a), len(x))

    return all_finite("q", over_steps(at, paths, kept_actions(paths)))
