"""Distances between pictures, and their means over pairs with a jackknife standard error.

Source      [ES81] Efron & Stein 1981, "The Jackknife Estimate of Variance", Annals of Statistics 9.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import Estimate


def pixel_distances(
    one: Float[Tensor, " n *picture"], other: Float[Tensor, " m *picture"]
) -> Float[Tensor, "n m"]:
    """Root mean square difference of every picture of one with every one of the other."""
    flat, to = one.flatten(1).double(), other.flatten(1).double()
    return _euclidean(flat, to) / math.sqrt(flat.shape[1])


def cosine_distances(
    one: Float[Tensor, "n width"], other: Float[Tensor, "m width"]
) -> Float[Tensor, "n m"]:
    """1 - cosine of every two embeddings."""
    unit, to = (torch.nn.functional.normalize(v.double(), dim=1) for v in (one, other))
    return 0.5 * _euclidean(unit, to).square()  # |a - b|^2 / 2 = 1 - a.b


def _euclidean(one: Tensor, other: Tensor) -> Tensor:
    direct = "donot_use_mm_for_euclid_dist"  # what is equal is at distance 0 exactly
    return torch.cdist(one, other, compute_mode=direct)


def mean_over_pairs(
    kernel: Callable[[list[int]], Float[Tensor, "k k"]], prompts: Sequence[str]
) -> Estimate | None:
    """Mean over prompts of the mean of a symmetric kernel over pairs, with a jackknife error.

    The jackknife over samples within prompts is never too small in expectation for U-statistics, as
    n Var(U_n) falls with n ([ES81]). On three unequal points it is 27 % too large with 4 samples of
    a prompt, 10 % with 8.

    Args:
        kernel: of all pairs of the samples whose indices it is called with; its diagonal is not
            used.
        prompts: one for each sample.

    Returns:
        None if no prompt has two samples.
    """
    means, variances, used = [], [], 0
    for prompt in dict.fromkeys(prompts):
        members = [i for i, name in enumerate(prompts) if name == prompt]
        n = len(members)
        if n < 2:
            continue
        used += n
        table = kernel(members).double()
        rows = table.sum(1) - table.diagonal()  # what each sample's pairs add up to
        total = rows.sum() / 2
        means.append(total.item() / (n * (n - 1) / 2))
        if n == 2:
            variances.append(math.inf)
            continue
        without = (total - rows) / ((n - 1) * (n - 2) / 2)  # the mean with one sample left out
        variances.append(((n - 1) / n * (without - without.mean()).square().sum()).item())
    if not means:
        return None
    error = math.sqrt(sum(variances)) / len(means)
    return Estimate(sum(means) / len(means), error, used)


def standard_deviation(values: Float[Tensor, " n"]) -> Estimate:
    """The standard deviation of independent samples, and its standard error.

    The error is that of the variance, whatever the law of the samples, over twice the standard
    deviation (delta method); infinite for one sample, whose standard deviation is put to 0.
    """
    sample = values.detach().cpu().double()
    n = len(sample)
    if n < 2:
        return Estimate(0.0, math.inf, n)
    std = sample.std().item()
    error = (
        (sample - sample.mean()).square().std().item() / math.sqrt(n) / (2 * std) if std else 0.0
    )
    return Estimate(std, error, n)
