"""A mean with its standard error: what every Monte Carlo number is reported as."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Mean, standard error and number of independent samples; prints as ``0.3615(12)``.

    The standard error is infinite where one sample does not tell it, and 0 where the mean is exact.
    """

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(
        cls, values: Float[Tensor, " n"], weights: Float[Tensor, " n"] | None = None
    ) -> "Estimate":
        """The estimate of an expectation from one value per path.

        Two runs on the same noise are compared by the estimate of their paired differences.

        Args:
            values: independent samples.
            weights: quadrature weights, non-negative, summing to 1: then the mean is a weighted
                sum, exact rather than estimated, and its standard error is 0.

        Raises:
            ValueError: there are no values, one is not finite, or the weights do not fit.
        """
        if values.ndim != 1 or not len(values):
            raise ValueError(f"values must be [n] with n at least 1, got {list(values.shape)}")
        sample = values.detach().double()
        if bad := int((~torch.isfinite(sample)).sum()):
            raise ValueError(f"values must be finite, but {bad} of {len(sample)} are not")
        if weights is None:
            error = sample.std().item() / math.sqrt(len(sample)) if len(sample) > 1 else math.inf
            return cls(sample.mean().item(), error, len(sample))
        total = weights.detach().double()
        if total.shape != sample.shape or not bool((total >= 0).all()):
            raise ValueError(f"weights must be [{len(sample)}] and non-negative")
        if not abs(total.sum().item() - 1) <= 1e-5:  # float32 weights miss 1 by round-off
            raise ValueError(f"weights must sum to 1, they sum to {total.sum().item():g}")
        return cls((total * sample).sum().item(), 0.0, len(sample))

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain JSON; an unknown standard error (one sample) is null."""
        error = self.standard_error if math.isfinite(self.standard_error) else None
        return {"mean": self.mean, "standard_error": error, "n": self.n}

    def __str__(self) -> str:
        if not math.isfinite(self.standard_error):
            return f"{self.mean:.4g}(?)"
        if self.standard_error == 0:
            return f"{self.mean:.6g}"
        exponent = int(f"{self.standard_error:.1e}".split("e")[1])  # of the error, to two digits
        digits = max(0, 1 - exponent)
        return f"{self.mean:.{digits}f}({self.standard_error * 10**digits:.0f})"
