"""One step of an optimiser, refused where it would spoil what is learned."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from ctrl.paths import Paths


def expectation(each: Float[Tensor, " paths"], paths: Paths) -> Float[Tensor, ""]:
    """The mean over paths, by their weights where they have some."""
    return each.mean() if paths.weights is None else paths.weights @ each


def descend(loss: Float[Tensor, ""], *optimisers: Optimizer) -> None:
    """One step down ``loss`` in what the optimisers hold; nothing else gets a gradient.

    Args:
        loss: to descend.
        optimisers: one or several; all step, or none.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; nothing was changed.
    """
    learned = [p for optimiser in optimisers for g in optimiser.param_groups for p in g["params"]]
    slopes = torch.autograd.grad(loss, learned, materialize_grads=True)
    finite = [torch.isfinite(slope).all() for slope in slopes]
    if not bool(torch.stack([torch.isfinite(loss.detach()), *finite]).all()):
        raise FloatingPointError(
            f"the loss ({float(loss.detach()):g}) or its gradient is not finite; no step was "
            "taken. Lower the learning rate, refine the grid or bound the rewards"
        )
    for parameter, slope in zip(learned, slopes, strict=True):
        parameter.grad = slope
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
