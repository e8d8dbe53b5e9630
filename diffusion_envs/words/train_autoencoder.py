"""Train the words model's autoencoder: 32 x 32 signs to 8 x 8 x 8 latents and back."""

import logging
import math
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Generator, Tensor, nn

from ctrl.noise import stream
from diffusion_envs.runs.fit import Recipe, fit, initial_weights
from diffusion_envs.tiny.train_autoencoder import (
    autoencoder_of,
    decoded,
    encoded,
    psnr,
    reconstruct,
)
from diffusion_envs.words.signs import SIDE, draw_words, signs

_log = logging.getLogger(__name__)

RECIPE = Recipe(updates=2000, learning_rate=3e-3, batch=32, average=0.995, precision=torch.float32)
KL_WEIGHT = 2e-7  # per nat a picture


def build() -> AutoencoderKL:
    """The untrained autoencoder: 0.4 M parameters."""
    levels = 3
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]  # annotated as a tuple of one
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]  # annotated as a tuple of one
        block_out_channels=(16, 32, 48),  # pyright: ignore[reportArgumentType]  # annotated as a tuple of one
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def train(output: Path, *, recipe: Recipe = RECIPE, seed: int = 0) -> None:
    """Train the autoencoder and write it to ``output/model/vae`` in diffusers' layout."""
    random = stream(seed, "signs", "held out")
    held_out = (255 * signs(draw_words(500, random), random)).round().byte()

    def loss(modules: nn.ModuleDict, generator: Generator) -> dict[str, Tensor]:
        device = next(modules.parameters()).device
        pictures = signs(draw_words(recipe.batch, generator), generator) * 2 - 1
        pictures = pictures.to(device)
        posterior = encoded(autoencoder_of(modules), pictures)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        rebuilt = decoded(autoencoder_of(modules), posterior.mean + posterior.std * noise).float()
        pixel = (rebuilt - pictures).square().mean() / 4  # in units of [0, 1]
        nats = posterior.kl().float().mean()
        decibel = -10 / math.log(10) * pixel.detach().log()
        return {"loss": pixel + KL_WEIGHT * nats, "dB": decibel, "nats": nats}

    def report(step: int, modules: nn.ModuleDict) -> None:
        rebuilt = reconstruct(autoencoder_of(modules), held_out)
        _log.info(f"autoencoder {step}: PSNR of fresh signs {psnr(held_out, rebuilt):.2f} dB")

    with initial_weights(seed):
        modules = nn.ModuleDict({"vae": build()})
    folder = output / "training" / "autoencoder"
    fitted = fit(
        modules, loss, recipe, folder=folder, seed=seed, name="autoencoder", on_checkpoint=report
    )
    vae = autoencoder_of(fitted).cpu().eval()
    with torch.no_grad():
        latents = torch.cat([encoded(vae, p.float() / 127.5 - 1).mean for p in held_out.split(250)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    vae.half().save_pretrained(output / "model" / "vae")
