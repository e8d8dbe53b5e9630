"""Natural gradient in the metric of path laws, within a trust region: continuous-time TRPO.

Step         th <- th - s d,   d = (F + lambda)^-1 g by conjugate gradients. F is the Hessian of the
             path KL of the new policy from the old one (``path_metric``), so that s d costs
             s^2 d'Fd / 2 nats to second order, and among all steps of as many nats lowers the loss
             most. Length: s = sqrt(2 nats / d'Fd), the edge of the trust region; with ``rate`` the
             smaller one of that and ``rate``, which is the minimiser of
                 <g, step> + path KL of the new policy from the old one / rate,
             mirror descent of policies. With rate = 1 / kl_weight and a linear reward that is
             Newton's step: at the optimum nothing is left.
Damping      lambda is relative to the curvature along the gradient, g'Fg / g'g: the same damping
             does for parameters and rewards in any unit. Directions that the rows of F do not show
             have no curvature there; lambda and few iterations keep the step out of them.
Two shares   F of the direction and F of the length are from rows drawn independently: a direction
             is flattered by the rows that it was solved on, and its length would be too long.
Cost         Network calls of a step: (2 iterations + 1) share x rows of the roll-out.
Several      Each optimiser step (``epochs`` x ``minibatches`` of an update) spends as many nats.
Sources      "Score as Action", arXiv 2502.01819, Theorem 4.4: J(new) >= L(new) - C path KL;
             [K01] Kakade 2001, A natural policy gradient; [TRPO] Schulman et al. 2015, appendix C.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.environment import Environment
from diffusion_envs.ranges import require_count, require_not_negative, require_numbers
from diffusion_envs.training.optimisers.protocol import Groups, Metric, require_share
from diffusion_envs.training.optimisers.running_mean import RunningMean
from diffusion_envs.training.optimisers.trust_region import TrustRegion, TrustRegionSteps
from diffusion_envs.training.path_metric import require_metric


@dataclass(frozen=True)
class NaturalGradient:
    """(F + lambda)^-1 g, as long as the path KL of the new policy from the old one allows.

    Attributes:
        nats: most path KL of a step, at the learning rate's first value; the objective's rate
            itself is not read, only what schedules make of it.
        rate: step length unless ``nats`` makes it shorter, nats per reward; None: always ``nats``.
        iterations: of conjugate gradients.
        damping: lambda, relative to the curvature along the gradient.
        share: of the roll-out's rows that F is from, and again as many for the length.
        momentum: of the gradient's running mean, from which the step is computed.
    """

    nats: float = 0.01
    rate: float | None = None
    iterations: int = 5
    damping: float = 0.1
    share: float = 0.15
    momentum: float = 0.0

    def __post_init__(self) -> None:
        require_numbers(self)
        TrustRegion(self.nats, self.rate)
        require_not_negative(damping=self.damping)
        require_count(iterations=self.iterations)
        require_share(share=self.share)
        RunningMean(self.momentum, "momentum")

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> TrustRegionSteps:
        """Begin; weights do not decay.

        Raises:
            ValueError: the sampler is a black box or an ODE, or its standard deviations learn.
        """
        require_metric(environment, "NaturalGradient")
        region = TrustRegion(self.nats, self.rate)
        return TrustRegionSteps(groups, rate, NaturalDirection(self), region, self.share)


class NaturalDirection:
    """(F + lambda)^-1 of the gradient's running mean.

    Args:
        settings: of it.
    """

    def __init__(self, settings: NaturalGradient) -> None:
        self.settings, self.mean = settings, RunningMean(settings.momentum, "momentum")

    def __call__(
        self, gradient: Float[Tensor, " parameters"], metric: Metric
    ) -> tuple[Float[Tensor, " parameters"], dict[str, float]]:
        """The direction, and what is left of the equation."""
        settings, g = self.settings, self.mean.after(gradient)
        product = metric("direction", settings.share).product
        d, residual = natural_direction(product, g, settings.iterations, settings.damping)
        return d, {"natural_residual": residual}

    def state_dict(self) -> dict[str, Any]:
        """The gradient's mean."""
        return self.mean.state_dict()

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Go on from there."""
        self.mean.load_state_dict(state, like)


def natural_direction(
    product: Callable[[Float[Tensor, " parameters"]], Float[Tensor, " parameters"]],
    g: Float[Tensor, " parameters"],
    iterations: int,
    damping: float,
) -> tuple[Float[Tensor, " parameters"], float]:
    """(F + lambda)^-1 g by conjugate gradients from 0, lambda = damping g'Fg / g'g.

    Args:
        product: v -> F v, of a symmetric positive semidefinite F.
        g: the gradient.
        iterations: at most; fewer where nothing is left to solve.
        damping: relative to the curvature along the gradient.

    Returns:
        The direction, and |what is left of g| / |g|.
    """
    d, residual, p = torch.zeros_like(g), g.clone(), g.clone()
    first = square = residual @ residual
    if first == 0:
        return d, 0.0
    curvature = product(g)
    shift = damping * (g @ curvature) / first
    least = torch.finfo(g.dtype).eps ** 2 * first  # below it a residual is round-off
    for k in range(iterations):
        bent = (curvature if k == 0 else product(p)) + shift * p
        along = p @ bent
        if not along > 0 or square <= least:  # nothing to solve for
            break
        d = d + square / along * p
        residual = residual - square / along * bent
        before, square = square, residual @ residual
        p = residual + square / before * p
    return d, float((square / first).sqrt())
