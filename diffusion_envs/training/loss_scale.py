"""Loss scaling: gradients of float16 networks, whose small numbers would be 0 and large ones inf.

float16 holds magnitudes of 6e-8 to 65504. The loss is multiplied before it is differentiated, the
gradient of the float32 parameters divided afterwards; both by a power of two, which rounds nothing.
The factor is that of ``torch.amp.GradScaler``: halved where a gradient overflows, doubled after
many that do not. Where torch then skips the step, and with it all samples that it was to learn
from, the trainer computes the gradient of the same rows again, so that no update learns nothing.

Source      Micikevicius et al. 2018, "Mixed precision training", ICLR, arXiv 1710.03740, section 3.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class LossScale:
    """The factor of the losses, and what becomes of it.

    Attributes:
        scale: the factor; 1 where the network is not float16, and then it stays.
        used: whether there is anything to scale.
        kept: gradients in a row that were finite at this factor.
        patience: so many of them double it.
        repeated: gradients that overflowed, so far.
        finite_losses: 1 if all losses of the last gradient were finite, otherwise 0.
    """

    scale: float = 1.0
    used: bool = False
    kept: int = 0
    patience: int = 2000
    repeated: int = 0
    finite_losses: Tensor = field(default_factory=lambda: torch.ones(()))

    @classmethod
    def of(cls, precision: torch.dtype) -> "LossScale":
        """For a network of this precision: 2^16 at first if it is float16, as torch begins."""
        return cls(2.0**16, used=True) if precision == torch.float16 else cls()

    def scaled(self, losses: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each loss, multiplied."""
        if not self.used:
            yield from losses
            return
        self.finite_losses = torch.ones(())
        for loss in losses:
            finite = loss.detach().isfinite().float()
            self.finite_losses = finite * self.finite_losses.to(finite.device)
            yield self.scale * loss

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the factor out of the gradients."""
        if not self.used:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.scale)

    def shrink(self) -> bool:
        """Halve the factor after an overflow; False if there is none that could be to blame."""
        if not self.used or self.scale <= 1:
            return False
        self.scale, self.kept, self.repeated = self.scale / 2, 0, self.repeated + 1
        return True

    def keep(self) -> None:
        """A gradient was finite; after many of them the factor is doubled."""
        self.kept += 1
        if self.used and self.kept == self.patience:
            self.scale, self.kept = 2 * self.scale, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; nothing where nothing is scaled."""
        if not self.used:
            return {}
        return {"scale": self.scale, "kept": self.kept, "repeated": self.repeated}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one of another precision, or of before, has nothing of it."""
        if self.used and state:
            self.scale, self.kept = state["scale"], state["kept"]
            self.repeated = state["repeated"]

    def numbers(self) -> dict[str, float]:
        """What to log: the factor, and how many gradients were computed again so far."""
        if not self.used:
            return {}
        return {"loss_scale": self.scale, "repeated_gradients": float(self.repeated)}
