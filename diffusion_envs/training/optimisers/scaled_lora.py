"""Per-layer scaling of LoRA's factors, then Adam or momentum.

Step         A layer's update is B A, A [rank, in], B [out, rank]. Their gradients become
                 grad_A: (B'B + delta)^-1 grad_A,   grad_B: grad_B (A A' + delta)^-1,
             the gradient of the loss in the metric |B dA|^2 + |dB A|^2 of the update itself: a step
             does not depend on how the update is split into factors. Of a convolution A is
             flattened, and B, of size 1, too.
Assumes      That a change of a layer's weight costs the same in every direction and every layer:
             the metric of path laws with every layer's inputs and sensitivities taken for white.
Cost         No network calls; two rank x rank equations a layer.
Sources      [ZP24] Zhang & Pilanci 2024, Riemannian preconditioned LoRA, arXiv 2402.02347: scaled
             GD and scaled AdamW, which scales before the moments, as here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_envs.environment import Environment
from diffusion_envs.ranges import require_numbers, require_positive
from diffusion_envs.training.optimisers.adamw import TorchStepper
from diffusion_envs.training.optimisers.protocol import Groups, Metric, parameters_of
from diffusion_envs.training.optimisers.running_mean import RunningMean

_MATRIX = 2  # dimensions, at least


@dataclass(frozen=True)
class ScaledLoRA:
    """[ZP24]: gradients of LoRA's factors, each scaled by the other factor.

    Attributes:
        delta: added to B'B and A A'.
        adam: AdamW of the scaled gradients, with ``UpdateSize``'s weight decay; else momentum.
        momentum: without Adam.
    """

    delta: float = 1e-6
    adam: bool = True
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(delta=self.delta)
        RunningMean(self.momentum, "momentum")

    def start(
        self, groups: Groups, *, rate: float, weight_decay: float, environment: Environment
    ) -> "ScaledSteps":
        """Begin.

        Raises:
            ValueError: the parameters are not the factors of LoRA adapters, in pairs.
        """
        pairs = lora_pairs(parameters_of(groups))
        if self.adam:
            made: Any = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
        else:
            made = torch.optim.SGD(groups, lr=rate, momentum=self.momentum)
        return ScaledSteps(made, pairs, self.delta)


class ScaledSteps(TorchStepper):
    """Steps of one of torch's optimisers, of scaled gradients.

    Args:
        optimiser: torch's; gradients are clipped before they are scaled.
        pairs: (A, B) of every layer.
        delta: added to B'B and A A'.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        pairs: list[tuple[nn.Parameter, nn.Parameter]],
        delta: float,
    ) -> None:
        super().__init__(optimiser)
        self.pairs, self.delta = pairs, delta

    def step(self, metric: Metric) -> dict[str, float]:
        """Scale the gradients, and take the optimiser's step."""
        for a, b in self.pairs:
            if a.grad is None or b.grad is None:
                continue
            grads = scaled(a.detach(), b.detach(), a.grad, b.grad, self.delta)
            a.grad, b.grad = grads
        return super().step(metric)


def scaled(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, delta: float
) -> tuple[Tensor, Tensor]:
    """(B'B + delta)^-1 grad_A and grad_B (A A' + delta)^-1, in the factors' shapes ([ZP24] 4).

    Args:
        a: A, [rank, ...].
        b: B, [out, rank, ...].
        grad_a: the loss's gradient in A.
        grad_b: the loss's gradient in B.
        delta: added to both.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    unit = delta * torch.eye(len(a)).to(a)
    one = torch.linalg.solve(flat_b.T @ flat_b + unit, grad_a.flatten(1))
    other = torch.linalg.solve(flat_a @ flat_a.T + unit, grad_b.flatten(1).T).T
    return one.view_as(a), other.reshape(b.shape)


def lora_pairs(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of every layer, which stand one after the other.

    Raises:
        ValueError: they do not.
    """
    pairs = list(zip(parameters[::2], parameters[1::2], strict=False))
    fits = all(
        min(a.ndim, b.ndim) >= _MATRIX and b[0].numel() == len(a) and b.shape[1] == len(a)
        for a, b in pairs
    )
    if not pairs or len(parameters) % 2 or not fits:
        shapes = ", ".join(str(list(p.shape)) for p in parameters[:4])
        raise ValueError(
            "ScaledLoRA scales the factors of LoRA adapters, A [rank, in] and B [out, rank] in "
            f"turn, but the model's parameters are {shapes}, ...: train a LoRA adapter "
            "(lora_rank), or use another optimiser"
        )
    return pairs
