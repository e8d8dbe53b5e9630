"""A running mean without the bias of its beginning."""

from typing import Any

from torch import Tensor


class RunningMean:
    """Of vectors: each counts by a factor less than the one after it.

    Args:
        decay: that factor; 0 keeps the last one alone.
        name: of the factor, where it is no such number.

    Raises:
        ValueError: the factor is not in [0, 1).
    """

    def __init__(self, decay: float, name: str = "decay") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay}")
        self.decay, self.count = decay, 0
        self._total: Tensor | None = None

    def after(self, value: Tensor) -> Tensor:
        """The mean, this vector included."""
        if self.decay == 0:
            return value
        before = 0.0 if self._total is None else self.decay * self._total
        self._total = before + (1 - self.decay) * value
        self.count += 1
        return self._total / (1 - self.decay**self.count)

    def state_dict(self) -> dict[str, Any]:
        """The sum and how many there were."""
        return {"count": self.count, "total": self._total}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Go on from there, on the device of ``like``."""
        self.count, total = state["count"], state["total"]
        self._total = None if total is None else total.to(like, copy=True)
