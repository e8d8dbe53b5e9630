"""Off-policy evaluation: the value of one policy from the paths of another.

The action a_k is drawn at t_k and held, so the laws of two policies' paths differ by
    rho_k = prod_{j <= k} pi(a_j | t_j, X_j) / b(a_j | t_j, X_j),
whatever the dynamics are. Two ways from it to the value of pi:

``importance_sampled_returns``  sum_k e^{-discount t_k} rho_k r_k + rho_end (what is paid at the
    end): unbiased on every grid ([PSS00] per-decision), its variance grows with the steps.
``evaluate``  (V, q) of pi, linear in features, from the martingale conditions of the pair: the
    paths may be of any policy, unknown too, no ratio enters ([JZ23] Theorem 7). Biased by O(h)
    where features are right, as V and q are of continuous time.

``q_learning.improved_policy`` makes the next policy of q; in turns they are policy iteration from
one set of data.

Sources  [JZ23] Jia & Zhou 2023, q-learning in continuous time, JMLR 24.
         [PSS00] Precup, Sutton & Singh 2000, eligibility traces for off-policy policy evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.exploration import drawn_actions
from ctrl.martingale import Features, LinearValue
from ctrl.memory import AnyPolicy
from ctrl.paths import Paths, kept_actions, log_probs, over_nodes, over_steps
from ctrl.policy import RandomPolicy
from ctrl.problem import ControlProblem
from ctrl.returns import (
    at_exits,
    discount_rates,
    regularised_rewards,
    require_whole,
    running_rewards,
    terminal_rewards,
)
from ctrl.user_functions import all_finite
from ctrl.value import discount_factors, martingale_increments

ActionFeatures = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths, features]."""


def log_ratios(
    target: AnyPolicy,
    behaviour: AnyPolicy | Float[Tensor, "paths steps"],
    paths: Paths,
) -> Float[Tensor, "paths steps"]:
    """log rho_k: log-ratio of the probabilities of the actions up to each step, nats.

    Args:
        target: pi, which draws its actions; with a memory, if it declares it.
        behaviour: b, that made the paths; or the recorded log b(a_k | ...) of every step, 0 after a
            path's end.
        paths: with their actions.

    Raises:
        ValueError: a density is not that of drawn actions, or b gave probability 0 to an action
            that it took.
    """
    taken = log_probs(target, paths)
    recorded = behaviour if isinstance(behaviour, Tensor) else log_probs(behaviour, paths)
    if recorded.shape != taken.shape:
        raise ValueError(
            f"behaviour must be {list(taken.shape)}, one log-density for each step, got "
            f"{list(recorded.shape)}"
        )
    all_finite("log-density of the behaviour policy", recorded)
    return (taken - recorded).cumsum(1)


def importance_sampled_returns(
    problem: ControlProblem,
    target: AnyPolicy,
    behaviour: AnyPolicy | Float[Tensor, "paths steps"],
    paths: Paths,
) -> Float[Tensor, " paths"]:
    """One unbiased estimate of the target policy's value at the start a path, reward ([PSS00]).

    Entropy, where the problem pays for it, is the target's: -temperature log pi(a_k) h_k.

    Args:
        problem: which pays; its ``sde`` does not matter.
        target: pi.
        behaviour: as for ``log_ratios``.
        paths: of b, over at their ends, with their actions.

    Raises:
        ValueError: a path breaks off before it is over, or as ``log_ratios``.
    """
    require_whole(problem, paths)
    ratios = log_ratios(target, behaviour, paths).exp()
    rewards = regularised_rewards(problem, paths, target)
    h, discount = as_like(paths.grid.steps, rewards), discount_rates(problem, paths)
    to_end = torch.exp(-(discount * h * torch.ones_like(rewards)).sum(1))
    end = at_exits(problem, paths, terminal_rewards(problem, paths.states[:, -1]))
    before = (discount_factors(problem, paths) * ratios * rewards).sum(1)
    return before + to_end * ratios[:, -1] * end


@dataclass(frozen=True, eq=False)
class Evaluation:
    """V and q of a policy, linear in features.

    Attributes:
        value: V(t, x).
        q: c, coefficients of the action features.
        advantage: c . phi(t, x, a), which is q but for a function of (t, x): what improves the
            policy (``q_learning.improved_policy``).
        covariance: of the estimates, of V's coefficients and then q's, by the delta method.
    """

    value: LinearValue
    q: Float[Tensor, " features"]
    advantage: ActionFeatures
    covariance: Float[Tensor, "all all"]

    @property
    def coefficients(self) -> Float[Tensor, " all"]:
        """V's, then q's."""
        return torch.cat([self.value.coefficients, self.q])

    def value_error(
        self, t: Tensor, states: Float[Tensor, " paths *event"]
    ) -> Float[Tensor, " paths"]:
        """Standard error of V at (t, x), by the delta method."""
        phi = self.value.features(t, states)
        n = phi.shape[1]
        return torch.einsum("pi,ij,pj->p", phi, self.covariance[:n, :n], phi).sqrt()


def evaluate(
    problem: ControlProblem,
    policy: RandomPolicy,
    paths: Paths,
    features: Features,
    action_features: ActionFeatures,
    *,
    base: Callable[[Tensor, Tensor], Tensor] | None = None,
    nodes: int = 8,
) -> Evaluation:
    """V and q of a policy from paths of any policy: the root of E int (phi, psi) dM = 0.

        dM = e^{-discount h} V_{k+1} - V_k + (r - q) h,
        q = c . (phi(t, x, a) - E_pi phi) + temperature E_pi log pi,
    so that E_pi[q - temperature log pi] = 0 by construction ([JZ23] Theorem 7). dM is linear in the
    coefficients, so one solve finds them; their covariance is that of the moments, sandwiched.

    Args:
        problem: which pays; its ``sde`` does not matter.
        policy: pi, to be evaluated; Gaussian (or squashed: then within the rule's error).
        paths: of any policy whose actions vary enough, with their actions.
        features: phi(t, x) of V; where a path is over, V is what is paid there.
        action_features: phi(t, x, a) of q; what does not depend on a drops out.
        base: a known part of V.
        nodes: of the Gauss-Hermite rule for E_pi, for each coordinate of the action.

    Raises:
        ValueError: the features do not determine the coefficients, or a number is not finite.
    """
    actions = kept_actions(paths)

    def averaged(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = policy.mean(t, x)
        total, log_density = torch.zeros(()).to(x), x.new_zeros(len(x))
        for weight, a in drawn_actions(policy, t, mean, nodes, x):
            total = total + weight * action_features(t, x, a)
            if problem.temperature:
                log_density = log_density + weight * policy.log_prob(t, x, a)
        return total, log_density

    def centred(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        average, log_density = averaged(t, x)
        return torch.cat([action_features(t, x, a) - average, log_density.unsqueeze(1)], dim=1)

    along = over_steps(centred, paths, actions)
    psi, log_density = all_finite("action_features", along[..., :-1]), along[..., -1]
    phi = all_finite("features", over_nodes(features, paths))
    h = as_like(paths.grid.steps, phi)
    nothing = torch.zeros_like(log_density)
    unpaid = replace(problem, terminal_reward=None, exit_reward=None, temperature=0.0)

    def column(j: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, x: features(t, x)[:, j]

    moves = [martingale_increments(column(j), unpaid, paths, nothing) for j in range(phi.shape[2])]
    moves += [-each * h for each in psi.unbind(2)]
    known = base if base is not None else _zero
    paid = running_rewards(problem, paths) - problem.temperature * log_density * h
    constant = martingale_increments(known, problem, paths, paid)
    tests = torch.cat([phi[:, :-1], psi], dim=2)
    discounted = (discount_factors(problem, paths) * torch.ones_like(nothing)).unsqueeze(2) * tests
    jacobian = torch.einsum("pki,pkj->pij", discounted, torch.stack(moves, dim=2))
    target = torch.einsum("pki,pk->pi", discounted, constant)
    weights = paths.weights
    if weights is None:
        weights = torch.full_like(phi[:, 0, 0], 1 / len(phi))
    matrix = torch.einsum("p,pij->ij", weights, jacobian)
    if not bool(torch.linalg.cond(matrix) <= 0.1 / torch.finfo(matrix.dtype).eps):
        raise ValueError(
            "features do not determine the coefficients along these paths: they depend on one "
            "another, the actions vary too little, or a combination of them is a martingale"
        )
    solution = -torch.linalg.solve(matrix, weights @ target)
    moments = torch.einsum("pij,j->pi", jacobian, solution) + target  # of mean 0
    scaled = weights.unsqueeze(1) * moments
    inverse = torch.linalg.inv(matrix)
    covariance = inverse @ (scaled.T @ scaled) @ inverse.T
    n = phi.shape[2]
    value = LinearValue(features, solution[:n], base)
    c = solution[n:]

    def advantage(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return action_features(t, x, a) @ c

    return Evaluation(value, c, advantage, covariance)


def _zero(t: Tensor, states: Tensor) -> Tensor:
    return states.new_zeros(len(states))
