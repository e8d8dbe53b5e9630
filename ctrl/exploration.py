"""The exploratory SDE: what infinitely frequent drawing of actions averages to.

    dX = b~ dt + sigma~ dW,   b~ = E_{a ~ pi} b(t, x, a),   sigma~ sigma~' = E_{a ~ pi} sigma sigma'

([WZZ] equations 6 and 8; in this library "exploratory" and "relaxed" mean this.) Roll-outs that
draw an action at every node and hold it have this law in the limit of small steps, with an error
O(h). Where the drift is affine in the action and the diffusion control-free, it is the SDE under
the mean action: the standard deviation of the actions drops out.

Sources  [WZZ] Wang, Zariphopoulou & Zhou 2020, reinforcement learning in continuous time and space,
         JMLR 21.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ctrl.devices import as_like
from ctrl.policy import RandomPolicy
from ctrl.sde import ControlledSDE


def exploratory_sde(
    sde: ControlledSDE, policy: RandomPolicy, *, nodes: int = 8, state_dim: int | None = None
) -> ControlledSDE:
    """The averaged dynamics of a Gaussian policy, a ``ControlledSDE`` whose action is its mean.

    Simulate it with ``DeterministicPolicy(policy.mean)``. The averages are Gauss-Hermite sums over
    the action: exact for coefficients that are polynomials in it of degree below ``nodes``.

    Args:
        sde: the dynamics, in the sense of Ito.
        policy: one of the Gaussian policies; only its standard deviation is used.
        nodes: of the rule for each coordinate of the action.
        state_dim: coordinates of the state; needed for scalar or general noise whose diffusion is
            controlled, since its average takes a Brownian motion for each.

    Returns:
        An SDE with the same noise where the diffusion is control-free or the noise diagonal, else
        with general noise, sigma~ the symmetric square root.

    Raises:
        ValueError: a Stratonovich equation (whose correction does not average so), fewer than one
            node, or ``state_dim`` is missing.
        TypeError: the policy does not draw its actions.
    """
    sde.require_calculus("ito", "exploratory_sde")
    sde.require_no_jumps(
        "their averages over actions are not made here; simulate the policy itself"
    )
    if not isinstance(policy, RandomPolicy):
        raise TypeError(f"policy must draw its actions, got {type(policy).__name__}")
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}")

    def drawn(t: Tensor, states: Tensor, mean: Tensor) -> Iterator[tuple[float, Tensor]]:
        return drawn_actions(policy, t, mean, nodes, states)

    def drift(t: Tensor, states: Tensor, mean: Tensor) -> Tensor:
        each = [weight * sde.drift_at(t, states, a) for weight, a in drawn(t, states, mean)]
        return torch.stack(each).sum(0)

    if not sde.controls_diffusion:
        return ControlledSDE(drift, sde.diffusion, sde.noise, sde.noise_dim)

    if sde.noise == "diagonal":

        def root(t: Tensor, states: Tensor, mean: Tensor) -> Tensor:
            squares = [
                weight * (torch.ones_like(states) * sde.diffusion_at(t, states, a)).square()
                for weight, a in drawn(t, states, mean)
            ]
            return torch.stack(squares).sum(0).sqrt()

        return ControlledSDE(drift, root, controls_diffusion=True)
    if state_dim is None or state_dim < 1:
        raise ValueError(
            f"state_dim must be given for {sde.noise} noise with a controlled diffusion, got "
            f"{state_dim}"
        )

    def square_root(t: Tensor, states: Tensor, mean: Tensor) -> Tensor:
        each = [(weight, sde.columns(t, states, a)) for weight, a in drawn(t, states, mean)]
        covariance = torch.stack([weight * s @ s.mT for weight, s in each]).sum(0)
        scales, axes = torch.linalg.eigh(covariance)
        return axes @ torch.diag_embed(scales.clamp_min(0).sqrt()) @ axes.mT

    return ControlledSDE(drift, square_root, "general", state_dim, controls_diffusion=True)


def drawn_actions(
    policy: RandomPolicy, t: Tensor, mean: Tensor, nodes: int, states: Tensor | None = None
) -> Iterator[tuple[float, Tensor]]:
    """Weights and actions [paths, *action] of a Gauss-Hermite rule for a Gaussian policy.

    Args:
        policy: whose standard deviation is used.
        t: time, [].
        mean: of the actions, [paths, *action].
        nodes: of the rule for each coordinate of the action.
        states: x, where the policy's standard deviation depends on it.

    Raises:
        ValueError: the product rule would have more than 100 000 nodes.
    """
    shape = mean.shape[1:]
    if nodes ** shape.numel() > 100_000:
        raise ValueError(
            f"nodes ** action coordinates must be at most 100000, got {nodes} ** {shape.numel()}"
        )
    points, masses = np.polynomial.hermite_e.hermegauss(nodes)
    rule = list(zip((masses / masses.sum()).tolist(), points.tolist(), strict=True))
    for chosen in itertools.product(rule, repeat=shape.numel()):
        weight = math.prod(mass for mass, _ in chosen)
        point = torch.tensor([place for _, place in chosen], dtype=torch.float64)
        normal = as_like(point, mean).view(shape)
        yield weight, policy.act(mean, t, normal.expand_as(mean), states)
