"""Train the words model's UNet and text encoder together, on the autoencoder's latents."""

import logging
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from transformers import CLIPTokenizer

from ctrl.noise import stream
from diffusion_envs.runs.contact_sheet import grid
from diffusion_envs.runs.fit import Recipe, fit, initial_weights
from diffusion_envs.tiny.captions import write_bpe
from diffusion_envs.tiny.train_denoiser import (
    UNCAPTIONED,
    build_text_encoder,
    encode,
    noise_prediction,
    pipeline,
    sample,
    scheduler,
    write,
)
from diffusion_envs.words.signs import LONGEST, caption, draw_words, signs

_log = logging.getLogger(__name__)

RECIPE = Recipe(
    updates=9500,
    learning_rate=1.5e-3,
    batch=32,
    average=0.998,
    seconds_between_checkpoints=120.0,
    precision=torch.float32,
)
PICTURES = 24_000  # drawn and encoded once
WIDTH = 96  # of text embeddings
VELOCITY_CAP = 20.0  # of the weight of an error of the noise
LENGTH = 16  # tokens a prompt, begin and end included


def build_unet() -> UNet2DConditionModel:
    """The untrained UNet: 1.8 M parameters, cross-attention at 8 x 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that spells a word on a sign letter by letter, one token each."""
    write_bpe(folder, {"a", "sign", "that", "says"}, LENGTH)


def weights() -> Tensor:
    """Weights of squared errors of the noise: those of velocities, up to a cap.

    What a caption says matters where noise hides the picture. There errors of the noise are small,
    and with weights of at most 1 the network learns first what captions do not say.
    """
    return (1 / scheduler().alphas_cumprod).clamp(max=VELOCITY_CAP)


def train(output: Path, *, recipe: Recipe = RECIPE, seed: int = 0) -> None:
    """Train UNet and text encoder and write the whole pipeline to ``output/model``.

    Samples of words that are not trained on are written at every checkpoint, to
    ``output/samples``.
    """
    folder = output / "model"
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(
        folder / "vae", dtype=torch.float32, use_safetensors=True
    ).eval()
    latents, words = _encoded_signs(vae, output / "training" / "latents.safetensors", seed)

    lengths = torch.tensor([len(word) for word in words])
    by_length = [(lengths == length).nonzero().flatten() for length in range(1, LONGEST + 1)]

    def draw(n: int, generator: Generator) -> tuple[Tensor, list[str]]:
        chosen, places = torch.randint(2**30, (2, n), generator=generator).tolist()
        among = [by_length[(1, 2, 3, 3)[each % 4] - 1] for each in chosen]  # lengths
        rows = torch.stack([a[k % len(a)] for a, k in zip(among, places, strict=True)])
        dropped = torch.rand(n, generator=generator) < UNCAPTIONED
        captions = [
            "" if skip else caption(words[row])
            for row, skip in zip(rows.tolist(), dropped.tolist(), strict=True)
        ]
        return latents[rows].float(), captions

    def report(step: int, modules: nn.ModuleDict) -> None:
        prompts = [caption(word) for word in ("FOX", "PIG", "RED", "SAW", "WHY") for _ in range(6)]
        pipe = pipeline(modules, vae, tokenizer)
        images = sample(pipe, prompts, steps=10, guidance=3.0, eta=1.0, seed=seed)
        (output / "samples").mkdir(exist_ok=True)
        grid(images, prompts).save(output / "samples" / f"step-{step:06d}.png")

    with initial_weights(seed):
        initial = nn.ModuleDict(
            {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer, WIDTH)}
        )
    fitted = fit(
        initial,
        noise_prediction(draw, tokenizer, recipe.batch, weights()),
        recipe,
        folder=output / "training" / "denoiser",
        seed=seed,
        name="denoiser",
        on_checkpoint=report,
    )
    write(pipeline(fitted.cpu(), vae, tokenizer), folder)


def _encoded_signs(vae: AutoencoderKL, cache: Path, seed: int) -> tuple[Tensor, list[str]]:
    """Scaled latents of random signs, and their words; from the cache if it is there."""
    random = stream(seed, "signs", "train")
    words = draw_words(PICTURES, random)
    if cache.is_file():
        return load_file(cache)["latents"], words
    parts = []
    for k in range(0, PICTURES, 250):
        pictures = (255 * signs(words[k : k + 250], random)).round().byte()
        parts.append(encode(vae, pictures).half())
    latents = torch.cat(parts)
    save_file({"latents": latents.contiguous()}, cache)
    return latents, words
