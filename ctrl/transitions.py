"""Transitions as decisions (view B): the next state is decided, by the noise of the SDE.

Needs a solver with a transition density. Log-densities are sums over coordinates, never means, in
nats; the policy's mean action stands in the transition, as it does in the dynamics on average.

Steps that a path of another length does not make count 0. A path that left a domain is put onto
the wall in its last step; its density there is that of the state that the step proposed.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require, together
from ctrl.memory import AnyPolicy
from ctrl.paths import (
    Paths,
    in_order,
    kept_actions,
    require_dynamics,
    visited,
    while_running,
)
from ctrl.policy import mean_action
from ctrl.sde import ControlledSDE
from ctrl.solvers import Solver, TransitionSolver, require_transition


@together()
def log_prob(
    sde: ControlledSDE, solver: Solver, policy: AnyPolicy, paths: Paths
) -> Float[Tensor, "paths steps"]:
    """log p(x_{k+1} | x_k) of every step.

    Args:
        sde: the dynamics.
        solver: whose transition it is, normally the one that sampled the paths.
        policy: whose mean action is held over each step.
        paths: states at every node.

    Raises:
        TypeError: the solver has no transition density.
        ValueError: a transition is deterministic and so has no density.
    """
    each = []
    after_each = proposals(sde, require_transition(solver), paths)
    for after, (mean, std) in zip(after_each, _laws(sde, solver, policy, paths), strict=True):
        z = (after - mean) / std
        each.append(-_sum(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)))
    return while_running(torch.stack(each, dim=1), paths)


@together()
def log_ratio(
    sde: ControlledSDE, solver: Solver, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> Float[Tensor, "paths steps"]:
    """log p(x_{k+1} | x_k) - log p_ref(x_{k+1} | x_k) of every step.

    Not computed as a difference of the two, whose leading digits cancel: it is exactly zero where
    the two transitions are equal, in any precision. Over Euler-Maruyama steps it adds up to
    ``girsanov.log_ratio``.

    Args:
        sde: the dynamics.
        solver: whose transition it is, normally the one that sampled the paths.
        policy: in the numerator.
        reference: in the denominator.
        paths: states at every node.

    Raises:
        TypeError: the solver has no transition density.
        ValueError: a transition is deterministic and so has no density.
    """
    laws = _laws(sde, solver, policy, paths)
    reference_laws = _laws(sde, solver, reference, paths)
    each = []
    after_each = proposals(sde, require_transition(solver), paths)
    for after, (mean, std), (mean_ref, std_ref) in zip(
        after_each, laws, reference_laws, strict=True
    ):
        z, shift, scale = (after - mean) / std, (mean - mean_ref) / std_ref, std / std_ref
        widening = 0.5 * (scale.square() - 1) * z.square() - scale.log()
        each.append(_sum(shift * (scale * z + 0.5 * shift) + widening))
    return while_running(torch.stack(each, dim=1), paths)


@together()
def transition_kl(
    sde: ControlledSDE, solver: Solver, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> Float[Tensor, "paths steps"]:
    """KL(p(. | x_k) || p_ref(. | x_k)) of every step; the chain's KL is the mean of their sums.

    Args:
        sde: the dynamics.
        solver: whose transition it is, normally the one that sampled the paths.
        policy: under which the paths were sampled.
        reference: the law that the KL is from.
        paths: states at every node.

    Raises:
        TypeError: the solver has no transition density.
        ValueError: a transition is deterministic and so has no density.
    """
    laws = _laws(sde, solver, policy, paths)
    reference_laws = _laws(sde, solver, reference, paths)
    each = []
    for (mean, std), (mean_ref, std_ref) in zip(laws, reference_laws, strict=True):
        scale = std / std_ref
        widening = 0.5 * (scale.square() - 1) - scale.log()
        each.append(_sum(0.5 * ((mean - mean_ref) / std_ref).square() + widening))
    return while_running(torch.stack(each, dim=1), paths)


def _laws(
    sde: ControlledSDE, solver: Solver, policy: AnyPolicy, paths: Paths
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every next state, both [paths, *event]."""
    sde.require_no_jumps("a step with them has no Gaussian density; use girsanov.log_ratio")
    gaussian = require_transition(solver)
    require_dynamics(paths)
    paths = visited(paths)
    nodes, times = paths.grid.nodes.cpu(), as_like(paths.grid.nodes, paths.states)
    policies = in_order(policy, paths)
    for k, x in enumerate(paths.states[:, :-1].unbind(1)):
        action = mean_action(next(policies), times[k], x)
        mean, std = gaussian.transition(sde, nodes[k], nodes[k + 1], x, action)
        require((std > 0).all(), lambda k=k: _no_density(nodes[k]))
        yield mean, std.expand_as(mean)


def _no_density(t: Tensor) -> ValueError:
    return ValueError(
        f"the transition from t = {t:g} has no density: its standard deviation is not positive "
        "everywhere; give the sde or the sampler noise (eta > 0)"
    )


@torch.no_grad()
def proposals(sde: ControlledSDE, solver: TransitionSolver, paths: Paths) -> tuple[Tensor, ...]:
    """The next state of every step, [paths, *event] each.

    Where paths have ends, the next state of the last step is computed again from its action and
    increment: the path may have been put onto the wall of a domain, which has no density.

    Args:
        sde: the dynamics.
        solver: that made the paths.
        paths: states at every node.

    Raises:
        ValueError: paths with ends have not kept their actions and increments.
    """
    after = paths.states[:, 1:].unbind(1)
    if paths.ends is None:
        return after
    if paths.actions is None or paths.increments is None:
        raise ValueError(
            "paths with ends must have kept their actions and increments: what the last step "
            'proposed is computed from them; simulate(..., keep=("actions", "increments"))'
        )
    nodes, last = paths.grid.nodes.cpu(), paths.ends - 1
    runs, each = visited(paths), []
    for k, state in enumerate(after):
        x, action = runs.states[:, k], kept_actions(runs)[:, k]
        mean, std = solver.transition(sde, nodes[k], nodes[k + 1], x, action)
        unit = paths.increments[:, k] / (nodes[k + 1] - nodes[k]).sqrt().to(x)
        stops = (last == k).view(-1, *[1] * (x.ndim - 1))
        each.append(torch.where(stops, mean + std * unit, state))
    return tuple(each)


def _sum(values: Tensor) -> Float[Tensor, " paths"]:
    return values.reshape(len(values), -1).sum(1)
