"""Putting a run together: pipeline, adapter, sampler and reward become one environment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_envs import rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models.adapters import ATTENTION, PRECISIONS
from diffusion_envs.models.folders import TINY
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable

__all__ = ["ATTENTION", "PRECISIONS", "Model", "build"]
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded pipeline with its adapter, as an environment."""

    pipe: Any
    environment: Environment
    parameters: list[nn.Parameter]  # of the adapter
    table: DDPMTable  # the noise schedule

    def bind(
        self, sampler: samplers.Sampler, steps: int
    ) -> samplers.BoundDDIM | samplers.BoundBlackBox:
        """A sampler on this model's noise levels."""
        return sampler.bind(self.table, steps, self.pipe.scheduler.config.prediction_type)


def build(
    *,
    model: str | Path = TINY,
    reward: rewards.Reward,
    prompts: Sequence[str],
    sampler: samplers.Sampler,
    steps: int,
    guidance: float,
    batch: int,
    lora_rank: int,
    lora_targets: Sequence[str] = ATTENTION,
    precision: str = "float32",
    resolution: int | None = None,
    device: torch.device = CPU,
    seed: int = 0,
) -> Model:
    """Load ``model``, attach a fresh adapter, and bind sampler, prompts and reward to it.

    The arguments are those of ``finetune``, which documents them.

    Raises:
        ValueError: an argument is out of range, or does not fit the model.
        FileNotFoundError: the model is not there.
    """
    network = TextToImageUNet.load(
        model,
        guidance=guidance,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        precision=precision,
        resolution=resolution,
        batch=batch,
        device=device,
        seed=seed,
    )
    environment = Environment(
        model=network,
        sampler=sampler.bind(network.table, steps, network.prediction_type),
        reward=reward,
        prompts=list(prompts),
        seed=seed,
        batch=batch,
    )
    return Model(network.pipe, environment, network.parameters, network.table)
