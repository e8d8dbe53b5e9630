"""Small pipelines in diffusers' own layout, with random weights."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_envs.models.folders import tiny_folder

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def small_pipeline(
    unet: dict[str, Any] | None = None, scheduler: Any = None, width: int = 24
) -> StableDiffusionPipeline:
    """A Stable Diffusion of a few thousand weights; settings change its UNet."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        tokenizer = CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=607,
            eos_token_id=608,
        )
        blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        settings = {
            "sample_size": 8,
            "cross_attention_dim": width,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        } | (unet or {})
        return StableDiffusionPipeline(
            unet=UNet2DConditionModel(**blocks, **settings),
            vae=AutoencoderKL(
                **blocks,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                scaling_factor=0.37,
            ),
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            scheduler=scheduler
            or DDIMScheduler(
                **STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
