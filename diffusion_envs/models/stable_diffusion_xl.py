"""Stable Diffusion XL: two text encoders, an embedding of the whole prompt, and sizes.

Text         The penultimate layers of both encoders, side by side: [77, 768 + 1280].
Pooled       The second encoder's projection of its last token; the UNet adds it to the timestep's.
Sizes        Original size, corner of the crop and target size of a picture, each two numbers: the
             pipeline's defaults are the size that is made, no crop, and that size again.
Guidance     Without a negative prompt, embeddings of zeros (``force_zeros_for_empty_prompt``, which
             the published model has); with an empty one, the encoded empty prompt.
Refiner      Another model, which goes on from another model's latents; it is refused.
Source       Podell et al. 2023, arXiv 2307.01952, sections 2.1 and 2.2; diffusers' pipeline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffusion_envs.models.latent_decoder import decoder_precision
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_family import Configs, check_network, check_width

_SIZES = 6  # numbers that say how large a picture is; the refiner reads 5
_SUPPORTED = (
    "supported are base UNets of Stable Diffusion XL, which read noisy latents, a timestep, the "
    "embeddings of two text encoders, a pooled one and six sizes"
)


@dataclass(frozen=True)
class StableDiffusionXLFamily:
    """A UNet that reads two text encoders, a pooled embedding and sizes."""

    title: str = "Stable Diffusion XL"
    classes: tuple[str, ...] = ("StableDiffusionXLPipeline",)
    without: Mapping[str, Any] = field(
        default_factory=lambda: {
            "feature_extractor": None,
            "image_encoder": None,
            "add_watermarker": False,
        }
    )

    def parts(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Networks, tokenizers and scheduler; some models come without the first text encoder."""
        first = () if _absent(index, "text_encoder") else ("text_encoder", "tokenizer")
        return ("unet", "vae", *first, "text_encoder_2", "tokenizer_2", "scheduler")

    def check(self, model: str, configs: Configs) -> None:
        """Refuse the refiner, and networks that need other inputs.

        Raises:
            ValueError: naming what, and what is supported.
        """
        unet, index = configs["unet"], configs["index"]
        if _absent(index, "text_encoder_2"):
            raise ValueError(
                f"model {model} has no text_encoder_2, which makes the pooled embedding; "
                f"{_SUPPORTED}"
            )
        check_network(model, configs, _SUPPORTED)
        if unet.get("addition_embed_type") != "text_time":
            raise ValueError(
                f"model {model} has a UNet with addition_embed_type "
                f"{unet.get('addition_embed_type')!r}, not 'text_time'; {_SUPPORTED}"
            )
        pooled = configs["text_encoder_2"].get("projection_dim", 512)
        read = unet.get("projection_class_embeddings_input_dim") or 0
        width = unet.get("addition_time_embed_dim") or 256
        if read - pooled == 5 * width:
            raise ValueError(refusal_of_the_refiner(model))
        if read - pooled != _SIZES * width:
            raise ValueError(
                f"model {model} has a UNet that reads a pooled embedding and sizes of width {read} "
                f"together, where its text encoder makes {pooled} and {_SIZES} sizes are "
                f"{_SIZES * width}; {_SUPPORTED}"
            )
        check_width(model, configs, [name for name in self.parts(index) if "encoder" in name])

    def decoder_precision(self, vae: Mapping[str, Any], precision: torch.dtype) -> torch.dtype:
        """float32 where the decoder would overflow in float16."""
        return decoder_precision(vae, precision)

    def tokenizers(self, pipe: Any) -> list[Any]:
        """One for each text encoder."""
        both = (pipe.tokenizer, pipe.tokenizer_2)
        return [tokenizer for tokenizer in both if tokenizer is not None]

    @torch.no_grad()
    def encode(self, pipe: Any, prompts: Sequence[str], picture: tuple[int, int]) -> TextCondition:
        """Embeddings, pooled embeddings and sizes as the pipeline computes them, float32."""
        tokens, _, pooled, _ = pipe.encode_prompt(
            [str(prompt) for prompt in prompts],
            device=pipe.text_encoder_2.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        sizes = pooled.new_tensor([*picture, 0, 0, *picture], dtype=torch.float32)
        return TextCondition(tokens.float(), pooled.float(), sizes.expand(len(prompts), -1))

    def unconditional(
        self, pipe: Any, negative_prompt: str | None, picture: tuple[int, int]
    ) -> TextCondition:
        """Of the negative prompt; without one zeros, where the pipeline has them, or the empty."""
        encoded = self.encode(pipe, [negative_prompt or ""], picture)
        assert encoded.pooled is not None  # as encoded above
        if negative_prompt is not None or not pipe.config.force_zeros_for_empty_prompt:
            return encoded
        return replace(
            encoded,
            tokens=torch.zeros_like(encoded.tokens),
            pooled=torch.zeros_like(encoded.pooled),
        )


def refusal_of_the_refiner(model: str) -> str:
    """What to say of a refiner."""
    return (
        f"model {model} is the refiner of Stable Diffusion XL, which is not supported: it goes on "
        "from another model's latents at low noise and makes no picture of its own; fine-tune the "
        "base model, stabilityai/stable-diffusion-xl-base-1.0 for one (the result can be refined "
        "afterwards)"
    )


def _absent(index: Mapping[str, Any], part: str) -> bool:
    """Whether the index says that there is no such part."""
    return part in index and (index[part] is None or index[part][0] is None)
