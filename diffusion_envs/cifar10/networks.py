"""The networks of CIFAR-10: the published configuration, and a small one for the CPU.

Source      Ho, Jain & Abbeel 2020, "Denoising diffusion probabilistic models", arXiv 2006.11239,
            appendix B; the numbers are those of ``google/ddpm-cifar10-32``.
"""

from typing import Any, Literal, TypeAlias

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Prediction: TypeAlias = Literal["epsilon", "v_prediction"]
PUBLISHED: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,  # one head
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 1,
}
SMALL: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32, 128, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}


def published() -> UNet2DModel:
    """Untrained, 35.7 M parameters, in the architecture of ``google/ddpm-cifar10-32``."""
    return UNet2DModel(**PUBLISHED)


def small() -> UNet2DModel:
    """Untrained, 4.0 M parameters, most of them at 8 x 8 and 4 x 4 pixels: 13 times less work."""
    return UNet2DModel(**SMALL)


def scheduler(prediction_type: Prediction = "epsilon") -> DDPMScheduler:
    """The published noise levels: 1000 of them, beta from 1e-4 to 0.02, fixed_large, clipped."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="fixed_large",
        clip_sample=True,
        prediction_type=prediction_type,
    )
