"""Train the two shipped CIFAR-10 classifiers, on disjoint halves of the training set."""

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional

from diffusion_envs.cifar10.data import LabelledImages, load
from diffusion_envs.rewards.classifier import CifarClassifier
from diffusion_envs.runs.fit import Recipe, fit, initial_weights

RECIPE = Recipe(updates=6000, learning_rate=3e-3, batch=128, weight_decay=0.05, average=0.998)
BLURRED = 0.25  # share of training pictures shown at half resolution: generated pictures are soft


def half(data: LabelledImages, which: Literal["reward", "judge"]) -> LabelledImages:
    """Every second row: even rows train the reward, odd rows the judge. They share no picture."""
    first = {"reward": 0, "judge": 1}[which]
    return LabelledImages(data.images[first::2], data.labels[first::2])


def augment(images: Float[Tensor, "n 3 32 32"], generator: Generator) -> Float[Tensor, "n 3 32 32"]:
    """Random mirror, shift by up to 3 pixels, and blur."""
    n = len(images)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    padded = functional.pad(images, (3, 3, 3, 3), mode="reflect")
    shift = torch.randint(0, 7, (2, n, 1), generator=generator) + torch.arange(32)
    rows, columns = shift[0][:, None, :, None], shift[1][:, None, None, :]
    samples, channels = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
    images = padded[samples, channels, rows, columns]
    soft = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    blurred = torch.rand(n, 1, 1, 1, generator=generator) < BLURRED
    return torch.where(blurred, soft, images)


@torch.no_grad()
def accuracy(
    network: CifarClassifier, images: Tensor, labels: Int64[Tensor, " n"], batch: int = 500
) -> float:
    """Share of pictures (bytes, or values in [0, 1]) that the network assigns to their class."""
    right = 0
    for k in range(0, len(images), batch):
        part = images[k : k + batch]
        pixels = part.float() / 255 if part.dtype == torch.uint8 else part
        right += int((network(pixels).argmax(-1) == labels[k : k + batch]).sum())
    return right / len(images)


def train(
    data: Path,
    output: Path,
    which: Literal["reward", "judge"],
    *,
    recipe: Recipe = RECIPE,
    seed: int = 0,
) -> float:
    """Train one classifier and write ``output/classifier_<which>.safetensors`` in float16.

    Returns:
        Its accuracy on CIFAR-10's test set.
    """
    images, labels = half(load(data, "train"), which)

    def loss(modules: nn.ModuleDict, generator: Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        pictures = augment(images[rows].float() / 255, generator)
        device = next(modules.parameters()).device
        pictures = pictures.to(device, memory_format=torch.channels_last)
        logits = modules["classifier"](pictures).float()
        value = functional.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.1)
        return {"loss": value}

    with initial_weights(seed):
        modules = nn.ModuleDict({"classifier": CifarClassifier()})
    # torch's overloads leave out the memory format alone
    modules.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # as said
    fitted = fit(
        modules,
        loss,
        recipe,
        folder=output / "training" / f"classifier_{which}",
        seed=seed,
        name=f"classifier_{which}",
    )
    network = fitted["classifier"].eval().cpu()
    assert isinstance(network, CifarClassifier)
    weights = {k: v.contiguous() for k, v in network.state_dict().items()}
    small = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(small, output / f"classifier_{which}.safetensors")
    return accuracy(network, *load(data, "test"))
