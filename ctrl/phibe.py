"""PhiBE: policy evaluation by a differential equation whose coefficients come from data at step h.

The value of a diffusion solves  V_t + b . grad V + 1/2 Sigma : Hess V - discount V + r = 0. Data at
times 0, h, ..., i h do not show b and Sigma; the equation of order i has in their place

    b_i(x)     = 1/h sum_j a_j E[ d_j | X_0 = x ],        d_j = X_{jh} - X_0,  j = 1 .. i
    Sigma_i(x) = 1/h sum_j a_j E[ d_j d_j' | X_0 = x ],   sum_j a_j j^k = 1 if k = 1, else 0

with k up to i: differences that are exact for polynomials of degree i in time. Its solution misses
V by O(h^i) ([ZHY24]). The Bellman equation V = r h + e^{-discount h} E V(X_h), which the methods of
``ctrl.martingale`` solve on the same data, misses V by O(h) whatever is done: it has the reward
constant over a step, PhiBE has not.

Sources  [ZHY24] Zhu, PhiBE: a PDE-based Bellman equation for continuous time policy evaluation,
         arXiv 2405.12535.
         [OP25] the same for optimal control, arXiv 2506.05208.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.linear.gaussian import transition
from ctrl.linear.lq import LinearQuadratic
from ctrl.martingale import Features, LinearValue
from ctrl.paths import Paths, TimeGrid, common_grid, over_steps
from ctrl.policy import Policy
from ctrl.problem import ControlProblem
from ctrl.returns import regularised_rewards
from ctrl.user_functions import all_finite, own_memory
from ctrl.value import Value


def coefficients(order: int) -> Float[Tensor, " order"]:
    """a_1, ..., a_i with sum_j a_j j^k = 1 if k = 1 and 0 if k = 2 .. i: 1; 2, -1/2; 3, -3/2, 1/3.

    In closed form a_j = (-1)^{j+1} binomial(i, j) / j.

    Args:
        order: i, at least 1; higher orders have larger coefficients, and estimates more variance.

    Raises:
        ValueError: ``order`` is not an integer of at least 1.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, got {order!r}")
    each = [(-1) ** (j + 1) * math.comb(order, j) / j for j in range(1, order + 1)]
    return torch.tensor(each, dtype=torch.float64)


def generator(
    function: Callable[[Tensor, Tensor], Tensor],
    t: Tensor,
    states: Float[Tensor, " paths *event"],
    ahead: Float[Tensor, "paths order *event"],
    step: float | Float[Tensor, ""],
) -> Float[Tensor, " paths *result"]:
    """V_t + b_i . grad V + 1/2 Sigma_i : Hess V with one path's d_j in place of their means.

    Given x it is unbiased for PhiBE's generator of order i, being linear in d_j and d_j d_j'. By
    forward-mode differentiation, two evaluations of V for each d_j: no matrix is formed.

    Args:
        function: V, or features: (t [], x [paths, *event]) -> [paths, *result]; twice
            differentiable in x and once in t, every path by itself.
        t: time, [].
        states: x.
        ahead: the states at t + h, ..., t + i h.
        step: h, time.

    Raises:
        ValueError: ``ahead`` is not [paths, order, *event].
    """
    order = ahead.shape[1] if ahead.ndim > 1 else 0
    if order < 1 or ahead.shape != (len(states), order, *states.shape[1:]):
        raise ValueError(
            f"ahead must be [{len(states)}, order, *{list(states.shape[1:])}], the states of later "
            f"nodes, got {list(ahead.shape)}"
        )
    states = own_memory(states)
    weights = as_like(coefficients(order), states) / as_like(step, states)
    moves = (ahead - states.unsqueeze(1)).unbind(1)

    def at(x: Tensor) -> Tensor:
        return function(t, x)

    def curvature(direction: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return torch.func.jvp(at, (x,), (direction,))[1]

        return torch.func.jvp(slope, (states,), (direction,))[1]

    drift = sum(
        (w * move for w, move in zip(weights, moves, strict=True)), torch.zeros_like(states)
    )
    total: Tensor = torch.func.jvp(function, (t, states), (torch.ones_like(t), drift))[1]
    for w, move in zip(weights, moves, strict=True):
        total = total + 0.5 * w * curvature(own_memory(move))
    return total


def galerkin(
    features: Features,
    problem: ControlProblem,
    paths: Paths,
    order: int = 2,
    policy: Policy | None = None,
    *,
    base: Value | None = None,
) -> LinearValue:
    """PhiBE of order i for linear values: E phi (L_i V - discount V + r) = 0, from paths alone.

    The least-squares counterpart of ``martingale.clstd``, on the same data. The expectation is over
    all windows of i + 1 nodes. Where V is a combination of the features its error is O(h^i), and
    that of ``clstd`` O(h); else both add their error of projection.

    The last i - 1 steps of a path begin no window. On a finite horizon the terminal reward is
    pinned by features that vanish there, and ``base``.

    Args:
        features: phi(t, x).
        problem: whose running reward and discount count; its ``sde`` does not.
        paths: on equal steps, with their actions; their weights count.
        order: i.
        policy: that drew the actions; needed where the problem rewards its entropy.
        base: a known part of V.

    Raises:
        TypeError: the paths have times of their own.
        ValueError: the steps are not equal or too few, the features do not determine the
            coefficients, a feature is not finite, or the problem has a domain (which windows are
            whole then depends on where they lead).
    """
    a = coefficients(order)
    if problem.domain is not None:
        raise ValueError(
            "problem.domain must be None: windows that end in an exit show neither drift nor "
            "covariance, and leaving them out is a selection; use martingale.clstd"
        )
    step, count = _equal_step(paths, order), paths.states.shape[1] - len(a)
    ahead = paths.states.unfold(1, len(a) + 1, 1).movedim(-1, 2)[:, :, 1:]  # [paths, count, i, ..]
    begin = replace(
        paths,
        states=paths.states[:, : count + 1],
        actions=None,
        increments=None,
        rewards=None,
        ends=None,
        terminated=None,
        grid=TimeGrid(common_grid(paths).nodes[: count + 1]),
    )
    rewards = regularised_rewards(problem, paths, policy)[:, :count] / as_like(step, paths.states)

    def equation(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def at(t: Tensor, x: Tensor, later: Tensor) -> Tensor:
            here, rate = function(t, x), as_like(problem.discount_at(t, x), x)
            if rate.ndim:  # one a path, and features beside
                rate = rate.view(-1, *[1] * (here.ndim - 1))
            return generator(function, t, x, later, step) - rate * here

        return over_steps(at, begin, ahead)

    phi = all_finite("features", over_steps(features, begin))
    left = equation(features)
    right = rewards if base is None else rewards + equation(base)
    weights = paths.weights
    if weights is None:
        weights = torch.full_like(phi[:, 0, 0], 1 / len(phi))
    weighted = weights[:, None, None] * phi
    if paths.ends is not None:  # windows within their path
        last = torch.arange(count, device=paths.ends.device) + len(a)
        weighted = torch.where((last <= paths.ends[:, None])[..., None], weighted, 0)
    matrix = torch.einsum("pki,pkj->ij", weighted, left)
    target = -torch.einsum("pki,pk->i", weighted, right)
    if not bool(torch.linalg.cond(matrix) <= 0.1 / torch.finfo(matrix.dtype).eps):
        raise ValueError(
            "features do not determine the coefficients: they depend on one another along these "
            "paths, or a combination solves the equation without reward (a constant, undiscounted)"
        )
    return LinearValue(features, torch.linalg.solve(matrix, target), base)


def _equal_step(paths: Paths, order: int) -> Float[Tensor, ""]:
    steps = common_grid(paths).steps
    if len(steps) < order:
        raise ValueError(
            f"paths must have at least {order} steps for order {order}, got {len(steps)}"
        )
    uneven = (steps - steps.mean()).abs().max() / steps.mean()
    if bool(uneven > 1e-4):  # nodes in float32 have steps of that accuracy
        raise ValueError(
            f"grid must have equal steps, got steps from {float(steps.min()):g} to "
            f"{float(steps.max()):g}"
        )
    return steps.mean()


def held_lq(lq: LinearQuadratic, step: float) -> LinearQuadratic:
    """Optimal-PhiBE of order 1 for a linear-quadratic problem, itself one ([OP25]).

    With d = X_h - x = (F - 1) x + G a + g where the action is held over h, and C the variance of
    X_h, the equation's drift is E d / h and its noise (E d E d' + C) / h: linear, with one more
    Brownian motion that state and action scale. So ``linear.solve_lq_discounted`` of the result is
    the exact answer of what a method that solves Optimal-PhiBE aims at, and ``evaluate_lq`` of its
    policy in ``lq`` tells what that costs.

    Without noise (sigma = 0) it is the deterministic equation, with the drift alone. In one
    dimension and undiscounted its policy is that of the problem itself, whatever the step.

    Args:
        lq: with noise that neither state nor action scales.
        step: h, time.

    Raises:
        ValueError: C or D is not zero, or the step is not positive and finite.
    """
    if bool(lq.C.any()) or bool(lq.D.any()):
        raise ValueError("lq must have C = 0 and D = 0: noise that is neither scaled by x nor by a")
    if not 0 < step < math.inf:
        raise ValueError(f"step must be positive and finite, got {step}")
    n, k = lq.B.shape[-2:]
    pad = torch.nn.functional.pad
    both = pad(torch.cat([lq.A, lq.B], dim=-1), (0, 0, 0, k))  # of (x, a), a at rest
    law = transition(both, pad(lq.f, (0, k)), pad(lq.sigma, (0, 0, 0, k)), step)
    eye = torch.eye(n).to(lq.A)
    of_state, of_action = law.F[..., :n, :n] - eye, law.F[..., :n, n:]
    shift, C = law.f[..., :n], law.C[..., :n, :n]
    drift = {"A": of_state / step, "B": of_action / step, "f": shift / step}
    if not bool(lq.sigma.any()):
        return replace(lq, **drift)
    root, width = math.sqrt(step), n + 1
    sigma = torch.cat([shift.unsqueeze(-1), _root(C)], dim=-1) / root
    scaled = of_state.new_zeros(*of_state.shape[:-2], width, n, n + k)
    scaled[..., 0, :, :n], scaled[..., 0, :, n:] = of_state / root, of_action / root
    return replace(lq, sigma=sigma, C=scaled[..., :n], D=scaled[..., n:], **drift)


def _root(covariance: Tensor) -> Tensor:
    """L with L L' = covariance, which may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
