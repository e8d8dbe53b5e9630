"""Transitions as decisions (view B): the next state is decided, by the noise of the SDE.

Needs a solver with a transition density. Log-densities are sums over coordinates, never means.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from ctrl.paths import Paths
from ctrl.policy import Policy
from ctrl.sde import ControlledSDE
from ctrl.solvers import Solver, require_transition


def _each_step(
    sde: ControlledSDE, solver: Solver, policy: Policy, paths: Paths
) -> list[tuple[Tensor, Tensor]]:
    gaussian = require_transition(solver)
    nodes, times = paths.grid.nodes, paths.grid.nodes.to(paths.states)
    return [
        gaussian.transition(sde, nodes[k], nodes[k + 1], x, policy.mean(times[k], x))
        for k, x in enumerate(paths.states[:, :-1].unbind(1))
    ]


def log_prob(
    sde: ControlledSDE, solver: Solver, policy: Policy, paths: Paths
) -> Float[Tensor, "paths steps"]:
    """log p(x_{k+1} | x_k) of the policy's mean action, nats.

    Raises:
        TypeError: the solver has no transition density.
    """
    each = [
        Normal(mean, std.expand_as(mean)).log_prob(after).flatten(1).sum(1)
        for (mean, std), after in zip(
            _each_step(sde, solver, policy, paths), paths.states[:, 1:].unbind(1), strict=True
        )
    ]
    return torch.stack(each, dim=1)


def transition_kl(
    sde: ControlledSDE, solver: Solver, policy: Policy, reference: Policy, paths: Paths
) -> Float[Tensor, "paths steps"]:
    """KL(p(. | x_k) || p_ref(. | x_k)) of every step, nats; they add up to the chain's KL."""
    pairs = zip(
        _each_step(sde, solver, policy, paths),
        _each_step(sde, solver, reference, paths),
        strict=True,
    )
    each = [0.5 * ((m - m_ref) / std).flatten(1).square().sum(1) for (m, std), (m_ref, _) in pairs]
    return torch.stack(each, dim=1)
