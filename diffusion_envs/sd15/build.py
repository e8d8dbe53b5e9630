"""Putting a run together: pipeline, adapter, sampler and reward become one environment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from diffusion_envs import rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models import stable_diffusion_pipeline as pipeline
from diffusion_envs.models.text_to_image_unet import GuidedScore, TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CPU = torch.device("cpu")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded pipeline with its adapter, as an environment."""

    pipe: StableDiffusionPipeline
    environment: Environment
    parameters: list[nn.Parameter]  # of the adapter
    table: DDPMTable  # the noise schedule

    def bind(
        self, sampler: samplers.Sampler, steps: int
    ) -> samplers.GaussianSteps | samplers.BoundBlackBox:
        """A sampler on this model's noise levels."""
        return _bound(self.pipe, sampler, self.table, steps)


def build(
    *,
    model: str | Path = pipeline.TINY,
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
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {precision!r}")
    if not (guidance >= 0 and guidance < float("inf")):
        raise ValueError(f"guidance must be a finite number of at least 0, got {guidance}")
    pipe = pipeline.load_pipeline(model, precision=PRECISIONS[precision], device=device)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    own = pipe.unet.config.sample_size * factor
    side = own if resolution is None else resolution
    smallest = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if side < smallest or side % smallest:
        raise ValueError(f"resolution must be a positive multiple of {smallest}, got {resolution}")
    empty = pipeline.embed_prompts(pipe, [""])[0]
    parameters = pipeline.attach_lora(
        pipe.unet, rank=lora_rank, targets=tuple(lora_targets), seed=seed
    )
    table = DDPMTable.from_diffusers(pipe.scheduler)
    score = GuidedScore(
        unet=pipe.unet,
        alphas_cumprod=pipe.scheduler.alphas_cumprod.to(device),
        prediction_type=pipe.scheduler.config.prediction_type,
        guidance=guidance,
        unconditional=empty,
        batch=batch,
        precision=PRECISIONS[precision],
    )
    network = TextToImageUNet(
        score=score,
        event=(pipe.unet.config.in_channels, side // factor, side // factor),
        table=table,
        encode=lambda words: pipeline.embed_prompts(pipe, list(words)),
        decode=partial(pipeline.decode, pipe.vae, batch=batch),
        parameters=parameters,
        device=device,
        write=partial(pipeline.export_lora, pipe.unet),
    )
    environment = Environment(
        model=network,
        sampler=_bound(pipe, sampler, table, steps),
        reward=reward,
        prompts=list(prompts),
        seed=seed,
        batch=batch,
    )
    return Model(pipe, environment, parameters, table)


def _bound(
    pipe: StableDiffusionPipeline, sampler: samplers.Sampler, table: DDPMTable, steps: int
) -> samplers.GaussianSteps | samplers.BoundBlackBox:
    return sampler.bind(table, steps, pipe.scheduler.config.prediction_type)


def load(options: Any, *, device: torch.device, batch: int, seed: int) -> TextToImageUNet:
    """The model of these options (``StableDiffusion``) with a fresh adapter."""
    built = build(
        model=options.model,
        reward=rewards.Colour(),
        prompts=[""],
        sampler=samplers.DDIM(),
        steps=1,
        guidance=options.guidance,
        batch=batch,
        lora_rank=options.lora_rank,
        lora_targets=options.lora_targets,
        precision=options.precision,
        resolution=options.resolution,
        device=device,
        seed=seed,
    )
    model = built.environment.model
    assert isinstance(model, TextToImageUNet)
    if options.gradient_checkpointing:
        model.score.recompute_activations()
    return model
