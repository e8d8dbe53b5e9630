"""AdamW, torch's own: the optimiser of published methods."""

from dataclasses import dataclass
from typing import Any

import torch

from diffusion_envs.environment import Environment
from diffusion_envs.training.optimisers.protocol import Groups, Metric


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW at the objective's learning rate and ``UpdateSize``'s weight decay.

    Attributes:
        fused: one kernel for all parameters: less time and no temporary memory, other rounding.
    """

    fused: bool = False

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> "TorchStepper":
        """Begin, on any parameters."""
        fused = True if self.fused else None  # None: torch's own choice, as it ever was
        made = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay, fused=fused)
        return TorchStepper(made)


class TorchStepper:
    """One of torch's optimisers.

    Args:
        optimiser: that makes the steps.
    """

    clips = True

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self.optimiser = optimiser

    @property
    def param_groups(self) -> Groups:
        """The parameters by kind, with their learning rates."""
        return self.optimiser.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimiser.zero_grad(set_to_none)

    def step(self, metric: Metric) -> dict[str, float]:
        """One step; nothing to log."""
        self.optimiser.step()
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Torch's own."""
        return self.optimiser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.optimiser.load_state_dict(state)
