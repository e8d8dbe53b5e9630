"""The policy gradient in continuous time: its estimators, advantages and trust regions.

    grad V(0, x) = E int e^{-discount t} grad log pi(a_t) (dV + (r - temperature log pi
                                                           - discount V) dt)   ([SaA] Theorem 4.1,
                 = E int e^{-discount t} grad log pi(a_t) (q - temperature log pi) dt  [JZ22b] 2)

where the decision is the action that is drawn. Where it is the next state, a running reward of the
action has a slope of its own, which is added: E int e^{-discount t} grad_a r (d mu / d theta) dt.

Four estimators have this mean: with the return in place of dV (most variance, no value needed), the
temporal difference, the q-rate, and the derivative of the q-rate in the action (pathwise; least).
Each is one number a path whose *gradient* is the estimator: call ``backward`` on the (weighted)
mean, or ``torch.autograd.grad``. The number itself means nothing. With the value of the
continuous-time problem on a grid they are biased by O(h).

What counts as the decision is an argument, a named thing:
    ``DrawnActions()``      (view A) the policy draws a score and holds it; any solver.
    ``Transitions(solver)`` (view B) the next state is decided, by the noise of the SDE; solvers
                            with a transition density. The policy's std drops out.
The return's variance grows like the number of steps in view A and not in view B.

Sources  [SaA] Zhao, Chen, Zhang, Yao & Tang 2025, "Score as Action", arXiv 2502.01819.
         [JZ22b] Jia & Zhou 2022, policy gradient and actor-critic, JMLR 23.
         [ZTY] Zhao, Tang & Yao 2023, policy optimisation in continuous time, NeurIPS 36.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import transitions
from ctrl.advantages import continuous_gae, temporal_differences
from ctrl.devices import as_like
from ctrl.memory import AnyPolicy, PolicyWithMemory
from ctrl.paths import (
    Paths,
    common_grid,
    kept_actions,
    log_probs,
    over_policy_steps,
    require_dynamics,
    require_kinds,
    require_memoryless,
    visited,
    while_running,
)
from ctrl.policy import Policy, RandomPolicy, ReparametrisedPolicy, mean_action
from ctrl.problem import ControlProblem
from ctrl.q_learning import q_rate, q_rates
from ctrl.returns import discount_rates, regularised_rewards, require_whole, returns_to_go
from ctrl.solvers import Solver, require_transition
from ctrl.trust_region import clipped_surrogate, penalised_surrogate
from ctrl.user_functions import all_finite, one_a_path, own_memory
from ctrl.value import Value, discount_factors, evaluated, transport, values

__all__ = [
    "Decisions",
    "DrawnActions",
    "Transitions",
    "clipped_surrogate",
    "continuous_gae",
    "pathwise_gradient",
    "penalised_surrogate",
    "performance_difference",
    "q_rate_gradient",
    "return_gradient",
    "surrogate",
    "temporal_difference_gradient",
    "temporal_differences",
]


@runtime_checkable
class Decisions(Protocol):
    """Decision of the policy at every step: a drawn action, or the next state."""

    def log_prob(
        self, problem: ControlProblem, policy: AnyPolicy, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """Log-density of the decision of every step, nats; the gradient goes through it."""
        ...

    def advantages(
        self, problem: ControlProblem, policy: Policy, value: Value, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """First-order worth of every decision beyond the policy's average, reward."""
        ...

    def held_rewards(
        self, problem: ControlProblem, policy: AnyPolicy, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """Running reward of every step as far as it moves with the policy, the decisions held."""
        ...


@dataclass(frozen=True, eq=False)
class DrawnActions:
    """View A: the actions that the policy drew; (q - temperature log pi) h is their worth.

    Attributes:
        probes: for ``q_rates`` of many dimensions; exact traces if not given.
    """

    probes: Float[Tensor, "paths steps probes *noise"] | None = None

    def log_prob(
        self, problem: ControlProblem, policy: AnyPolicy, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """log pi(a_k | t_k, X_k), given the path so far where the policy declares a memory.

        Raises:
            TypeError: the policy does not draw its actions.
            ValueError: it has a memory that it does not declare.
        """
        return _log_probs(policy, paths)

    def advantages(
        self, problem: ControlProblem, policy: Policy, value: Value, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """(q(t_k, X_k, a_k) - temperature log pi(a_k)) h_k."""
        rates = _regularised_q(problem, value, _random(policy), paths, self.probes)
        return rates * as_like(paths.grid.steps, rates)

    def held_rewards(
        self, problem: ControlProblem, policy: AnyPolicy, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """Zero: the reward is of the drawn action, which is held."""
        return paths.states.new_zeros(len(paths.states), paths.states.shape[1] - 1)


@dataclass(frozen=True)
class Transitions:
    """View B: the next states; grad V . (X_{k+1} - E X_{k+1}) is their worth, to first order.

    Attributes:
        solver: whose transition density counts, the one that made the paths.
    """

    solver: Solver

    def __post_init__(self) -> None:
        require_transition(self.solver)

    def log_prob(
        self, problem: ControlProblem, policy: AnyPolicy, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """log p(X_{k+1} | X_k).

        Raises:
            ValueError: the problem rewards entropy, which the next state does not have.
        """
        if problem.temperature:
            raise ValueError(
                f"problem.temperature must be 0, got {problem.temperature:g}: where the next state "
                "is the decision, the covariance of the actions drops out; use DrawnActions()"
            )
        return transitions.log_prob(problem.dynamics, self.solver, policy, paths)

    def advantages(
        self, problem: ControlProblem, policy: Policy, value: Value, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """grad V(t_k, X_k) . (X_{k+1} - E[X_{k+1} | X_k])."""
        problem.dynamics.require_no_jumps(
            "a step with them has no Gaussian density; use DrawnActions()"
        )
        gaussian, nodes = require_transition(self.solver), paths.grid.nodes.cpu()
        require_dynamics(paths)
        after = transitions.proposals(problem.dynamics, gaussian, paths)
        stopped, paths = paths, visited(paths)
        each = []
        for k, x in enumerate(paths.states[:, :-1].unbind(1)):
            t = as_like(nodes[k], x)
            action = mean_action(policy, t, x)
            mean, _ = gaussian.transition(problem.dynamics, nodes[k], nodes[k + 1], x, action)
            surprise = after[k] - mean
            each.append(_directional(value, t, x, surprise))
        return all_finite("slope of value", while_running(torch.stack(each, dim=1), stopped))

    def held_rewards(
        self, problem: ControlProblem, policy: AnyPolicy, paths: Paths
    ) -> Float[Tensor, "paths steps"]:
        """r(t_k, X_k, a(t_k, X_k)) h_k, the action a function of the policy's parameters."""
        reward = problem.running_reward
        if reward is None:
            return paths.states.new_zeros(len(paths.states), paths.states.shape[1] - 1)

        def rate(policy: Policy, t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            again = _reparametrised(policy, t, x, a.detach())
            return one_a_path("running_reward", reward(t, x, again), len(x))

        rates = over_policy_steps(rate, policy, paths, kept_actions(paths))
        return rates * as_like(paths.grid.steps, rates)


def _directional(value: Value, t: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    def at(y: Tensor) -> Tensor:
        return evaluated(value, t, y)

    both = torch.func.jvp(at, (own_memory(x),), (own_memory(direction),))
    return both[1] + 0 * both[0]  # NaN where V is, whatever its derivative says


def return_gradient(
    problem: ControlProblem,
    policy: AnyPolicy,
    paths: Paths,
    baseline: Value | None = None,
    decisions: Decisions | None = None,
) -> Float[Tensor, " paths"]:
    """grad log pi times the return to go less a baseline, summed over steps.

    Args:
        problem: which pays.
        policy: that made the paths; the gradient is in what it depends on.
        paths: to the horizon, with what the decisions need.
        baseline: a function of (t, x), any; the value function takes away most variance.
        decisions: ``DrawnActions()`` if not given.

    Raises:
        ValueError: the paths do not fit the problem; TypeError: nor the policy the decisions.
    """
    chosen = decisions or DrawnActions()
    ahead = returns_to_go(problem, paths, policy)[:, :-1]
    if baseline is not None:
        ahead = ahead - values(baseline, problem, paths)[:, :-1]
    return _summed(problem, policy, paths, chosen, ahead)


def temporal_difference_gradient(
    problem: ControlProblem,
    policy: Policy,
    value: Value,
    paths: Paths,
    decisions: Decisions | None = None,
    *,
    rate: float = math.inf,
) -> Float[Tensor, " paths"]:
    """grad log pi times dV + (r - temperature log pi - discount V) dt ([SaA] Theorem 4.1).

    Args:
        problem: which pays.
        policy: that made the paths; the gradient is in what it depends on.
        value: V of the policy, exact or learned.
        paths: with what the decisions need.
        decisions: ``DrawnActions()`` if not given.
        rate: of ``continuous_gae``, 1/time; infinite for the one-step difference.
    """
    _require_of_states(policy)
    chosen = decisions or DrawnActions()
    along, h = values(value, problem, paths), as_like(paths.grid.steps, paths.states)
    rewards = regularised_rewards(problem, paths, policy)
    running = None if paths.ends is None else paths.running
    discount = discount_rates(problem, paths)
    advantages = continuous_gae(along, rewards, h, rate, discount, running)
    return _summed(problem, policy, paths, chosen, advantages)


def q_rate_gradient(
    problem: ControlProblem,
    policy: Policy,
    value: Value,
    paths: Paths,
    decisions: Decisions | None = None,
) -> Float[Tensor, " paths"]:
    """grad log pi times (q - temperature log pi) dt ([SaA] Theorem 4.1, [JZ22b] Theorem 2).

    Args:
        problem: which pays, and whose dynamics q needs.
        policy: that made the paths; the gradient is in what it depends on.
        value: V of the policy; differentiable by ``torch.func.jvp``.
        paths: with what the decisions need.
        decisions: ``DrawnActions()`` if not given.
    """
    _require_of_states(policy)
    chosen = decisions or DrawnActions()
    with torch.no_grad():  # forward mode differentiates all the same
        advantages = chosen.advantages(problem, policy, value, paths)
    return _summed(problem, policy, paths, chosen, advantages)


def pathwise_gradient(
    problem: ControlProblem, policy: Policy, value: Value, paths: Paths
) -> Float[Tensor, " paths"]:
    """(d a / d theta)' grad_a (q - temperature log pi) dt, the states held ([SaA] Theorem 4.1).

    For a terminal reward this is E int g^2 (d mu / d theta)' grad V dt. Actions are written as mean
    plus scale times the noise that made them, which is kept.

    Args:
        problem: which pays, and whose dynamics q needs.
        policy: Gaussian or deterministic; the gradient is in what it depends on.
        value: V of the policy; differentiable by ``torch.func.jvp``.
        paths: with their actions.

    Raises:
        ValueError: a black box simulated the paths, or the policy has a memory.
    """
    require_kinds(problem, paths)
    require_dynamics(paths)
    require_memoryless(policy, paths)
    sde = problem.dynamics.to_ito()

    def rate(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        if sde.controls_diffusion or sde.jump_kinds:
            return q_rate(problem, value, t, x, a)
        # the other terms of q do not depend on the action
        transported = transport(sde, value, t, x, a)
        if problem.running_reward is None:
            return transported
        paid = problem.running_reward(t, x, a)
        return transported + one_a_path("running_reward", paid, len(x))

    def one(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        fixed = a.detach().requires_grad_()
        with torch.enable_grad():
            worth = rate(t, x.detach(), fixed)
            if problem.temperature:
                worth = worth - problem.temperature * _random(policy).log_prob(t, x, fixed)
            (slope,) = torch.autograd.grad(worth.sum(), fixed)
        # what is not finite may not depend on the action, and its slope be 0
        slope = slope + 0 * worth.detach().view(-1, *[1] * (a.ndim - 1))
        again = _reparametrised(policy, t, x, a.detach())
        return (slope.detach() * again).reshape(len(x), -1).sum(1)

    stopped, paths = paths, visited(paths)
    times = as_like(common_grid(paths).nodes[:-1], paths.states)
    moments = zip(times, paths.states[:, :-1].unbind(1), kept_actions(paths).unbind(1), strict=True)
    rates = torch.stack([one(*moment) for moment in moments], dim=1)
    rates = all_finite(
        "slope of q (value, running_reward) in the action", while_running(rates, stopped)
    )
    h = as_like(paths.grid.steps, rates)
    return (discount_factors(problem, paths) * rates * h).sum(1)


def _reparametrised(policy: Policy, t: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """The action as a function of what the policy depends on, its noise held."""
    mean = mean_action(policy, t, x)
    if not policy.is_random:
        return policy.act(mean, t, None, x)
    if not isinstance(policy, ReparametrisedPolicy):
        raise TypeError(
            f"policy must be deterministic or tell the noise of its actions (noise_of), got "
            f"{type(policy).__name__}"
        )
    noise = policy.noise_of(a, mean, t, x).detach()
    return policy.act(mean, t, noise, x)


def performance_difference(
    problem: ControlProblem,
    value: Value,
    new_policy: AnyPolicy,
    new_paths: Paths,
    probes: Float[Tensor, "paths steps probes *noise"] | None = None,
) -> Float[Tensor, " paths"]:
    """V^{new}(0, x) - V(0, x) = E^{new} int e^{-discount t} (q - temperature log pi_new) dt.

    ([SaA] Lemma 4.2, [ZTY] Theorem 2.) One value a path. Of an endless problem it is the part up to
    the paths' end; the rest is E e^{-discount t} (V^{new} - V) there.

    Args:
        problem: which pays.
        value: V of the *old* policy; q is its q-rate.
        new_policy: the other policy, deterministic or random.
        new_paths: of the *new* policy, from the same initial law, with their actions.
        probes: for ``q_rates`` of many dimensions.

    Raises:
        ValueError: the grid ends before a finite horizon, a black box simulated the paths, or the
            policy has a memory.
    """
    if math.isfinite(problem.horizon):
        require_whole(problem, new_paths)
    rates = _regularised_q(problem, value, new_policy, new_paths, probes)
    h = as_like(new_paths.grid.steps, rates)
    return (discount_factors(problem, new_paths) * rates * h).sum(1)


def surrogate(
    problem: ControlProblem,
    value: Value,
    policy: AnyPolicy,
    new_policy: AnyPolicy,
    paths: Paths,
    probes: Float[Tensor, "paths steps probes *noise"] | None = None,
) -> Float[Tensor, " paths"]:
    """L(new) - V = E^{old} int e^{-discount t} E_{a ~ new}[ q - temperature log pi_new ] dt.

    The performance difference with the old policy's states ([SaA] Theorem 4.4); the new actions are
    the old ones, reweighted by the ratio of densities.

    Args:
        problem: which pays.
        value: V of the old policy.
        policy: the old one, that made the paths.
        new_policy: the other one.
        paths: of the old policy, with their actions.
        probes: for ``q_rates`` of many dimensions.

    Raises:
        ValueError: the grid ends before a finite horizon, a black box simulated the paths, or a
            policy has a memory.
    """
    if math.isfinite(problem.horizon):
        require_whole(problem, paths)
    new, old = _log_probs(new_policy, paths), _log_probs(policy, paths)
    rates = _regularised_q(problem, value, new_policy, paths, probes)
    ratio = (new - old.detach()).exp()
    h = as_like(paths.grid.steps, rates)
    return (discount_factors(problem, paths) * ratio * rates * h).sum(1)


def _regularised_q(
    problem: ControlProblem,
    value: Value,
    policy: AnyPolicy,
    paths: Paths,
    probes: Tensor | None,
) -> Float[Tensor, "paths steps"]:
    q = q_rates(problem, value, paths, probes)
    if not problem.temperature:
        return q
    return q - problem.temperature * _log_probs(policy, paths)


def _log_probs(policy: AnyPolicy, paths: Paths) -> Float[Tensor, "paths steps"]:
    return log_probs(policy if isinstance(policy, PolicyWithMemory) else _random(policy), paths)


def _require_of_states(policy: AnyPolicy) -> None:
    if isinstance(policy, PolicyWithMemory):
        raise TypeError(
            "policy must be one of (t, x), for which a value function of (t, x) is right, got "
            "PolicyWithMemory; use return_gradient, or make its memory part of the state"
        )


def _random(policy: Policy) -> RandomPolicy:
    if not isinstance(policy, RandomPolicy):
        raise TypeError(
            f"policy must draw its actions and know their density, got {type(policy).__name__}; "
            "use a GaussianPolicy; of a deterministic one take pathwise_gradient, or "
            "decisions=Transitions(solver)"
        )
    return policy


def _summed(
    problem: ControlProblem,
    policy: AnyPolicy,
    paths: Paths,
    decisions: Decisions,
    advantages: Float[Tensor, "paths steps"],
) -> Float[Tensor, " paths"]:
    log_prob = decisions.log_prob(problem, policy, paths)
    held = decisions.held_rewards(problem, policy, paths)
    return (discount_factors(problem, paths) * (log_prob * advantages.detach() + held)).sum(1)
