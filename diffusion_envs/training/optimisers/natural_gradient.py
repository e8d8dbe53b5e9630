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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.environment import Environment
from diffusion_envs.objectives.protocol import (
    require_count,
    require_not_negative,
    require_positive,
)
from diffusion_envs.training.critic import NonFiniteError
from diffusion_envs.training.optimisers.protocol import Groups, Metric, parameters_of
from diffusion_envs.training.path_metric import (
    PathMetric,
    flattened,
    require_metric,
    unflattened,
)

Vector = Float[Tensor, " parameters"]


@dataclass(frozen=True)
class NaturalGradient:
    """(F + lambda)^-1 g, as long as the path KL of the new policy from the old one allows.

    The objective's learning rate is where schedules begin: a step is scaled by what they make of
    it, relative to that.

    Attributes:
        nats: most path KL of a step, at the learning rate's first value.
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
        require_positive(nats=self.nats, share=self.share)
        require_not_negative(damping=self.damping, momentum=self.momentum)
        require_count(iterations=self.iterations)
        if self.rate is not None:
            require_positive(rate=self.rate)
        for name, value, most in (("share", self.share, 1), ("momentum", self.momentum, 1 - 1e-9)):
            if value > most:
                raise ValueError(f"{name} must be at most {most:g}, got {value}")

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> "NaturalSteps":
        """Begin; weights do not decay.

        Raises:
            ValueError: the sampler is a black box or an ODE, or its standard deviations learn.
        """
        require_metric(environment, "NaturalGradient")
        return NaturalSteps(self, groups, rate)


class NaturalSteps:
    """Natural gradient steps.

    Args:
        settings: of the steps.
        groups: one, of the policy's parameters.
        rate: where the learning rate begins.
    """

    clips = False

    def __init__(self, settings: NaturalGradient, groups: Groups, rate: float) -> None:
        self.settings, self.first_rate = settings, rate
        self.param_groups: Groups = [{"lr": rate, **group} for group in groups]
        self.parameters = parameters_of(self.param_groups)
        self.gradient = GradientMean(settings.momentum)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, metric: Metric) -> dict[str, float]:
        """One step within the trust region.

        Raises:
            NonFiniteError: the direction is not finite.
        """
        settings = self.settings
        g = self.gradient.after(flattened([_grad(p) for p in self.parameters]))
        d, residual = natural_direction(
            metric("direction", settings.share).product, g, settings.iterations, settings.damping
        )
        scale = self.param_groups[0]["lr"] / self.first_rate
        return take(
            self.parameters,
            d,
            metric("length", settings.share),
            nats=settings.nats,
            rate=settings.rate,
            scale=scale,
        ) | {"natural_residual": residual}

    def state_dict(self) -> dict[str, Any]:
        """The learning rate and the gradient's mean."""
        rates = [group["lr"] for group in self.param_groups]
        return {"rates": rates, "gradient": self.gradient.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for group, rate in zip(self.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self.gradient.load_state_dict(state["gradient"], self.parameters[0])


def natural_direction(
    product: Callable[[Vector], Vector], g: Vector, iterations: int, damping: float
) -> tuple[Vector, float]:
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


def take(
    parameters: list[Any],
    d: Vector,
    metric: PathMetric,
    *,
    nats: float,
    rate: float | None,
    scale: float,
) -> dict[str, float]:
    """Take the step -s d, s = sqrt(2 nats / d'Fd) or less; what it costs.

    Args:
        parameters: that are changed.
        d: direction in which the loss rises.
        metric: F of the length.
        nats: most path KL of the step.
        rate: most s, if there is one.
        scale: of the step, beyond that.

    Raises:
        NonFiniteError: direction or length is not finite.
    """
    along = metric.path_kl(d)  # at s = 1
    size = float(d.norm())
    if not (math.isfinite(along) and math.isfinite(size)):
        raise NonFiniteError(
            f"the natural gradient's norm is {size} and its path KL {along} nats; no weight was "
            "changed. Lower guidance, raise damping, or use float32"
        )
    # a direction that costs nothing has no length, but for the rate's
    length = math.sqrt(nats / along) if along > 0 else math.inf
    length = min(length, math.inf if rate is None else rate)
    length = scale * length if math.isfinite(length) else 0.0
    calls = metric.environment.model.calls
    before = metric.actions()
    with torch.no_grad():
        for parameter, part in zip(parameters, unflattened(d, parameters), strict=True):
            parameter.sub_(length * part)
    measured = metric.measured_kl(before, metric.actions())
    metric.environment.uncount(calls)  # only to log
    return {
        "step_length": length,
        "step_path_kl": length**2 * along,
        "measured_step_path_kl": measured,
    }


class GradientMean:
    """Running mean of gradients, without the bias of its beginning.

    Args:
        momentum: share that is kept from one to the next.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum, self.count, self.total = momentum, 0, None

    def after(self, gradient: Vector) -> Vector:
        """The mean, this gradient included."""
        if self.momentum == 0:
            return gradient
        before = 0.0 if self.total is None else self.momentum * self.total
        self.total: Tensor | None = before + (1 - self.momentum) * gradient
        self.count += 1
        return self.total / (1 - self.momentum**self.count)

    def state_dict(self) -> dict[str, Any]:
        """The sum and how many there were."""
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Go on from there."""
        self.count, total = state["count"], state["total"]
        self.total = None if total is None else total.to(like, copy=True)


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
