"""Step and solver transfer: a model fine-tuned at one step count, judged at others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctrl import Estimate
from diffusion_envs import rewards, samplers
from diffusion_envs.sd15.build import Model, build
from diffusion_envs.training import checkpoint
from diffusion_envs.training.evaluation import evaluate
from diffusion_envs.training.report import write_report
from diffusion_envs.training.run_folder import write_json

if TYPE_CHECKING:
    from diffusion_envs.sd15.__main__ import Finetune


@dataclass(frozen=True)
class Row:
    """Mean reward of one sampler at one step count, over the same held-out seeds as every other."""

    sampler: str
    steps: int
    before: Estimate
    after: Estimate
    difference: Estimate  # paired

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        estimates = {n: getattr(self, n).as_dict() for n in ("before", "after", "difference")}
        return {"sampler": self.sampler, "steps": self.steps, **estimates}


def load_run(
    folder: Path, options: "Finetune", reward: rewards.Reward, device: torch.device
) -> Model:
    """The fine-tuned model of a run, from its newest checkpoint."""
    built = build(
        model=options.model,
        reward=reward,
        prompts=options.prompts,
        sampler=samplers.DDIM(eta=options.eta),
        steps=options.steps,
        guidance=options.guidance,
        batch=options.schedule.batch,
        lora_rank=options.lora_rank,
        lora_targets=options.lora_targets,
        precision=options.precision,
        resolution=options.resolution,
        device=device,
        seed=options.seed,
    )
    found = checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"run {folder} has no checkpoint yet; let it finish or resume it")
    with torch.no_grad():
        for parameter, tensor in zip(built.parameters, found.state["adapter"], strict=True):
            parameter.copy_(tensor)
    return built
