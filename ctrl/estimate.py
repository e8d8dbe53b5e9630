"""A mean with its standard error: what every Monte Carlo number is reported as.

Sources  [O13] Owen, Monte Carlo theory, methods and examples, chapter 9 (importance sampling).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import read


@dataclass(frozen=True)
class Estimate:
    """Mean, standard error and number of independent samples; prints as ``0.3615(12)``.

    The standard error is infinite where one sample does not tell it, and 0 where the mean is exact.

    Attributes:
        mean: of the samples, in their unit.
        standard_error: of the mean, in the same unit.
        n: how many independent samples.
    """

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(
        cls,
        values: Float[Tensor, " n"],
        *,
        quadrature_weights: Float[Tensor, " n"] | None = None,
        importance_weights: Float[Tensor, " n"] | None = None,
    ) -> "Estimate":
        """The estimate of an expectation from one value per path.

        Two runs on the same noise are compared by the estimate of their paired differences.

        Args:
            values: independent samples; with quadrature weights the values at the nodes.
            quadrature_weights: of a rule (``noise.gauss_hermite``), non-negative, summing to 1: the
                weighted sum is exact rather than estimated, and its standard error is 0.
            importance_weights: of random samples (``girsanov.importance_weights``), non-negative,
                summing to 1: the weighted sum m is random, with the standard error
                sqrt(sum w^2 (value - m)^2) of a ratio of two means ([O13] equation 9.8).

        Raises:
            ValueError: there are no values, one is not finite, both kinds of weights are given, or
                they do not fit.
            TypeError: the values are not a tensor.
        """
        if not isinstance(values, Tensor):
            raise TypeError(
                f"values must be a tensor [n], one for each path, got {type(values).__name__}; "
                "torch.as_tensor(...) makes one of an array or a list"
            )
        if values.ndim != 1 or not len(values):
            raise ValueError(f"values must be [n] with n at least 1, got {list(values.shape)}")
        sample = values.detach().cpu().double()  # one copy, and float64 is not everywhere
        if bad := int((~torch.isfinite(sample)).sum()):
            raise ValueError(f"values must be finite, but {bad} of {len(sample)} are not")
        by_name = {
            "quadrature_weights": quadrature_weights,
            "importance_weights": importance_weights,
        }
        chosen = {name: weights for name, weights in by_name.items() if weights is not None}
        if len(chosen) > 1:
            raise ValueError("give quadrature_weights or importance_weights, not both")
        if not chosen:
            error = sample.std().item() / math.sqrt(len(sample)) if len(sample) > 1 else math.inf
            return cls(sample.mean().item(), error, len(sample))
        ((name, weights),) = chosen.items()
        if weights.shape != sample.shape:
            raise ValueError(f"{name} must be [{len(sample)}], got {list(weights.shape)}")
        require_probabilities(name, weights)
        weights = weights.detach().cpu().double()
        mean = (weights * sample).sum()
        error = (weights * (sample - mean)).norm().item()
        if quadrature_weights is not None:
            error = 0.0
        elif int((weights > 0).sum()) == 1:
            error = math.inf
        return cls(mean.item(), error, len(sample))

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
        power = max(exponent, int(f"{self.mean:.1e}".split("e")[1]) if self.mean else exponent)
        if power <= -6:  # a row of zeros would hide what there is
            scaled = Estimate(self.mean / 10**power, self.standard_error / 10**power, self.n)
            return f"{scaled}e{power:03d}"
        digits = max(0, 1 - exponent)
        return f"{self.mean:.{digits}f}({self.standard_error * 10**digits:.0f})"


def require_probabilities(name: str, weights: Float[Tensor, " n"]) -> None:
    """Refuse weights that are no probabilities.

    Raises:
        ValueError: they are negative, not finite, or do not sum to 1.
    """
    weights = weights.detach().double()
    total, least = read(weights.sum(), weights.min()) if len(weights) else (0.0, math.nan)
    if not least >= 0 or not abs(total - 1) <= 1e-5:  # float32 weights miss 1 by round-off
        raise ValueError(
            f"{name} must be non-negative and sum to 1, they sum to {total:g} and the least is "
            f"{least:g}; divide them by their sum"
        )
