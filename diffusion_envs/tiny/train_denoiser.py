"""Train the tiny model's UNet and text encoder together, on the autoencoder's latents."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ctrl.noise import stream
from diffusion_envs.cifar10.data import CLASSES, load
from diffusion_envs.rewards.classifier import load_classifier
from diffusion_envs.runs.contact_sheet import grid
from diffusion_envs.runs.fit import Loss, Recipe, fit, initial_weights
from diffusion_envs.tiny.captions import caption, with_article, write_tokenizer
from diffusion_envs.tiny.train_autoencoder import encoded

_log = logging.getLogger(__name__)

RECIPE = Recipe(updates=3600, learning_rate=1e-3, batch=64, average=0.999)
UNCAPTIONED = 0.12  # share of pictures trained without a caption, for classifier-free guidance
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023, arXiv 2303.09556)

Draw = Callable[[int, Generator], tuple[Tensor, list[str]]]
"""(n, random stream) -> scaled latents [n, ...] and a caption of each, "" for none."""


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's own noise levels and sampler settings."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_unet() -> UNet2DConditionModel:
    """The untrained UNet: 3.5 M parameters, cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 112),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 128) -> CLIPTextModel:
    """The untrained text encoder: two layers."""
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(start, int)
    assert isinstance(end, int)
    assert isinstance(padding, int)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=padding,
        )
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 250) -> Tensor:
    """Scaled latents of pictures (bytes), float32."""
    parts = [encoded(vae, part.float() / 127.5 - 1).mean for part in images.split(batch)]
    return torch.cat(parts) * vae.config["scaling_factor"]


def min_snr_weights() -> Tensor:
    """Weights of squared errors of the noise at every timestep, min-SNR."""
    alpha_bar = scheduler().alphas_cumprod
    return (SNR_CAP * (1 - alpha_bar) / alpha_bar).clamp(max=1)


def noise_prediction(
    draw: Draw, tokenizer: CLIPTokenizer, batch: int, weights: Float[Tensor, " timesteps"]
) -> Loss:
    """Weighted squared error of the noise that "unet" and "text_encoder" predict.

    Args:
        draw: draws scaled latents and their captions.
        tokenizer: of the captions.
        batch: latents an update.
        weights: of the error at each timestep.
    """
    alpha_bar = scheduler().alphas_cumprod

    def loss(modules: nn.ModuleDict, generator: Generator) -> dict[str, Tensor]:
        device = next(modules.parameters()).device
        clean, captions = draw(batch, generator)
        timesteps = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        level = alpha_bar[timesteps].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        unique = sorted(set(captions))
        tokens = tokenizer(
            unique,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        context = modules["text_encoder"](tokens.to(device))[0]
        context = context[[unique.index(text) for text in captions]]
        predicted = modules["unet"](noisy.to(device), timesteps.to(device), context).sample
        errors = (predicted.float() - noise.to(device)).square().flatten(1).mean(1)
        weighted = (errors * weights[timesteps].to(device)).mean()
        return {"loss": weighted, "mse": errors.detach().mean()}

    return loss


def pipeline(
    modules: nn.ModuleDict, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The whole model, around the "unet" and "text_encoder" that are trained."""
    parts: dict[str, Any] = {  # annotated as if none could be left out
        "vae": vae,
        "text_encoder": modules["text_encoder"].eval(),
        "tokenizer": tokenizer,
        "unet": modules["unet"].eval(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**parts)


def write(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in float16, in diffusers' layout; every part of it loads as float32."""
    pipe.to(torch.float16).save_pretrained(folder)
    # transformers would load a text encoder in the type it was saved in, diffusers its networks in
    # float32, and the parts would not fit together
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def train(data: Path, output: Path, *, recipe: Recipe = RECIPE, seed: int = 0) -> None:
    """Train UNet and text encoder and write the whole pipeline to ``output/model``.

    Samples and the judge's verdict on them are written at every checkpoint, to ``output/samples``.
    """
    folder = output / "model"
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(
        folder / "vae", dtype=torch.float32, use_safetensors=True
    ).eval()
    cache = output / "training" / "latents.safetensors"
    labels = load(data, "train").labels
    if cache.is_file():
        latents = load_file(cache)["latents"]
    else:
        images = load(data, "train").images
        latents = torch.stack([encode(vae, images), encode(vae, images.flip(-1))])
        save_file({"latents": latents.contiguous()}, cache)

    def draw(n: int, generator: Generator) -> tuple[Tensor, list[str]]:
        rows = torch.randint(len(labels), (n,), generator=generator)
        mirrored = torch.randint(2, (n,), generator=generator)
        dropped = torch.rand(n, generator=generator) < UNCAPTIONED
        captions = [
            "" if skip else caption(label, generator)
            for label, skip in zip(labels[rows].tolist(), dropped.tolist(), strict=True)
        ]
        return latents[mirrored, rows].float(), captions

    judge = load_classifier(output / "classifier_judge.safetensors")

    def report(step: int, modules: nn.ModuleDict) -> None:
        if next(modules.parameters()).device.type == "cpu":
            pipe = pipeline(modules, vae, tokenizer)
        else:
            copies = nn.ModuleDict({k: _copy_to_cpu(m) for k, m in modules.items()})
            pipe = pipeline(copies, vae, tokenizer)
        prompts = [with_article(f"a photo of a {name}") for name in CLASSES for _ in range(6)]
        images = sample(pipe, prompts, steps=25, guidance=4.0, eta=1.0, seed=seed)
        wanted = torch.arange(10).repeat_interleave(6)
        share = (judge(images).argmax(-1) == wanted).float().mean()
        _log.info(f"denoiser {step}: judge agrees with the prompt on {share:.2f} of 60")
        (output / "samples").mkdir(exist_ok=True)
        grid(images, prompts).save(output / "samples" / f"step-{step:06d}.png")

    with initial_weights(seed):
        initial = nn.ModuleDict(
            {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
        )
    fitted = fit(
        initial,
        noise_prediction(draw, tokenizer, recipe.batch, min_snr_weights()),
        recipe,
        folder=output / "training" / "denoiser",
        seed=seed,
        name="denoiser",
        on_checkpoint=report,
    )
    write(pipeline(fitted.cpu(), vae, tokenizer), folder)


def _copy_to_cpu(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module).cpu()


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    *,
    steps: int,
    guidance: float,
    eta: float,
    seed: int,
) -> Tensor:
    """Pictures ``[n, 3, 32, 32]`` in [0, 1] by plain diffusers; one stream a picture."""
    pipe.set_progress_bar_config(disable=True)
    call: Any = pipe  # its pictures are annotated as if they were never tensors
    generators = [stream(seed, "sample", k) for k in range(len(prompts))]
    parts = [
        call(
            prompts[k : k + 50],
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            generator=generators[k : k + 50],
            output_type="pt",
        ).images
        for k in range(0, len(prompts), 50)
    ]
    return torch.cat(parts).float()
