"""Frechet distance between Gaussians fitted to two sets of features, and its bias in sample size.

Between N(m, S) and N(r, R):    |m - r|^2 + tr(S) + tr(R) - 2 tr((R^(1/2) S R^(1/2))^(1/2)).

Estimated from n samples of the first law, it is too large by c / n + O(1 / n^2): the mean has
variance S / n, and the last term is concave in S. ``corrected_distance`` takes c / n off.

Sources     Dowson & Landau 1982, J. Multivariate Analysis 12. Heusel et al. 2017, arXiv 1706.08500.
            Chong & Forsyth 2020, arXiv 1911.07023, for the bias and extrapolation in 1 / n.
            [ES81] Efron & Stein 1981, Annals of Statistics 9, for the jackknife. Chan, Golub &
            LeVeque 1979 for sums of squares that are merged.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import Estimate

GROUPS = 20  # of the jackknife; its standard error is known to 16 %


@dataclass(frozen=True, eq=False)
class Moments:
    """Number of samples, mean and scatter of features, in float64; merged batch by batch."""

    n: int
    mean: Float[Tensor, " width"]
    scatter: Float[Tensor, "width width"]  # sum of (x - mean)(x - mean)'

    def __post_init__(self) -> None:
        if self.n < 1 or self.mean.dtype != torch.float64 or self.scatter.dtype != torch.float64:
            raise ValueError(
                f"moments must be of at least one sample and in float64, got n = {self.n}, "
                f"{self.mean.dtype} and {self.scatter.dtype}"
            )
        if self.scatter.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"scatter must be [{len(self.mean)}, {len(self.mean)}] to fit the mean, got "
                f"{list(self.scatter.shape)}"
            )
        if not bool(torch.isfinite(self.mean).all() & torch.isfinite(self.scatter).all()):
            raise ValueError("moments must be finite; a feature is not: look at the pictures")

    @classmethod
    def of(cls, features: Float[Tensor, "n width"]) -> "Moments":
        """The moments of one batch.

        Raises:
            ValueError: there are no features, or one is not finite.
        """
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features must be [n, width], n > 0, got {list(features.shape)}")
        sample = features.detach().cpu().double()
        mean = sample.mean(0)
        centred = sample - mean
        return cls(len(sample), mean, centred.T @ centred)

    @classmethod
    def of_batches(cls, batches: Iterable[Float[Tensor, "_ width"]]) -> "Moments":
        """The moments of all batches together, of which one at a time is held."""
        total: Moments | None = None
        for batch in batches:
            total = cls.of(batch) if total is None else total.merged(cls.of(batch))
        if total is None:
            raise ValueError("batches must hold at least one batch of features")
        return total

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets of samples."""
        self._require_same_width(other)
        n, shift = self.n + other.n, other.mean - self.mean
        between = torch.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), self.scatter + other.scatter + between)

    def without(self, part: "Moments") -> "Moments":
        """The moments of the samples that are not in ``part``, one of the sets merged."""
        self._require_same_width(part)
        n = self.n - part.n
        if n < 1:
            raise ValueError(f"part must be smaller than the whole of {self.n}, got {part.n}")
        mean = self.mean + (self.mean - part.mean) * (part.n / n)
        shift = mean - part.mean
        between = torch.outer(shift, shift) * (n * part.n / self.n)
        return Moments(n, mean, self.scatter - part.scatter - between)

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """The unbiased estimate of the covariance."""
        if self.n < 2:
            raise ValueError("a covariance needs at least two samples, got one")
        return self.scatter / (self.n - 1)

    @cached_property
    def root(self) -> Float[Tensor, "width width"]:
        """The symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def _require_same_width(self, other: "Moments") -> None:
        if len(self.mean) != len(other.mean):
            raise ValueError(
                f"moments must be of the same features, got {len(self.mean)} and "
                f"{len(other.mean)} of them; compute both with one network"
            )


def frechet_distance(one: Moments, reference: Moments) -> float:
    """The squared Frechet distance between the two fitted Gaussians (module docstring).

    It is the plain, biased estimate. The square root of the reference's covariance is kept.

    Raises:
        ValueError: the moments are of different features, or of one sample.
    """
    one._require_same_width(reference)
    root = reference.root
    inner = root @ one.covariance @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    traces = one.covariance.trace() + reference.covariance.trace()
    return ((one.mean - reference.mean).square().sum() + traces - 2 * cross).item()


def require_enough(n: int, width: int, groups: int = GROUPS) -> None:
    """Refuse so few samples that the expansion in 1 / n means nothing.

    Raises:
        ValueError: n is below twice the width of the features, or below two a group.
    """
    least = max(2 * width, 2 * groups)
    if n < least:
        raise ValueError(
            f"at least {least} samples are needed for features of width {width} (a covariance of "
            f"fewer has not full rank, or nearly so), got {n}; draw more, or take narrower features"
        )


def corrected_distance(
    features: Float[Tensor, "n width"], reference: Moments, *, groups: int = GROUPS
) -> Estimate:
    """The Frechet distance to a reference, free of the bias c / n, with a standard error.

    By the jackknife over groups of samples: with F_n the plain estimate from all and F_(j) that
    without group j, it is g F_n - (g - 1) mean_j F_(j), which is the line through the plain
    estimates at n and at n (1 - 1/g) samples, read at 1 / n = 0. What remains of the bias is
    O(1 / n^2). As it is unbiased, it may be below 0 where the two laws are the same.

    Args:
        features: independent samples; groups are consecutive rows, so their order must be random.
        reference: taken as exact: the bias and the error of its own finite size stay.
        groups: g; the standard error is sqrt((g - 1) / g sum_j (F_(j) - mean)^2) [ES81].

    Raises:
        ValueError: there are too few samples (``require_enough``), or a feature is not finite.
    """
    if groups < 2:
        raise ValueError(f"groups must be at least 2, got {groups}")
    n, width = features.shape
    require_enough(n, width, groups)
    n -= n % groups  # equal groups: at most groups - 1 samples are not used
    parts = [Moments.of(part) for part in features[:n].chunk(groups)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    plain = frechet_distance(whole, reference)
    without = torch.tensor(
        [frechet_distance(whole.without(part), reference) for part in parts], dtype=torch.float64
    )
    mean = without.mean()
    variance = (groups - 1) / groups * (without - mean).square().sum().item()
    return Estimate(groups * plain - (groups - 1) * mean.item(), math.sqrt(variance), n)
