"""AdamW within a trust region: what the length of a step does, without its direction.

Step         AdamW's own step v, at the objective's learning rate, or sqrt(2 nats / v'Fv) v where v
             would cost more path KL than ``nats``, to second order (``path_metric``).
Assumes      Nothing of the direction. AdamW's moments go on as if it had gone all the way.
Cost         Network calls of a step: share x rows of the roll-out.
"""

from dataclasses import dataclass

import torch

from diffusion_envs.environment import Environment
from diffusion_envs.ranges import require_numbers
from diffusion_envs.training.optimisers.adamw import TorchStepper
from diffusion_envs.training.optimisers.protocol import (
    Groups,
    Metric,
    parameters_of,
    require_share,
)
from diffusion_envs.training.optimisers.trust_region import TrustRegion
from diffusion_envs.training.path_metric import flattened, require_metric


@dataclass(frozen=True)
class BoundedAdamW:
    """AdamW's steps, none of more path KL than ``nats``.

    Attributes:
        nats: most path KL of the new policy from the old one.
        share: of the roll-out's rows that the path KL of a step is from.
    """

    nats: float = 0.01
    share: float = 0.15

    def __post_init__(self) -> None:
        require_numbers(self)
        TrustRegion(self.nats)
        require_share(share=self.share)

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> "BoundedSteps":
        """Begin.

        Raises:
            ValueError: the sampler is a black box or an ODE, or its standard deviations learn.
        """
        require_metric(environment, "BoundedAdamW")
        own = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
        return BoundedSteps(own, TrustRegion(self.nats, rate=1.0), self.share)


class BoundedSteps(TorchStepper):
    """Steps of one of torch's optimisers, shortened where they leave a trust region.

    Args:
        optimiser: torch's.
        region: to stay in.
        share: of the roll-out's rows that the path KL is from.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, region: TrustRegion, share: float) -> None:
        super().__init__(optimiser)
        self.region, self.share = region, share

    def step(self, metric: Metric) -> dict[str, float]:
        """The optimiser's step, or as much of it as costs ``nats``.

        Raises:
            NonFiniteError: the step is not finite; no parameter was changed.
        """
        parameters = parameters_of(self.param_groups)
        before = [p.detach().clone() for p in parameters]
        super().step(metric)
        step = [old - p.detach() for old, p in zip(before, parameters, strict=True)]
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
        return self.region.take(parameters, flattened(step), metric("length", self.share))
