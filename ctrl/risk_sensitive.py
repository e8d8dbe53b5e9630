"""Risk-sensitive control: the certainty equivalent of the reward, and q-learning for it.

    maximise  J = 1/risk log E exp(risk R),   R = int (r - temperature log pi) dt + r(X_T)

J = E R + risk/2 Var R + ...: risk < 0 is averse, risk > 0 seeks risk, and 0 is neutral. The value
and the q-rate of a policy are

    V(t, x) = 1/risk log E[ exp(risk R_t) | X_t = x ]
    q(t, x, a) = d_t V + b . grad V + 1/2 tr(sigma sigma' Hess V) + r + risk/2 |sigma' grad V|^2

and they are such a pair if and only if, beside the constraint on q (``ctrl.q_learning``),
    V(t, X_t) + int_0^t (r - q) du + risk/2 <V>_t
is a martingale, <V> the quadratic variation of V(t, X_t) ([J24]). On data it is the sum of squared
changes of V: that one term is all that risk adds to q-learning, on- and off-policy.

It is not all that risk adds to the policy gradient. For the gradient W of V in a parameter,
    d J = E~ int d log pi (q - temperature log pi) dt,
E~ under the law with the drift b + risk sigma sigma' grad V (``tilted_sde``), which has density
exp(risk R) / E exp(risk R) (``tilting_weights``). The mean under the policy's own law, which is
what risk-neutral estimators take, leaves out risk E int grad W . sigma sigma' grad V dt: putting
the risk into q is not enough.

Conventions  undiscounted; rewards and 1/risk have one unit.
Sources      [J24] Jia 2024, continuous-time risk-sensitive reinforcement learning via quadratic
             variation penalty, arXiv 2404.12598.
             [J73] Jacobson 1973, IEEE Trans. Automatic Control 18 (exponential of an integral).
             [W90] Whittle 1990, Risk-sensitive Optimal Control (breakdown at large risk).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import q_learning
from ctrl.devices import as_like
from ctrl.estimate import require_probabilities
from ctrl.linear.collocation import FiniteEscapeError, integrate
from ctrl.linear.lq import (
    LinearGaussian,
    LinearQuadratic,
    Quadratic,
    greedy,
    require_concave,
    times,
    value_rate,
)
from ctrl.linear.riccati import FiniteHorizon, check_law
from ctrl.martingale import TestFunctions, moments
from ctrl.paths import Paths, TimeGrid, while_running
from ctrl.problem import ControlProblem
from ctrl.q_learning import QRate, rates
from ctrl.returns import running_rewards
from ctrl.sde import ControlledSDE
from ctrl.user_functions import all_finite, own_memory
from ctrl.value import Value, values


def certainty_equivalent(
    returns: Float[Tensor, " paths"], risk: float, weights: Float[Tensor, " paths"] | None = None
) -> Float[Tensor, ""]:
    """1/risk log E exp(risk R): the sure reward that is worth as much; the mean where risk is 0.

    Of a sample it is biased by O(1 / paths), away from risk; its relative error is that of a mean
    of exp(risk R), which has heavy tails where |risk| times the standard deviation of R is large.

    Args:
        returns: R of every path, reward.
        risk: 1/reward.
        weights: of the paths, where they are not equal.

    Raises:
        ValueError: the weights are no probabilities, or a return or the risk is not finite.
    """
    _require_risk(risk)
    masses = _masses(returns, weights)
    if risk == 0:
        return masses @ returns
    return (risk * returns + masses.log()).logsumexp(0) / risk


def tilting_weights(
    returns: Float[Tensor, " paths"], risk: float, weights: Float[Tensor, " paths"] | None = None
) -> Float[Tensor, " paths"]:
    """exp(risk R) / E exp(risk R) as weights of the paths: the law that a gradient is taken under.

    The weighted mean of a risk-neutral estimator is the derivative of the certainty equivalent,
    biased by O(1 / paths). Constants of the step, R must be the return that was paid along the
    path, entropy included.

    Args:
        returns: R of every path, reward.
        risk: 1/reward.
        weights: that the paths have already.

    Raises:
        ValueError: as ``certainty_equivalent``.
    """
    _require_risk(risk)
    return torch.softmax(risk * returns + _masses(returns, weights).log(), 0)


def _masses(returns: Tensor, weights: Tensor | None) -> Tensor:
    if returns.ndim != 1 or not len(returns):
        raise ValueError(f"returns must be [paths], one number a path, got {list(returns.shape)}")
    if not returns.is_floating_point():
        raise TypeError(f"returns must be floating point, got {returns.dtype}")
    all_finite("returns", returns)
    if weights is None:
        return torch.full_like(returns, 1 / len(returns))
    require_probabilities("weights", weights)
    if weights.shape != returns.shape:
        raise ValueError(f"weights must be {list(returns.shape)}, got {list(weights.shape)}")
    return weights


def _require_risk(risk: float) -> None:
    if not math.isfinite(risk):
        raise ValueError(f"risk must be finite, got {risk}")


def noise_of_value(
    sde: ControlledSDE,
    value: Value,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
) -> Tensor:
    """sigma' grad V, in the shape of a Brownian increment: V's diffusion, reward/sqrt(time)."""

    def total(x: Tensor) -> Tensor:
        return value(t, x).sum()

    slope: Tensor = torch.func.grad(total)(own_memory(states))
    sigma = as_like(sde.diffusion_at(t, states, actions), states)
    if sde.noise == "diagonal":
        return sigma * slope
    if sde.noise == "scalar":
        return (sigma * slope).flatten(1).sum(1)
    return torch.einsum("pij,pi->pj", sigma, slope)


def q_rate(
    problem: ControlProblem,
    value: Value,
    risk: float,
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    actions: Float[Tensor, " paths *action"],
    probes: Float[Tensor, "paths probes *noise"] | None = None,
) -> Float[Tensor, " paths"]:
    """q(t, x, a) of a value, with risk/2 |sigma' grad V|^2, reward/time ([J24]).

    Args:
        problem: whose dynamics and running reward count; undiscounted.
        value: V; differentiable as for ``q_learning.q_rate``.
        risk: 1/reward.
        t: time, [].
        states: x.
        actions: a.
        probes: as for ``value.generator``; the exact trace if not given.

    Raises:
        ValueError: as ``q_learning.q_rate``; or the problem is discounted, or jumps.
    """
    _require_undiscounted(problem, risk)
    neutral = q_learning.q_rate(problem, value, t, states, actions, probes)
    sde = problem.dynamics
    sde.require_no_jumps("of V's jumps exp(risk dV) counts, not their square")
    noise = noise_of_value(sde, value, t, states, actions)
    return neutral + 0.5 * risk * noise.reshape(len(states), -1).square().sum(1)


def tilted_sde(sde: ControlledSDE, value: Value, risk: float) -> ControlledSDE:
    """The dynamics with the drift b + risk sigma sigma' grad V.

    Its paths have the density exp(risk R) / E exp(risk R) against those of ``sde``, if V is the
    value: what a risk-averse player fears (risk < 0), or hopes for.

    Raises:
        ValueError: the risk is not finite, or the equation has jumps.
    """
    _require_risk(risk)
    sde.require_no_jumps("their intensities are tilted too")
    sde = sde.to_ito()

    def drift(t: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        noise = risk * noise_of_value(sde, value, t, states, actions)
        return sde.drift_at(t, states, actions) + sde.diffuse(t, states, noise, actions)

    return replace(sde, drift=drift)


def increments(
    value: Value,
    q: QRate,
    problem: ControlProblem,
    paths: Paths,
    risk: float,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths steps"]:
    """dM of every step, reward: dV + (r - q) h + risk/2 dV^2, dV = V_{k+1} - V_k ([J24]).

    No dynamics are needed: the sum of dV^2 is the quadratic variation, with a mean error of
    O(h^2) a step.

    Args:
        value: V.
        q: the q-rate; the entropy is in it.
        problem: whose rewards count; undiscounted.
        paths: with their actions, of any policy.
        risk: 1/reward.
        average_reward: 1/(risk T) log E exp(risk R) as T grows, in ergodic problems.

    Raises:
        ValueError: the problem is discounted, or a number is not finite.
    """
    _require_undiscounted(problem, risk)
    moves = values(value, problem, paths).diff(dim=1)
    paid = running_rewards(problem, paths)
    paid = paid - (rates(q, paths) + average_reward) * as_like(paths.grid.steps, moves)
    return while_running(moves + paid + 0.5 * risk * moves.square(), paths)


def orthogonality_loss(
    value: Value,
    q: QRate,
    problem: ControlProblem,
    paths: Paths,
    risk: float,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, " paths"]:
    """A loss whose gradient is -int (d_theta V + d_psi q) dM, dM held fixed. On- or off-policy.

    As ``q_learning.orthogonality_loss``, with the quadratic variation in dM ([J24]). Only the
    gradient of this number means something.

    Args:
        value: V.
        q: that satisfies its constraint by construction (``q_learning.GibbsQ``, ``ConsistentQ``).
        problem: whose rewards count; undiscounted.
        paths: with their actions, of any policy.
        risk: 1/reward.
        average_reward: in ergodic problems.

    Raises:
        ValueError: as ``increments``.
    """
    dm = increments(value, q, problem, paths, risk, average_reward).detach()
    along = values(value, problem, paths)[:, :-1] + rates(q, paths)
    return -(along * dm).sum(1)


def orthogonality(
    tests: TestFunctions,
    value: Value,
    q: QRate,
    problem: ControlProblem,
    paths: Paths,
    risk: float,
    average_reward: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "paths tests"]:
    """int xi dM of every path and test function; each has mean 0 for the true pair, up to O(h).

    Args:
        tests: adapted test functions, which may see the action of their own step.
        value: V.
        q: the q-rate.
        problem: whose rewards count; undiscounted.
        paths: with their actions, of any policy.
        risk: 1/reward.
        average_reward: in ergodic problems.

    Raises:
        ValueError: a test function looks ahead, or as ``increments``.
    """
    dm = increments(value, q, problem, paths, risk, average_reward)
    return moments(tests, dm, problem, paths, sees_action=True)


def _require_undiscounted(problem: ControlProblem, risk: float) -> None:
    _require_risk(risk)
    if problem.discount:
        raise ValueError(
            f"problem.discount must be 0 for a risk-sensitive value, got {problem.discount}: the "
            "certainty equivalent of a discounted reward is no function of (t, x) alone that "
            "solves an equation without the time that has passed"
        )


def solve_lq(lq: LinearQuadratic, risk: float, times: Float[Tensor, " nodes"]) -> FiniteHorizon:
    """Optimal risk-sensitive value and policy of a linear-quadratic problem ([J73]).

    -S' = A'S + S A - M + (S B - R') N^{-1} (B'S - R) + risk S sigma sigma' S, and what follows for
    slope and constant: noise acts like an action of cost -1/risk, an opponent's where risk < 0.

    Args:
        lq: undiscounted, with noise that neither state nor action scales.
        risk: 1/reward; of a positive one the value may explode ([W90]), which is refused.
        times: increasing; the last is the horizon.

    Raises:
        ValueError: C, D or the discount is not zero, or the value explodes.
    """

    def best(t: Tensor, value: Quadratic) -> LinearGaussian:
        return greedy(lq, value)

    _require_plain(lq)
    require_concave(lq, lq.terminal, " at the horizon")
    return _backward(lq, best, risk, times)


def evaluate_lq(
    lq: LinearQuadratic,
    law: LinearGaussian | Callable[[Tensor], LinearGaussian],
    risk: float,
    times: Float[Tensor, " nodes"],
) -> FiniteHorizon:
    """The risk-sensitive value of a linear-Gaussian policy; rewards are averaged over its actions.

    Args:
        lq: as for ``solve_lq``.
        law: the policy; as a function it gives a batch of laws at times [nodes].
        risk: 1/reward.
        times: increasing; the last is the horizon.

    Raises:
        ValueError: as ``solve_lq``; or the policy does not fit.
    """
    grid = TimeGrid(times).nodes

    def at(t: Tensor, value: Quadratic) -> LinearGaussian:
        return law if isinstance(law, LinearGaussian) else law(grid[-1] - t)

    _require_plain(lq)
    check_law(
        lq, law if isinstance(law, LinearGaussian) else law(grid), time_dependent=callable(law)
    )
    return _backward(lq, at, risk, grid)


def _require_plain(lq: LinearQuadratic) -> None:
    if bool(lq.C.any()) or bool(lq.D.any()):
        raise ValueError(
            "lq must have C = 0 and D = 0: where state or action scale the noise the certainty "
            "equivalent is not quadratic"
        )
    if bool((lq.rates[0] > 0).any()):
        raise ValueError(f"discount must be 0, got {lq.rates[0].tolist()}")


def _backward(
    lq: LinearQuadratic,
    law: Callable[[Tensor, Quadratic], LinearGaussian],
    risk: float,
    nodes: Float[Tensor, " nodes"],
) -> FiniteHorizon:
    """The value by time to go: V' = E[L V + r] + temperature entropy + risk/2 |sigma' grad V|^2."""
    _require_risk(risk)
    nodes = TimeGrid(nodes).nodes
    n, Sigma = lq.A.shape[-1], risk * lq.sigma @ lq.sigma.mT

    def rate(t: Tensor, y: Tensor) -> Tensor:
        hessian, slope, constant = y.split([n * n, n, 1], dim=-1)
        value = Quadratic(hessian.unflatten(-1, (n, n)), slope, constant.squeeze(-1))
        neutral, pushed = value_rate(lq, value, law(t, value)), times(Sigma, slope)
        S = neutral.hessian + value.hessian @ Sigma @ value.hessian
        e = neutral.slope + times(value.hessian, pushed)
        c = neutral.constant + 0.5 * (slope * pushed).sum(-1)
        return torch.cat([S.flatten(-2), e, c.unsqueeze(-1)], dim=-1)

    end = lq.terminal
    start = torch.cat([end.hessian.flatten(-2), end.slope, end.constant.unsqueeze(-1)], dim=-1)
    try:
        to_go = integrate(rate, start, float((nodes[-1] - nodes[0]).detach()))
    except FiniteEscapeError as escape:
        raise ValueError(
            f"the risk-sensitive value must be finite back to t = {nodes[0].item():g}, but near t "
            f"= {nodes[-1].item() - escape.time:.6g} it is not: exp(risk R) has no mean; take risk "
            f"nearer to 0 than {risk:g}, or shorten the horizon"
        ) from escape
    return FiniteHorizon(lq, nodes, to_go)
