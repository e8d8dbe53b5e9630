"""Which Stable Diffusion model, and how it is used: all that its weights do not say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion_envs.models.adapters import ATTENTION, require_precision
from diffusion_envs.models.folders import SHIPPED, from_anywhere
from diffusion_envs.models.guidance_schedule import require_something_trains
from diffusion_envs.models.protocol import Model


@dataclass(frozen=True)
class StableDiffusion:
    """Which Stable Diffusion model, and how it is used.

    Attributes:
        model: "tiny", "words", a folder in diffusers' layout, or a hub id.
        guidance: classifier-free guidance scale; 1 is none.
        negative_prompt: what guidance leads away from; the empty prompt if left out.
        variant: of the weights, such as fp16; those that are there if left out.
        lora_rank: of the adapter; 0 for none, where the guidance scale trains alone.
        lora_targets: names of the layers that get one.
        guidance_knots: timesteps between which the guidance scale trains; 0: it does not.
        precision: of the network: float32, bfloat16 or (CUDA only) float16.
        resolution: pixels a side; the model's own if left out.
        gradient_checkpointing: recompute activations: less memory, more time.
        device: cpu or cuda; what there is if left out.
    """

    model: str | Path = "tiny"
    guidance: float = 3.0
    negative_prompt: str | None = None
    variant: str | None = None
    lora_rank: int = 8
    lora_targets: Sequence[str] = ATTENTION
    guidance_knots: int = 0
    precision: str = "float32"
    resolution: int | None = None
    gradient_checkpointing: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        require_precision(self.precision)
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise ValueError(f"guidance must be a finite number of at least 0, got {self.guidance}")
        require_something_trains(self.lora_rank, self.guidance_knots)
        object.__setattr__(self, "model", from_anywhere(self.model, *SHIPPED))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    @property
    def label(self) -> str:
        """Name for reports."""
        return str(self.model)

    def load(self, *, device: torch.device, batch: int, seed: int) -> Model:
        """The pipeline with a fresh adapter.

        Args:
            device: where the networks go; ``self.device`` is what was asked for.
            batch: most rows that one call of the network gets when no gradient is asked for.
            seed: of the adapter's initial weights.

        Raises:
            ValueError: an argument does not fit the model.
            FileNotFoundError: the model is not there.
        """
        # diffusers and transformers are heavy
        from diffusion_envs.models.text_to_image_unet import TextToImageUNet

        return TextToImageUNet.load(
            self.model,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            variant=self.variant,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            guidance_knots=self.guidance_knots,
            precision=self.precision,
            resolution=self.resolution,
            batch=batch,
            gradient_checkpointing=self.gradient_checkpointing,
            device=device,
            seed=seed,
        )
