"""Improved precision and recall of a set of samples, in a space of features.

Source      Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
            Models", arXiv 1904.06991, equations 1 and 2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEIGHBOURS, CHUNK = 3, 1000
_TIE = 1e-12  # of the squared lengths: round-off of a squared distance


class PrecisionRecall(NamedTuple):
    """Shares between 0 and 1."""

    precision: float  # of generated samples in the support of the real ones
    recall: float  # of real samples in the support of the generated ones


def precision_recall(
    generated: Float[Tensor, "n width"],
    real: Float[Tensor, "m _"],
    neighbours: int = NEIGHBOURS,
) -> PrecisionRecall:
    """How many samples lie in the other set's support: within some sample's k-th neighbour.

    Both shares depend on n and m, which should be equal, and are to be compared at equal n and m
    only. Distances are computed by chunks in float64: n m numbers are never held.

    Args:
        generated: features of generated samples.
        real: features of real samples, by the same network.
        neighbours: k; a sample is not its own neighbour.

    Raises:
        ValueError: the widths differ, a feature is not finite, or a set has at most k samples.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    sets = {"generated": generated, "real": real}
    for name, features in sets.items():
        if features.ndim != 2 or len(features) <= neighbours:
            raise ValueError(
                f"{name} must be [n, width] with n above {neighbours} neighbours, got "
                f"{list(features.shape)}; draw more samples"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name} must be finite, but a feature is not; look at the pictures")
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"generated and real must have features of one network, got widths "
            f"{generated.shape[1]} and {real.shape[1]}"
        )
    centre = real.detach().double().mean(0)  # round-off is relative to the distance from the origin
    one, other = generated.detach().double() - centre, real.detach().double() - centre
    return PrecisionRecall(
        precision=_supported(one, other, neighbours).double().mean().item(),
        recall=_supported(other, one, neighbours).double().mean().item(),
    )


def _supported(
    points: Float[Tensor, "n width"], support: Float[Tensor, "m width"], neighbours: int
) -> Bool[Tensor, " n"]:
    """Which points lie within the k-th neighbour of some point of the support."""
    squares = torch.cat(  # the least distance of a point is the one to itself
        [
            _squared_distances(part, support).kthvalue(neighbours + 1, dim=1).values
            for part in support.split(CHUNK)
        ]
    )
    lengths = support.square().sum(1)
    inside = []
    for part in points.split(CHUNK):
        tie = _TIE * (part.square().sum(1)[:, None] + lengths)
        inside.append((_squared_distances(part, support) <= squares + tie).any(1))
    return torch.cat(inside)


def _squared_distances(
    one: Float[Tensor, "n width"], other: Float[Tensor, "m width"]
) -> Float[Tensor, "n m"]:
    lengths = one.square().sum(1)[:, None] + other.square().sum(1)
    return lengths - 2 * one @ other.T
