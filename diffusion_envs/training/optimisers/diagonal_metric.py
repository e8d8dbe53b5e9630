"""Preconditioning by the diagonal of the path metric, within a trust region.

Step         d_i = g_i / (F_ii + lambda), F the metric of path laws (``path_metric``), lambda
             relative to the mean of F_ii. F_ii is the mean of (J'xi)_i^2 over xi ~ N(0, c_k): the
             policy's own randomness, not the gradient's square, of which Adam's second moments are
             made and which holds the noise of the rewards too. A running mean over updates.
Assumes      That parameters act on the paths one by one: F's other entries are left out of the
             direction, but not of the length, which is that of the whole F.
Cost         Network calls of a step: 2 share x rows of the roll-out.
Sources      Amari 1998, natural gradient; [M20] Martens 2020, new insights and perspectives on the
             natural gradient method, section 11: the empirical Fisher is no Fisher.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffusion_envs.environment import Environment
from diffusion_envs.ranges import require_count, require_not_negative, require_numbers
from diffusion_envs.training.optimisers.protocol import Groups, Metric, require_share
from diffusion_envs.training.optimisers.running_mean import RunningMean
from diffusion_envs.training.optimisers.trust_region import TrustRegion, TrustRegionSteps
from diffusion_envs.training.path_metric import require_metric


@dataclass(frozen=True)
class DiagonalMetric:
    """g_i / (F_ii + lambda), as long as the path KL of the new policy from the old one allows.

    Attributes:
        nats: most path KL of a step, at the learning rate's first value.
        rate: step length unless ``nats`` makes it shorter, nats per reward; None: always ``nats``.
        damping: lambda, relative to the mean of the diagonal.
        share: of the roll-out's rows that the diagonal is from, and again as many for the length.
        vectors: random ones, an update.
        decay: of the diagonal's running mean.
        momentum: of the gradient's running mean, from which the step is computed.
    """

    nats: float = 0.01
    rate: float | None = None
    damping: float = 0.1
    share: float = 0.15
    vectors: int = 16
    decay: float = 0.9
    momentum: float = 0.0

    def __post_init__(self) -> None:
        require_numbers(self)
        TrustRegion(self.nats, self.rate)
        require_not_negative(damping=self.damping)
        require_count(vectors=self.vectors)
        require_share(share=self.share)
        RunningMean(self.decay, "decay")
        RunningMean(self.momentum, "momentum")

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> TrustRegionSteps:
        """Begin; weights do not decay.

        Raises:
            ValueError: the sampler is a black box or an ODE, or its standard deviations learn.
        """
        require_metric(environment, "DiagonalMetric")
        region = TrustRegion(self.nats, self.rate)
        return TrustRegionSteps(groups, rate, DiagonalDirection(self), region, self.share)


class DiagonalDirection:
    """The gradient's running mean over the diagonal's.

    Args:
        settings: of both.
    """

    def __init__(self, settings: DiagonalMetric) -> None:
        self.settings = settings
        self.mean = RunningMean(settings.momentum, "momentum")
        self.diagonal = RunningMean(settings.decay, "decay")

    def __call__(
        self, gradient: Float[Tensor, " parameters"], metric: Metric
    ) -> tuple[Float[Tensor, " parameters"], dict[str, float]]:
        """The direction; nothing to log. Where nothing acts on the paths at all it is 0."""
        drawn = metric("direction", self.settings.share).diagonal(self.settings.vectors)
        diagonal = self.diagonal.after(drawn)
        damped = diagonal + self.settings.damping * diagonal.mean()
        g = self.mean.after(gradient)
        return (g / damped).where(damped > 0, 0 * g), {}

    def state_dict(self) -> dict[str, Any]:
        """Both means."""
        return {"gradient": self.mean.state_dict(), "diagonal": self.diagonal.state_dict()}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Go on from there."""
        self.mean.load_state_dict(state["gradient"], like)
        self.diagonal.load_state_dict(state["diagonal"], like)
