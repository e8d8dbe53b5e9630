"""Step and solver transfer: a model fine-tuned at one step count, evaluated at others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctrl import Estimate
from diffusion_envs import rewards
from diffusion_envs.models.protocol import Model
from diffusion_envs.runs.evaluation import evaluate, require_the_runs_reward
from diffusion_envs.runs.exported import exported_sampler, load_exported
from diffusion_envs.runs.finetune import evaluated, make_environment
from diffusion_envs.runs.report import write_report
from diffusion_envs.runs.run_folder import write_json
from diffusion_envs.samplers import Sampler


@dataclass(frozen=True)
class Row:
    """Mean reward of one sampler at one step count, over the same held-out seeds as every other."""

    sampler: str
    steps: int
    before: Estimate
    after: Estimate
    difference: Estimate  # paired

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON."""
        estimates = {n: getattr(self, n).as_dict() for n in ("before", "after", "difference")}
        return {"sampler": self.sampler, "steps": self.steps, **estimates}


def transfer(
    folder: str | Path,
    model: Model,
    *,
    reward: rewards.Reward,
    prompts: Sequence[str],
    seed: int,
    steps: Sequence[int],
    samplers: Sequence[Sampler],
    samples: int,
    guidance: float | None = None,
    batch: int = 32,
    reward_timeout: float | None = None,
) -> list[Row]:
    """Evaluate what a run exported at other step counts; write ``transfer.json`` and a new report.

    Every row uses the same held-out seeds. The stochastic sampler's noise is drawn step by step,
    so rows of other step counts share the starting noise only. Heun's scheduler calls the network
    nearly twice a step.

    Args:
        folder: of the run.
        model: of the run, freshly loaded.
        reward: of the run.
        prompts: of the run's held-out samples.
        seed: of the run.
        steps: step counts to try.
        samplers: DDIM at one or several eta, 0 included, and schedulers of diffusers by name.
        samples: held-out samples of each.
        guidance: their classifier-free guidance scale; the model's if None.
        batch: samples rolled out at once.
        reward_timeout: seconds that one call of the reward may take; None for any.

    Raises:
        FileNotFoundError: the run has exported no model yet.
        ValueError: a step count is out of range, or the reward is not the run's, or a sampler has
            learned standard deviations and the run has none for so many steps.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    folder = Path(folder)
    grids = [
        (
            kind,
            n,
            evaluated(
                make_environment(
                    model,
                    sampler=kind,
                    steps=n,
                    reward=reward,
                    prompts=prompts,
                    seed=seed,
                    batch=batch,
                    reward_timeout=reward_timeout,
                ),
                prompts,
                guidance,
            ),
        )
        for kind in samplers
        for n in steps
    ]
    load_exported(model, folder)
    before = folder / "evaluation" / "before.safetensors"
    for _, _, environment in grids[:1]:
        require_the_runs_reward(environment, before, batch)
    rows = []
    widths = [exported_sampler(environment.sampler, folder) for _, _, environment in grids]
    for (kind, n, environment), learned in zip(grids, widths, strict=True):
        was = evaluate(environment, samples, batch=batch, pretrained=True).rewards
        with torch.no_grad():
            for parameter, trained in zip(environment.sampler.parameters, learned, strict=True):
                parameter.copy_(trained)
        now = evaluate(environment, samples, batch=batch).rewards
        rows.append(Row(kind.label, n, *(Estimate.of(r) for r in (was, now, now - was))))
    write_json(folder / "transfer.json", [row.as_dict() for row in rows])
    write_report(folder)
    return rows
