"""Loading a Stable Diffusion pipeline; its text embeddings and its decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.models.folders import (
    TINY,
    local_folder,
    require_parts,
    tiny_folder,
    variant_of,
)
from diffusion_envs.models.text_condition import TextCondition

__all__ = ["TINY", "decode", "embed_prompts", "load_pipeline", "tiny_folder"]

SUPPORTED = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WITHOUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


def load_pipeline(
    model: str | Path,
    *,
    precision: torch.dtype = torch.float32,
    variant: str | None = None,
    network: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a StableDiffusionPipeline, everything frozen and in evaluation mode.

    Args:
        model: "tiny", "words", a folder in diffusers' layout, or a hub id. Where there
            are files of half precision only (``variant="fp16"``), they are loaded.
        network: dtype of the UNet's weights; ``precision`` if left out.
        precision: of the weights. float16 is refused on a CPU, where it is 7 to 230 times slower.
        variant: of the weights, such as "fp16"; the plain ones if left out, or those that every
            part has.
        device: where the networks go.

    Raises:
        FileNotFoundError: ``model`` is a folder that lacks parts, or neither a folder nor to be had
            from the hub; the message says what is missing.
        ValueError: ``model`` is empty or of a class that is not supported, its network needs more
            inputs than noisy latents, a timestep and one text embedding, or float16 is asked for on
            a CPU.
    """
    if precision == torch.float16 and torch.device(device).type == "cpu":
        raise ValueError("precision float16 is not for CPUs; use float32 or bfloat16")
    folder = local_folder(model, StableDiffusionPipeline, SUPPORTED, _WITHOUT)
    require_parts(folder, _PARTS)
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        folder,
        dtype={"unet": network or precision, "default": precision},
        variant=variant_of(folder, _PARTS[:3], variant),
        local_files_only=True,
        requires_safety_checker=False,
        **_WITHOUT,
    )
    _check_inputs(model, pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().to(device)
    return pipe


def _check_inputs(model: str | Path, pipe: Any) -> None:
    """Refuse networks that need inputs that a plain text-to-image pipeline does not have."""
    config, latents = pipe.unet.config, pipe.vae.config.latent_channels
    supported = (
        "supported are UNets of Stable Diffusion 1.x and 2.x, which read noisy latents, a timestep "
        "and one text embedding"
    )
    if config.in_channels != latents or config.out_channels != latents:
        kind = " (9 are those of inpainting models)" if config.in_channels == 9 else ""
        raise ValueError(
            f"model {model} has a UNet of {config.in_channels} input channels{kind} and "
            f"{config.out_channels} output channels for latents of {latents}; {supported}"
        )
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if (value := config.get(name)) is not None:
            raise ValueError(f"model {model} has a UNet with {name} {value!r}; {supported}")
    width = pipe.text_encoder.config.hidden_size
    if config.cross_attention_dim != width:
        raise ValueError(
            f"model {model} has a UNet that reads text embeddings of width "
            f"{config.cross_attention_dim}, but its text encoder makes those of {width}"
        )


def require_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that are longer than the text encoder reads.

    Tokens of several vectors (textual inversion) count as often as they have vectors.

    Raises:
        ValueError: a prompt is too long; it is named.
    """
    limit = pipe.tokenizer.model_max_length
    for prompt in prompts:
        whole = pipe.maybe_convert_prompt(str(prompt), pipe.tokenizer)
        if (length := len(pipe.tokenizer(whole).input_ids)) > limit:
            raise ValueError(f"prompt {prompt!r} has {length} tokens; the model reads {limit}")


@torch.no_grad()
def embed_prompts(pipe: Any, prompts: Sequence[str]) -> TextCondition:
    """Text embeddings of the prompts, as the pipeline computes them, float32.

    Raises:
        ValueError: a prompt is longer than the text encoder reads.
    """
    require_prompts(pipe, prompts)
    embedded, _ = pipe.encode_prompt(
        [str(prompt) for prompt in prompts],
        device=pipe.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return TextCondition(embedded.float())


def decode(
    vae: Any, latents: Float[Tensor, "n c h w"], batch: int
) -> Float[Tensor, "n 3 height width"]:
    """Pictures in [0, 1], float32, from scaled latents; ``batch`` at a time; differentiable."""
    parts = [
        vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        for part in latents.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
