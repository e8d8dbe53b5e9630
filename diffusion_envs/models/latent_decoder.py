"""Latents to pictures, by the autoencoder of a latent diffusion model.

Source  Rombach et al. 2022, latent diffusion, arXiv 2112.10752; scales as in diffusers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def decode(
    vae: Any, latents: Float[Tensor, "n c h w"], batch: int
) -> Float[Tensor, "n 3 height width"]:
    """Pictures in [0, 1], float32, from scaled latents; ``batch`` at a time; differentiable."""
    unscaled = _unscaled(vae.config, latents).to(vae.dtype)
    parts = [vae.decode(part).sample.float() for part in unscaled.split(batch)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def _unscaled(config: Any, latents: Tensor) -> Tensor:
    """What the autoencoder decodes: latents in its own units."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / config.scaling_factor
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return latents * std / config.scaling_factor + mean


def shrinking(config: Mapping[str, Any]) -> int:
    """Pixels a side of a picture for each of its latent: 8 of all published models."""
    return 2 ** (len(config.get("block_out_channels", (64,))) - 1)


def decoder_precision(config: Mapping[str, Any], precision: torch.dtype) -> torch.dtype:
    """Dtype of the autoencoder where the networks have this one.

    That of SDXL overflows in float16 and then makes black pictures. Where its settings say so
    (``force_upcast``, true unless a folder says otherwise) it is float32, as in diffusers.
    """
    overflows = precision == torch.float16 and config.get("force_upcast", True)
    return torch.float32 if overflows else precision


def require_resolution(resolution: object) -> None:
    """Refuse what is no size of a picture, whatever the model.

    Raises:
        ValueError: it is neither a positive number of pixels a side, nor height and width.
    """
    if resolution is None:
        return
    sides = resolution if isinstance(resolution, tuple | list) else (resolution, resolution)
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
    if len(sides) != 2 or len(whole) != 2 or min(whole) < 1:
        raise ValueError(
            "resolution must be a positive number of pixels a side, or (height, width), got "
            f"{resolution!r}"
        )
