"""Steps that were refused, kept in the run's folder so that they can be looked at and repeated.

```
refused/update-000007/
  refused.json                the update, why it was refused, seed and stream, prompts, rewards
  process-0.safetensors       what was to be learned from: states, noises, rewards, ... by process
  step-000006/                the state before it: a checkpoint, which the run's own do not outlive
```
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.resuming import Checkpoints
from diffusion_envs.training.refusal import RefusedStep
from diffusion_envs.training.trainer import Trainer

REFUSED = "refused"  # in the run's folder


def place_of(folder: Path, update: int) -> Path:
    """Where an update that was refused is kept."""
    return folder / REFUSED / f"update-{update:06d}"


class RefusedSteps:
    """Writes what is refused into a run's folder; ``Trainer(refused=...)`` takes it.

    Args:
        folder: of the run.
        trainer: whose steps they are.
        checkpoints: that hold the state before each.
    """

    def __init__(self, folder: Path, trainer: Trainer, checkpoints: Checkpoints) -> None:
        self._folder, self._trainer, self._checkpoints = folder, trainer, checkpoints

    def __call__(self, step: RefusedStep) -> None:
        """Write it; every process its own share, and the main one what is of all.

        Raises:
            CheckpointError: the state before it cannot be written.
        """
        place = place_of(self._folder, step.update)
        place.mkdir(parents=True, exist_ok=True)
        tensors = {
            f.name: value.detach().cpu().contiguous()
            for f in dataclasses.fields(step.rollout)
            if isinstance(value := getattr(step.rollout, f.name), Tensor)
        }
        save_file(tensors, place / f"process-{step.process}.safetensors")
        if step.process != 0:
            return
        written = {
            "update": step.update,
            "reason": step.reason,
            "seed": self._trainer.environment.seed,
            "stream": step.stream,
            "samples": [step.samples.start, step.samples.stop],
            "prompts": [str(prompt) for prompt in step.prompts],
            "rewards": [_plain(reward) for reward in step.rollout.rewards.tolist()],
            "checkpoint": f"step-{step.update - 1:06d}",
        }
        (place / "refused.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
        state = self._checkpoints.before_this_update()
        if state is not None:
            checkpoint.save(place, state["update"], state)


def repeat(trainer: Trainer, place: str | Path) -> dict[str, Any]:
    """Take a refused step again, from the state before it; its numbers if it is not refused now.

    Args:
        trainer: of the run's settings, or of those that are to be tried instead.
        place: folder of the step.

    Raises:
        CheckpointError: the state before it is not there, or is damaged.
        NonFiniteError: it is refused again.
    """
    before = checkpoint.latest(Path(place))
    if before is None:
        raise checkpoint.CheckpointError(f"{place} holds no state from which to repeat a step")
    trainer.load_state(before.state)
    return trainer.step()


def _plain(number: float) -> float | str:
    """A number as JSON holds it; what is none, in words."""
    return number if torch.isfinite(torch.tensor(number)) else str(number)
