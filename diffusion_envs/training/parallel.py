"""What several processes must agree on: gradients and batch statistics."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def start() -> Accelerator:
    """The processes of this run: one, or those that ``accelerate`` or ``torchrun`` started."""
    return Accelerator(cpu=not torch.cuda.is_available())


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its mean over the processes."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def main_says(number: int, accelerator: Accelerator) -> int:
    """The main process's number, on all of them."""
    return int(gather(torch.tensor([number], device=accelerator.device), accelerator)[0])


def gather(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Rows of all processes, in the order of their index."""
    return accelerator.gather(value) if accelerator.num_processes > 1 else value
