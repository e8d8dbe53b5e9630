"""Adjoint matching for controlled drift and diffusion, from the stochastic maximum principle.

    dX = b(t, X, u) dt + sigma(t, X, u) dW,   maximise J = E[ int r(t, X, u) dt + r(X_T) ]
    H(t, x, u, a, A) = r + b . a + 1/2 tr(sigma sigma' A)

The principle's first-order condition is H_u = 0 with a = grad V and A = Hess V ([P90], [YZ99]).
Along a path, hold the noise and differentiate what is still earned in the state X_t, once and
twice, the control u(t, x) moving with it: a_t and A_t. They look ahead, but their means given X_t
are grad V and Hess V of the control. So the loss

    - E int H(t, X_t, u(t, X_t), a_t, A_t) dt       (X, a, A held)

has the gradient of -J, at any control, and its critical points satisfy the principle: that is the
Hamiltonian form of adjoint matching ([DH26]). Where sigma is free of the control, A drops out; with
cost |u|^2 / 2 and drift s u it is the regression of u on s a ([DE24]).

Instead of A one may take  a dW' / h  for its mean  A sigma  (``noise_matching_loss``; the
principle's martingale term): no second derivatives, a variance of O(1/h) a step. With
``lean_adjoints``, for which the controls are held, that loss is critical at the optimum, where the
controls move no mean; elsewhere its gradient is not that of J. Lean adjoints have no second-order
form: at the optimum the curvature of J with the controls held is not that of V.

On an Euler chain all this is exact, the adjoints being those of the right end of each step (Stein's
identity E[dW f(X + sigma dW)] = h sigma' E f'): nothing has to be small.

Sources  [DH26] Domingo-Enrich & Han 2026, adjoint matching through the lens of the stochastic
         maximum principle, arXiv 2604.08580 (by its abstract; derived here from the principle).
         [DE24] Domingo-Enrich, Drozdzal, Karrer & Chen 2024, adjoint matching, arXiv 2409.08861.
         [P90] Peng 1990, a general stochastic maximum principle, SIAM J. Control Optim. 28.
         [YZ99] Yong & Zhou, Stochastic Controls, chapter 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.paths import Paths, kept_actions, require_dynamics, require_memoryless
from ctrl.policy import Policy, mean_action
from ctrl.problem import ControlProblem
from ctrl.returns import require_whole
from ctrl.user_functions import all_finite, call, one_a_path, own_memory
from ctrl.value import discount_factors


@dataclass(frozen=True, eq=False)
class Adjoints:
    """Derivatives of what a path still earns, at the right end of every step.

    Discounted to the left end of the step; none of them has a graph.

    Attributes:
        first: a, reward/state.
        second: A, reward/state^2.
    """

    first: Float[Tensor, "paths steps dim"]
    second: Float[Tensor, "paths steps dim dim"]


def adjoints(problem: ControlProblem, policy: Policy, paths: Paths) -> Adjoints:
    """a and A of every step, the control moving with the state; backwards along the path.

    Costs dim derivatives of a step, forwards over backwards.

    Args:
        problem: an Ito equation with states [paths, dim]; twice differentiable.
        policy: the control that made the paths, deterministic.
        paths: by Euler-Maruyama, to the horizon, with their increments.

    Raises:
        ValueError: the paths do not fit that, or a derivative is not finite.
    """
    increments = _increments(problem, policy, paths)
    if paths.states.ndim != 3:
        raise ValueError(
            f"states must be [paths, nodes, dim] for second derivatives, got "
            f"{list(paths.states.shape)}; lean_adjoints takes any"
        )
    h, keep = _steps(problem, paths)
    eye = torch.eye(paths.states.shape[2]).to(paths.states)

    def along(function: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "dim paths dim"]:
        def one(direction: Tensor) -> Tensor:
            moved = direction.expand_as(x).contiguous()
            return torch.func.jvp(function, (x,), (moved,))[1]

        return torch.func.vmap(one)(eye)

    with torch.no_grad():
        last = own_memory(paths.states[:, -1])
        ending = _ending(problem)
        a, curved = ending(last), along(ending, last).movedim(0, 2)
        first, second = list[Tensor](), list[Tensor]()
        for k in reversed(range(len(h))):
            a, curved = keep[k] * a, keep[k] * curved
            first.append(a)
            second.append(curved)
            t, x = as_like(paths.grid.nodes[k], a), own_memory(paths.states[:, k])
            move, earned = _step(problem, t, h[k], increments[:, k], _acting(policy, t), a)
            slope = _slope(earned)
            F = along(move, x)  # [direction, paths, dim]
            carried = torch.einsum("ipk,pkl,jpl->pij", F, curved, F)
            a, curved = slope(x), along(slope, x).movedim(0, 2) + carried
    return Adjoints(
        all_finite("adjoint", torch.stack(first[::-1], dim=1)),
        all_finite("adjoint", torch.stack(second[::-1], dim=1)),
    )


def lean_adjoints(problem: ControlProblem, paths: Paths) -> Float[Tensor, "paths steps *event"]:
    """a of every step with the controls held at those of the path, for ``noise_matching_loss``.

    Args:
        problem: an Ito equation; once differentiable.
        paths: by Euler-Maruyama, to the horizon, with their actions and increments.

    Raises:
        ValueError: as ``adjoints``.
    """
    increments, actions = _increments(problem, None, paths), kept_actions(paths)
    h, keep = _steps(problem, paths)
    with torch.no_grad():
        a = _ending(problem)(own_memory(paths.states[:, -1]))
        each = list[Tensor]()
        for k in reversed(range(len(h))):
            a = keep[k] * a
            each.append(a)
            t = as_like(paths.grid.nodes[k], a)
            held = _held(actions[:, k])
            earned = _step(problem, t, h[k], increments[:, k], held, a)[1]
            a = _slope(earned)(own_memory(paths.states[:, k]))
    return all_finite("adjoint", torch.stack(each[::-1], dim=1))


def hamiltonian(
    problem: ControlProblem,
    t: Tensor,
    states: Float[Tensor, "paths dim"],
    controls: Float[Tensor, " paths *action"],
    first: Float[Tensor, "paths dim"],
    second: Float[Tensor, "paths dim dim"],
) -> Float[Tensor, " paths"]:
    """H = r + b . a + 1/2 tr(sigma sigma' A), reward/time; to be maximised in the control."""
    sde = problem.dynamics
    drift = sde.drift_at(t, states, controls)
    sigma = sde.columns(t, states, controls)
    noise = torch.einsum("pij,pik,pkj->p", sigma, second, sigma)
    return _reward(problem, t, states, controls) + (drift * first).sum(1) + 0.5 * noise


def matching_loss(
    problem: ControlProblem, policy: Policy, paths: Paths, adjoints: Adjoints
) -> Float[Tensor, " paths"]:
    """- int H(t, X_t, u(t, X_t), a_t, A_t) dt of every path; the gradient goes through u alone.

    Its mean has the gradient of -J where the paths and the adjoints are the policy's own.

    Args:
        problem: which pays.
        policy: u, to be improved.
        paths: of the control before.
        adjoints: of these paths.

    Raises:
        ValueError: the policy has a memory.
    """
    require_memoryless(policy, paths)
    _require_like(paths, adjoints.first)
    h, _ = _steps(problem, paths)
    each = []
    for k, t in enumerate(as_like(paths.grid.nodes[:-1], paths.states)):
        x = paths.states[:, k]
        u = mean_action(policy, t, x)
        each.append(
            h[k] * hamiltonian(problem, t, x, u, adjoints.first[:, k], adjoints.second[:, k])
        )
    return -(discount_factors(problem, paths) * torch.stack(each, dim=1)).sum(1)


def noise_matching_loss(
    problem: ControlProblem,
    policy: Policy,
    paths: Paths,
    first: Float[Tensor, "paths steps *event"],
) -> Float[Tensor, " paths"]:
    """- int (r + b . a) dt + a . sigma dW of every path; the gradient goes through u alone.

    The gradient in u is that of ``matching_loss`` in mean, with a dW' for A sigma h, if the paths
    are the policy's own: only at them, since sigma enters linearly here.

    Args:
        problem: which pays.
        policy: u, to be improved.
        paths: of the control before, with their increments.
        first: ``adjoints(...).first``, or ``lean_adjoints``.

    Raises:
        ValueError: as ``adjoints``.
    """
    require_memoryless(policy, paths)
    _require_like(paths, first)
    increments = _increments(problem, None, paths)
    h, _ = _steps(problem, paths)
    each = []
    for k, t in enumerate(as_like(paths.grid.nodes[:-1], paths.states)):
        x = paths.states[:, k]
        u = mean_action(policy, t, x)
        moved = h[k] * problem.dynamics.drift_at(t, x, u)
        moved = moved + problem.dynamics.diffuse(t, x, increments[:, k], u)
        earned = (moved * first[:, k]).flatten(1).sum(1)
        each.append(h[k] * _reward(problem, t, x, u) + earned)
    return -(discount_factors(problem, paths) * torch.stack(each, dim=1)).sum(1)


def _require_like(paths: Paths, first: Tensor) -> None:
    if first.shape != paths.states[:, 1:].shape:
        raise ValueError(
            f"adjoints must be {list(paths.states[:, 1:].shape)}, one for each step of these "
            f"paths, got {list(first.shape)}"
        )
    all_finite("adjoints", first)


def _acting(policy: Policy, t: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: mean_action(policy, t, x)


def _held(actions: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: actions


def _step(
    problem: ControlProblem,
    t: Tensor,
    h: Tensor,
    increment: Tensor,
    acting: Callable[[Tensor], Tensor],
    a: Tensor,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """x -> where Euler's step leads; x -> what the step pays, and what that is worth by a."""

    def move(x: Tensor) -> Tensor:
        u = acting(x)
        return (
            x
            + h * problem.dynamics.drift_at(t, x, u)
            + problem.dynamics.diffuse(t, x, increment, u)
        )

    def earned(x: Tensor) -> Tensor:
        return h * _reward(problem, t, x, acting(x)) + (a * move(x)).flatten(1).sum(1)

    return move, earned


def _slope(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Gradient of a function of one path each; NaN where the function is not finite."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        each = function(x)
        return each.sum(), each

    def slope(x: Tensor) -> Tensor:
        gradient, each = torch.func.grad(total, has_aux=True)(x)
        return gradient + 0 * each.view(-1, *[1] * (x.ndim - 1))

    return slope


def _ending(problem: ControlProblem) -> Callable[[Tensor], Tensor]:
    """Gradient of the terminal reward."""
    reward = problem.terminal_reward
    if reward is None:
        return torch.zeros_like
    return _slope(
        lambda x: one_a_path("terminal_reward", call("terminal_reward", reward, x), len(x))
    )


def _reward(problem: ControlProblem, t: Tensor, x: Tensor, u: Tensor) -> Float[Tensor, " paths"]:
    if problem.running_reward is None:
        return x.new_zeros(len(x))
    return one_a_path(
        "running_reward", call("running_reward", problem.running_reward, t, x, u), len(x)
    )


def _steps(problem: ControlProblem, paths: Paths) -> tuple[Tensor, Tensor]:
    """h, and what a reward at its end is worth at its beginning."""
    h, rate = as_like(paths.grid.steps, paths.states), problem.discount
    if callable(rate):
        raise ValueError("problem.discount must be a number: adjoints do not differentiate it")
    return h, torch.exp(-rate * h)


def _increments(problem: ControlProblem, policy: Policy | None, paths: Paths) -> Tensor:
    """The noise of the paths, which must be Euler's, to the horizon."""
    require_dynamics(paths)
    require_whole(problem, paths)
    if paths.ends is not None:
        raise ValueError("paths must all go on to the horizon: an exit is no smooth function of x")
    problem.dynamics.require_calculus("ito", "adjoint_matching")
    problem.dynamics.require_no_jumps("whether one happens is no smooth function of x")
    if policy is not None:
        if policy.is_random:
            raise ValueError("policy must be deterministic: adjoints are of a control u(t, x)")
        require_memoryless(policy, paths)
    if paths.increments is None:
        raise ValueError(
            'paths must have kept their increments: simulate(..., keep=("increments", ...))'
        )
    return paths.increments
