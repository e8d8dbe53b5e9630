"""Step and solver transfer: a model fine-tuned at one step count, judged at others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ctrl import Estimate
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.runs.report import write_report
from diffusion_envs.runs.run_folder import write_json
from diffusion_envs.samplers import Sampler
from diffusion_envs.sd15.build import Model


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


def transfer(
    folder: str | Path,
    built: Model,
    *,
    steps: Sequence[int],
    samplers: Sequence[Sampler],
    samples: int,
    batch: int = 32,
) -> list[Row]:
    """Judge a finished run at other step counts; write ``transfer.json`` and the report anew.

    Every row uses the same held-out seeds. The stochastic sampler's noise is drawn step by step,
    so rows of other step counts share the starting noise only. Heun's scheduler calls the network
    nearly twice a step.

    Args:
        folder: of the run.
        built: the model of the run, as ``build`` makes it from the run's settings.
        steps: step counts to try.
        samplers: DDIM at one or several eta, 0 included, and schedulers of diffusers by name.
        samples: held-out samples of each.
        batch: samples rolled out at once.

    Raises:
        FileNotFoundError: the run has no checkpoint yet.
        ValueError: a step count is out of range.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    folder = Path(folder)
    grids = [(kind, n, built.bind(kind, n)) for kind in samplers for n in steps]
    load_adapter(folder, built)
    rows = []
    for kind, n, bound in grids:
        environment = replace(built.environment, sampler=bound)
        before = evaluate(environment, samples, batch=batch, pretrained=True).rewards
        after = evaluate(environment, samples, batch=batch).rewards
        gain = Estimate.of(after - before)
        rows.append(Row(kind.label, n, Estimate.of(before), Estimate.of(after), gain))
    write_json(folder / "transfer.json", [row.as_dict() for row in rows])
    write_report(folder)
    return rows


def load_adapter(folder: Path, built: Model) -> None:
    """Put the adapter of a run's newest checkpoint into a freshly built model."""
    found = checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"run {folder} has no checkpoint yet; let it finish or resume it")
    with torch.no_grad():
        for parameter, tensor in zip(built.parameters, found.state["adapter"], strict=True):
            parameter.copy_(tensor)
