"""Steps in some direction, as long as the path KL that they cost allows."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_envs.ranges import require_positive
from diffusion_envs.training.optimisers.protocol import Groups, Metric, parameters_of
from diffusion_envs.training.path_metric import PathMetric, flattened, unflattened
from diffusion_envs.training.refusal import NonFiniteError


@dataclass(frozen=True)
class TrustRegion:
    """Steps -s d of a bounded path KL of the new policy from the old one.

    Attributes:
        nats: most path KL of a step, to second order: s = sqrt(2 nats / d'Fd) at most.
        rate: most s; None: always at the edge of the trust region.
    """

    nats: float
    rate: float | None = None

    def __post_init__(self) -> None:
        require_positive(nats=self.nats)
        if self.rate is not None:
            require_positive(rate=self.rate)

    def take(
        self,
        parameters: list[nn.Parameter],
        d: Float[Tensor, " parameters"],
        metric: PathMetric,
        factor: float = 1.0,
    ) -> dict[str, float]:
        """Take the step; its length and path KL, to log.

        The path KL that is measured, on the metric's states, is in no budget: it is only logged.

        Args:
            parameters: that are changed.
            d: direction in which the loss rises.
            metric: F, of rows that ``d`` does not depend on: else d'Fd is too small on average.
            factor: of s, beyond that.

        Raises:
            NonFiniteError: direction or length is not finite; nothing was changed.
        """
        along, size = metric.path_kl(d), float(d.norm())  # of a step of s = 1
        if not (math.isfinite(along) and math.isfinite(size)):
            raise NonFiniteError(
                f"the step's direction has norm {size} and path KL {along} nats; no weight was "
                "changed. Lower guidance, raise damping, or use float32"
            )
        # what costs nothing on these rows has no length but that of the rate
        edge = math.sqrt(self.nats / along) if along > 0 else math.inf
        length = min(edge, math.inf if self.rate is None else self.rate)
        length = factor * length if math.isfinite(length) else 0.0
        calls = metric.environment.model.calls
        before = metric.actions()
        with torch.no_grad():
            for parameter, part in zip(parameters, unflattened(d, parameters), strict=True):
                parameter.sub_(length * part)
        measured = metric.measured_kl(before, metric.actions())
        metric.environment.uncount(calls)
        return {
            "step_length": length,
            "step_path_kl": length**2 * along,
            "measured_step_path_kl": measured,
        }


@runtime_checkable
class Direction(Protocol):
    """Makes a direction of a gradient."""

    def __call__(
        self, gradient: Float[Tensor, " parameters"], metric: Metric
    ) -> tuple[Float[Tensor, " parameters"], dict[str, float]]:
        """The direction in which the loss rises, and numbers to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next direction depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Go on from there, on the device of ``like``."""
        ...


class TrustRegionSteps:
    """A stepper: a direction, and a trust region in it.

    The objective's learning rate is where schedules begin: steps are scaled by what they make of
    it, relative to that, and their path KL by the square.

    Args:
        groups: the parameters.
        rate: where the learning rate begins.
        direction: of each step.
        region: that bounds its length.
        share: of the roll-out's rows that the length is from.
    """

    clips = False

    def __init__(
        self, groups: Groups, rate: float, direction: Direction, region: TrustRegion, share: float
    ) -> None:
        self.param_groups: Groups = [{"lr": rate, **group} for group in groups]
        self.parameters, self.first_rate = parameters_of(self.param_groups), rate
        self.direction, self.region, self.share = direction, region, share

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, metric: Metric) -> dict[str, float]:
        """One step within the trust region.

        Raises:
            NonFiniteError: the direction is not finite; nothing was changed.
        """
        grads = (p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters)
        d, numbers = self.direction(flattened(list(grads)), metric)
        factor = self.param_groups[0]["lr"] / self.first_rate
        length = metric("length", self.share)
        return self.region.take(self.parameters, d, length, factor) | numbers

    def state_dict(self) -> dict[str, Any]:
        """The learning rates and what the direction keeps."""
        rates = [group["lr"] for group in self.param_groups]
        return {"rates": rates, "direction": self.direction.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for group, rate in zip(self.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self.direction.load_state_dict(state["direction"], self.parameters[0])
