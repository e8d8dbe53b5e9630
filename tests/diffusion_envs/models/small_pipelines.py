"""Small pipelines in diffusers' own layout, with random weights: SD1.x, SD2.x and SDXL."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffusion_envs.models.folders import tiny_folder

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


_BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def small_pipeline(
    unet: dict[str, Any] | None = None, scheduler: Any = None, width: int = 24
) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x of a few thousand weights; settings change its UNet."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        tokenizer = CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")
        return StableDiffusionPipeline(
            text_encoder=CLIPTextModel(_text_config(tokenizer, width)).eval(),
            unet=_unet({"cross_attention_dim": width} | (unet or {})),
            vae=_vae(scaling_factor=0.37),
            tokenizer=tokenizer,
            scheduler=scheduler or _ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def small_2(**scheduler: Any) -> StableDiffusionPipeline:
    """A Stable Diffusion 2.x: it predicts v, and its text encoder is wider."""
    unet = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    return small_pipeline(unet, _ddim(prediction_type="v_prediction", **scheduler), width=40)


def small_xl(
    unet: dict[str, Any] | None = None, scheduler: Any = None, **settings: Any
) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL; settings are the pipeline's."""
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        tokenizer = CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")
        first = CLIPTextModel(_text_config(tokenizer, 16, layers=2)).eval()
        second = _text_config(tokenizer, 24, layers=2, projection_dim=20)
        sizes = {
            "cross_attention_dim": 16 + 24,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        parts = {
            "text_encoder": first,
            "tokenizer": tokenizer,
            "text_encoder_2": CLIPTextModelWithProjection(second).eval(),
            "tokenizer_2": tokenizer,
            "unet": _unet(sizes | (unet or {})),
            "vae": _vae(scaling_factor=0.13),
            "scheduler": scheduler or EulerDiscreteScheduler(**STABLE_DIFFUSION, steps_offset=1),
            "add_watermarker": False,
        }
        return StableDiffusionXLPipeline(**(parts | settings))


def _ddim(**settings: Any) -> DDIMScheduler:
    usual = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**STABLE_DIFFUSION, **(usual | settings))


def _text_config(
    tokenizer: Any, width: int, layers: int = 1, projection_dim: int = 512
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=projection_dim,
        bos_token_id=607,
        eos_token_id=608,
    )


def _unet(settings: dict[str, Any]) -> UNet2DConditionModel:
    usual = {
        "sample_size": 8,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(**_BLOCKS, **(usual | settings))
    with torch.no_grad():  # what is random would hardly read its prompt
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name or "add_embedding" in name:
                weight.mul_(4)
    return unet


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **_BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **settings,
    )
