"""Path-space likelihood ratios and divergences of controlled SDEs.

Setting      dX = b(t, X, a) dt + sigma(t, X) dW, the same sigma and initial law under both
policies; a is the
             mean action of a policy. u = sigma^{-1} (b(t, X, a) - b(t, X, a_ref)), in units of the
             noise.
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

    Raises:
        ValueError: the diffusion is singular where the drifts differ.
    """
    nodes = paths.grid.nodes[:-1].to(paths.states)
    each = []
    for k, t in enumerate(nodes):
        x = paths.states[:, k]
        shift = sde.drift(t, x, policy.mean(t, x)) - sde.drift(t, x, reference.mean(t, x))
        each.append(sde.whiten(t, x, shift))
    return torch.stack(each, dim=1)


def path_kl(
    sde: ControlledSDE, policy: Policy, reference: Policy, paths: Paths
) -> Float[Tensor, " paths"]:
    """KL(P || P_ref) = E[ 1/2 int |u|^2 dt ], one value per path, nats ([SaA] Theorem 3.1).

    The mean over paths sampled under ``policy`` is unbiased for the KL of the Euler scheme on the
    paths' grid,
    which differs from the continuous-time KL by O(largest step). Of its two unbiased forms this is
    the running one; the other, ``log_ratio``, has the same mean and more variance.

    Raises:
        ValueError: the diffusion is singular where the drifts differ.
    """
    energy = controls(sde, policy, reference, paths).square().sum(-1)
    return time_integral(0.5 * energy, paths.grid)


def log_ratio(
    sde: ControlledSDE, policy: Policy, reference: Policy, paths: Paths
) -> Float[Tensor, " paths"]:
    """log dP/dP_ref of each path: int u . dW + 1/2 int |u|^2 dt, nats ([KS91] 3.5.1).

    On every path it equals the difference of the Euler scheme's transition log-densities.

    Raises:
        ValueError: the paths have not kept their increments, or the diffusion is singular.
    """
    if paths.increments is None:
        raise ValueError(
            'paths must have kept their increments: simulate(..., keep=("increments", ...))'
        )
    u = controls(sde, policy, reference, paths)
    brownian = paths.increments.reshape(u.shape)
    return ito_sum(u, brownian) + time_integral(0.5 * u.square().sum(-1), paths.grid)
