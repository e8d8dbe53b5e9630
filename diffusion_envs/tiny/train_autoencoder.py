"""Train the tiny model's autoencoder: 32 x 32 pictures to 8 x 8 x 4 latents and back."""

import logging
import math
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Generator, Tensor, nn
from torch.nn import functional

from diffusion_envs.cifar10.data import load
from diffusion_envs.rewards.classifier import CifarClassifier, load_classifier
from diffusion_envs.runs.fit import Recipe, fit, initial_weights
from diffusion_envs.tiny.train_classifier import accuracy

_log = logging.getLogger(__name__)

RECIPE = Recipe(updates=1800, learning_rate=1.5e-3, batch=64, average=0.998)
FEATURE_WEIGHT = 0.005  # per unit of feature distance, beside the mean squared error of pixels
KL_WEIGHT = 5e-7  # per nat a picture: the evidence bound at a noise of 31 dB


def build() -> AutoencoderKL:
    """The untrained autoencoder: 1.66 M parameters."""
    levels = 3
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]  # annotated as a tuple of one
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]  # annotated as a tuple of one
        block_out_channels=(24, 64, 96),  # pyright: ignore[reportArgumentType]  # annotated as a tuple of one
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def feature_distance(network: CifarClassifier, left: Tensor, right: Tensor) -> Tensor:
    """Mean squared distance of unit-normalised feature maps, summed over levels (as LPIPS does)."""
    pairs = zip(network.features(left), network.features(right), strict=True)
    distances = (
        (functional.normalize(a, dim=1) - functional.normalize(b, dim=1)).square().sum(1).mean()
        for a, b in pairs
    )
    return sum(distances, start=left.new_zeros(()))


def encoded(autoencoder: AutoencoderKL, pixels: Tensor) -> DiagonalGaussianDistribution:
    """Law of the latents of pictures in [-1, 1]."""
    output = autoencoder.encode(pixels)
    assert isinstance(output, AutoencoderKLOutput)
    return output.latent_dist


def decoded(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures in [-1, 1] of latents."""
    # annotated as of a type that no tensor has any more
    output = autoencoder.decode(latents)  # pyright: ignore[reportArgumentType]  # as said
    assert isinstance(output, DecoderOutput)
    return output.sample


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor, batch: int = 250) -> Tensor:
    """Pictures (bytes) through the latents' mean and back, in [0, 1]."""
    parts = [
        decoded(autoencoder, encoded(autoencoder, part.float() / 127.5 - 1).mean)
        for part in images.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, in dB."""
    error = (images.float() / 255 - reconstructions).square().flatten(1).mean(1)
    return float(-10 * error.log10().mean())


def autoencoder_of(modules: nn.ModuleDict) -> AutoencoderKL:
    """The autoencoder among the modules that are trained."""
    autoencoder = modules["vae"]
    assert isinstance(autoencoder, AutoencoderKL)
    return autoencoder


def train(data: Path, output: Path, *, recipe: Recipe = RECIPE, seed: int = 0) -> None:
    """Train the autoencoder and write it to ``output/model/vae`` in diffusers' layout.

    The reward classifier supplies the features; the judge only reports, so its verdict on
    reconstructions is not trained for.
    """
    images, _ = load(data, "train")
    held_out, labels = load(data, "test", limit=1000)
    perceptual = load_classifier(output / "classifier_reward.safetensors")
    judge = load_classifier(output / "classifier_judge.safetensors")

    def loss(modules: nn.ModuleDict, generator: Generator) -> dict[str, Tensor]:
        features = modules["features"]
        assert isinstance(features, CifarClassifier)
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        pictures = images[rows].float() / 127.5 - 1
        mirrored = torch.rand(recipe.batch, 1, 1, 1, generator=generator) < 0.5
        pictures = torch.where(mirrored, pictures.flip(-1), pictures)
        device = next(modules.parameters()).device
        pictures = pictures.to(device)
        posterior = encoded(autoencoder_of(modules), pictures)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents = posterior.mean + posterior.std * noise
        rebuilt = decoded(autoencoder_of(modules), latents).float()
        pixel = (rebuilt - pictures).square().mean() / 4  # in units of [0, 1]
        feature = feature_distance(features, rebuilt / 2 + 0.5, pictures / 2 + 0.5)
        nats = posterior.kl().float().mean()
        total = pixel + FEATURE_WEIGHT * feature + KL_WEIGHT * nats
        decibel = -10 / math.log(10) * pixel.detach().log()
        return {"loss": total, "dB": decibel, "feature": feature, "nats": nats}

    def report(step: int, modules: nn.ModuleDict) -> None:
        rebuilt = reconstruct(autoencoder_of(modules), held_out)
        _log.info(
            f"autoencoder {step}: test PSNR {psnr(held_out, rebuilt):.2f} dB, judge's accuracy on "
            f"reconstructions {accuracy(judge, rebuilt, labels):.3f}"
        )

    with initial_weights(seed):
        vae = build()
    modules = nn.ModuleDict({"vae": vae, "features": perceptual})
    folder = output / "training" / "autoencoder"
    fitted = fit(
        modules, loss, recipe, folder=folder, seed=seed, name="autoencoder", on_checkpoint=report
    )
    vae = autoencoder_of(fitted).cpu().eval()
    with torch.no_grad():
        parts = [encoded(vae, part.float() / 127.5 - 1).mean for part in images[:5000].split(250)]
    vae.register_to_config(scaling_factor=1 / float(torch.cat(parts).std()))
    vae.half().save_pretrained(output / "model" / "vae")
