"""What an optimiser is, and what the trainer asks of it."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from diffusion_envs.environment import Environment
from diffusion_envs.training.path_metric import PathMetric

Metric: TypeAlias = Callable[[str, float], PathMetric]
"""(what for, share of the rows) -> the metric of path laws at the policy now, on the roll-out.

What it is for names the draw of its rows: metrics of two names have rows drawn independently.
"""
Groups: TypeAlias = list[dict[str, Any]]
"""Parameters by kind, as torch's optimisers take them: "params", and what differs for them."""


@runtime_checkable
class Stepper(Protocol):
    """An optimiser at work on some parameters."""

    @property
    def param_groups(self) -> Groups:
        """Whose "lr" may be changed between two steps."""
        ...

    @property
    def clips(self) -> bool:
        """Whether gradients are scaled down to ``max_gradient_norm`` before a step.

        An optimiser that limits its own steps gets them as they are.
        """
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        ...

    def step(self, metric: Metric) -> dict[str, float]:
        """Change the parameters, by their gradients, which are finite; numbers to log.

        Raises:
            NonFiniteError: the step would not be finite; no parameter was changed.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@runtime_checkable
class Optimiser(Protocol):
    """A way to make steps of gradients, as a frozen dataclass of its hyperparameters."""

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> Stepper:
        """Begin.

        Args:
            groups: the parameters.
            rate: learning rate of groups that have none of their own: the objective's.
            weight_decay: for optimisers that decay weights.
            environment: that the parameters act in.

        Raises:
            ValueError: this optimiser is not for such parameters, or for this sampler.
        """
        ...


def parameters_of(groups: Groups) -> list[nn.Parameter]:
    """The parameters of all groups, in their order."""
    return [parameter for group in groups for parameter in group["params"]]


def require_share(**shares: float) -> None:
    """Refuse what is no share, by name."""
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
