"""Stable Diffusion 1.x and 2.x, and models distilled from them: one text encoder.

Source  Rombach et al. 2022, latent diffusion, arXiv 2112.10752. Latent consistency models: Luo et
        al. 2023, arXiv 2310.04378.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_family import Configs, check_network, check_width

_SUPPORTED = (
    "supported are UNets of Stable Diffusion 1.x and 2.x, which read noisy latents, a timestep and "
    "one text embedding"
)


@dataclass(frozen=True)
class StableDiffusionFamily:
    """A UNet that reads the last layer of a CLIP text encoder (2.x: of one that is cut short)."""

    title: str = "Stable Diffusion 1.x or 2.x"
    classes: tuple[str, ...] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    without: Mapping[str, Any] = field(
        default_factory=lambda: {
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        }
    )

    def parts(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Networks, tokenizer and scheduler."""
        return ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def check(self, model: str, configs: Configs) -> None:
        """Refuse networks that need more inputs than noisy latents, a timestep and one text.

        Raises:
            ValueError: naming what, and what is supported.
        """
        check_network(model, configs, _SUPPORTED)
        if (value := configs["unet"].get("addition_embed_type")) is not None:
            raise ValueError(
                f"model {model} has a UNet with addition_embed_type {value!r}; {_SUPPORTED}"
            )
        check_width(model, configs, ["text_encoder"])

    def decoder_precision(self, vae: Mapping[str, Any], precision: torch.dtype) -> torch.dtype:
        """That of the networks: these decoders do not overflow."""
        return precision

    def tokenizers(self, pipe: Any) -> list[Any]:
        """The one."""
        return [pipe.tokenizer]

    @torch.no_grad()
    def encode(self, pipe: Any, prompts: Sequence[str], picture: tuple[int, int]) -> TextCondition:
        """Text embeddings as the pipeline computes them, float32; the size is not told."""
        embedded, _ = pipe.encode_prompt(
            [str(prompt) for prompt in prompts],
            device=pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return TextCondition(embedded.float())

    def unconditional(
        self, pipe: Any, negative_prompt: str | None, picture: tuple[int, int]
    ) -> TextCondition:
        """Of the negative prompt, or of the empty one."""
        return self.encode(pipe, [negative_prompt or ""], picture)
