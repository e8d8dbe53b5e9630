"""What the rounding of rewards could tell apart, so that no method learns from it.

Equal pictures of a batch may get rewards that differ in their last digits; in standard deviations
of themselves such differences are as large as any. A difference of ``SPACINGS`` spacings of floats
at the largest reward, 1.5e-5 of it in float32, counts as rounding: networks in float32 err by ten
or so. Where the reward is a small difference of large numbers, its own size does not tell.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SPACINGS = 128  # of the largest number, that rounding may make; one is then below 1 % of a std


def rounding(
    rewards: Float[Tensor, "*batch n"],
) -> Float[Tensor, "*batch 1"]:
    """The difference that rounding may make among rewards that are compared."""
    return SPACINGS * torch.finfo(rewards.dtype).eps * rewards.abs().amax(-1, keepdim=True)


def all_alike(rewards: Float[Tensor, "*batch n"]) -> Bool[Tensor, " *batch"]:
    """Whether rounding alone may tell these rewards apart: there is nothing to compare."""
    least, most = rewards.aminmax(dim=-1)
    return most - least <= rounding(rewards)[..., 0]


def floored_std(rewards: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 1"]:
    """Population standard deviation, at least what rounding may make."""
    return torch.maximum(rewards.std(-1, correction=0, keepdim=True), rounding(rewards))


def standardised(
    rewards: Float[Tensor, "*batch n"], std_offset: float
) -> Float[Tensor, "*batch n"]:
    """(r - mean) / (std + std_offset), by ``floored_std``; 0 where all are equal."""
    scaled = (rewards - rewards.mean(-1, keepdim=True)) / (floored_std(rewards) + std_offset)
    # the mean of equal numbers is another number, by rounding
    return scaled.where((rewards != rewards[..., :1]).any(-1, keepdim=True), 0.0)


def ranks(rewards: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """How many others a reward exceeds, and half of those that it ties with within rounding."""
    above = rewards[..., :, None] - rewards[..., None, :]
    unlike = above.abs() > rounding(rewards)[..., None]
    # a reward ties with itself: half too much for all alike
    return torch.where(unlike, (above > 0).to(rewards), 0.5).sum(-1) - 0.5
