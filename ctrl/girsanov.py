"""Path-space likelihood ratios and divergences of controlled SDEs.

Setting      dX = b(t, X, a) dt + sigma(t, X) dW, the same sigma and initial law under both
             policies; a is the mean action of a policy.
             u = sigma^{-1} (b(t, X, a) - b(t, X, a_ref)), in units of the noise.
Conventions  paths sampled under the policy, not the reference; natural logarithms.
Sources      [SaA] "Score as Action", arXiv 2502.01819, Theorem 3.1.
             [KS91] Karatzas & Shreve, Brownian Motion and Stochastic Calculus, 3.5.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.paths import Paths, ito_sum, time_integral
from ctrl.policy import Policy
from ctrl.sde import ControlledSDE


def controls(
    sde: ControlledSDE, policy: Policy, reference: Policy, paths: Paths
) -> Float[Tensor, "paths steps noise"]:
    """u at the left end of every step: the drift's shift in units of noise, 1/sqrt(time).

    Args:
        sde: the dynamics, shared by both policies.
        policy: with the drift b(t, X, mean).
        reference: with the drift to compare with.
        paths: states at every node.

    Raises:
        ValueError: the diffusion is singular where the drifts differ, or a control is not finite.
    """
    nodes = paths.grid.nodes[:-1].to(paths.states)
    each = []
    for k, t in enumerate(nodes):
        x = paths.states[:, k]
        shift = sde.drift_at(t, x, policy.mean(t, x)) - sde.drift_at(t, x, reference.mean(t, x))
        each.append(sde.whiten(t, x, shift))
    found = torch.stack(each, dim=1)
    finite = torch.isfinite(found).all(2).all(0)
    if not bool(finite.all()):
        k = int((~finite).nonzero()[0])
        raise ValueError(
            f"controls are not finite at step {k} (t = {nodes[k]:g}): a drift is not finite there, "
            "or the diffusion is too small for this precision"
        )
    return found


def path_kl(
    sde: ControlledSDE, policy: Policy, reference: Policy, paths: Paths
) -> Float[Tensor, " paths"]:
    """KL(P || P_ref) = E[ 1/2 int |u|^2 dt ], one value per path, nats ([SaA] Theorem 3.1).

    The laws are those of the SDE with the mean action: the spread of a random policy drops out in
    continuous time, and moves the value by O(step) where actions are drawn and held.

    Args:
        sde: the dynamics, shared by both policies.
        policy: under which the paths were sampled.
        reference: the law that the KL is from.
        paths: states at every node.

    Returns:
        One value per path. Under a deterministic policy their mean is unbiased for the KL of the
        Euler scheme on the paths' grid, which differs from the continuous-time KL by O(largest
        step). Of its two unbiased forms this is the running one; the other, ``log_ratio``, has the
        same mean and more variance.

    Raises:
        ValueError: the diffusion is singular where the drifts differ, or a control is not finite.
    """
    energy = controls(sde, policy, reference, paths).square().sum(-1)
    return time_integral(0.5 * energy, paths.grid)


def log_ratio(
    sde: ControlledSDE, policy: Policy, reference: Policy, paths: Paths
) -> Float[Tensor, " paths"]:
    """log dP/dP_ref of each path: int u . dW + 1/2 int |u|^2 dt, nats ([KS91] 3.5.1).

    On every path it equals the difference of the Euler scheme's transition log-densities. A
    gradient in the policy holds dW; where the states are to be held, as in a likelihood-ratio
    gradient, use ``transitions.log_ratio``.

    Args:
        sde: the dynamics, shared by both policies.
        policy: under which the paths were sampled; deterministic.
        reference: the law in the denominator.
        paths: states at every node, and the increments that moved them.

    Raises:
        ValueError: the paths have not kept their increments, the policy draws its actions (the
            increments are then not all that moved the states), or the diffusion is singular.
    """
    if paths.increments is None:
        raise ValueError(
            'paths must have kept their increments: simulate(..., keep=("increments", ...))'
        )
    if policy.is_random:
        raise ValueError(
            "policy must be deterministic: where actions are drawn, W alone does not determine the "
            "path; use GaussianPolicy.log_prob of the kept actions"
        )
    u = controls(sde, policy, reference, paths)
    brownian = paths.increments.reshape(u.shape)
    return ito_sum(u, brownian) + time_integral(0.5 * u.square().sum(-1), paths.grid)
