"""Transitions as decisions (view B): the next state is decided, by the noise of the SDE.

Needs a solver with a transition density. Log-densities are sums over coordinates, never means, in
nats; the policy's mean action stands in the transition, as it does in the dynamics on average.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require, together
from ctrl.paths import Paths, require_dynamics, require_memoryless
from ctrl.policy import Policy, mean_action
from ctrl.sde import ControlledSDE
from ctrl.solvers import Solver, require_transition


@together()
def log_prob(
    sde: ControlledSDE, solver: Solver, policy: Policy, paths: Paths
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
    for after, (mean, std) in zip(_after(paths), _laws(sde, solver, policy, paths), strict=True):
        z = (after - mean) / std
        each.append(-_sum(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)))
    return torch.stack(each, dim=1)


@together()
def log_ratio(
    sde: ControlledSDE, solver: Solver, policy: Policy, reference: Policy, paths: Paths
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
    for after, (mean, std), (mean_ref, std_ref) in zip(
        _after(paths), laws, reference_laws, strict=True
    ):
        z, shift, scale = (after - mean) / std, (mean - mean_ref) / std_ref, std / std_ref
        widening = 0.5 * (scale.square() - 1) * z.square() - scale.log()
        each.append(_sum(shift * (scale * z + 0.5 * shift) + widening))
    return torch.stack(each, dim=1)


@together()
def transition_kl(
    sde: ControlledSDE, solver: Solver, policy: Policy, reference: Policy, paths: Paths
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
    return torch.stack(each, dim=1)


def _laws(
    sde: ControlledSDE, solver: Solver, policy: Policy, paths: Paths
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every next state, both [paths, *event]."""
    sde.require_no_jumps("a step with them has no Gaussian density; use girsanov.log_ratio")
    gaussian = require_transition(solver)
    require_dynamics(paths)
    require_memoryless(policy, paths)
    nodes, times = paths.grid.nodes.cpu(), as_like(paths.grid.nodes, paths.states)
    for k, x in enumerate(paths.states[:, :-1].unbind(1)):
        action = mean_action(policy, times[k], x)
        mean, std = gaussian.transition(sde, nodes[k], nodes[k + 1], x, action)
        require((std > 0).all(), lambda k=k: _no_density(nodes[k]))
        yield mean, std.expand_as(mean)


def _no_density(t: Tensor) -> ValueError:
    return ValueError(
        f"the transition from t = {t:g} has no density: its standard deviation is not positive "
        "everywhere; give the sde or the sampler noise (eta > 0)"
    )


def _after(paths: Paths) -> tuple[Tensor, ...]:
    return paths.states[:, 1:].unbind(1)


def _sum(values: Tensor) -> Float[Tensor, " paths"]:
    return values.reshape(len(values), -1).sum(1)
