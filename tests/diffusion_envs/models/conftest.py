"""Folders of small pipelines, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.diffusion_envs.models.small_pipelines import small_pipeline


@pytest.fixture
def save_small(tmp_path: Path) -> Callable[..., Path]:
    """(unet settings, scheduler, width) -> the folder of a small Stable Diffusion."""

    def save(*args: Any, **settings: Any) -> Path:
        small_pipeline(*args, **settings).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def save_pixels(tmp_path: Path) -> Callable[..., Path]:
    """(unet settings, scheduler) -> the folder of a small unconditional pipeline.

    Its parts lie in folders, its scheduler clips, as google/ddpm-cifar10-32's does.
    """

    def save(unet: dict[str, Any] | None = None, scheduler: Any = None) -> Path:
        settings = {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        } | (unet or {})
        with torch.random.fork_rng([]):
            torch.manual_seed(6)
            network = UNet2DModel(**settings)
        scheduler = scheduler or DDPMScheduler(variance_type="fixed_large", clip_sample=True)
        DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "pixels")
        return tmp_path / "pixels"

    return save
