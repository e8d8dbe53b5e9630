"""The exported model: for its own library, and as tensors for ``evaluate``."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_envs.models.protocol import Model
from diffusion_envs.runs import checkpoint
from diffusion_envs.samplers import BoundBlackBox, GaussianSteps
from diffusion_envs.training.phase import phase
from diffusion_envs.training.sharded import shards_of

_PLACE = "exported"  # in the run's folder


@phase("export")
def export(model: Model, folder: Path, update: int, sampler: Sequence[nn.Parameter] = ()) -> Path:
    """Write the model as it is; the file that its own library loads.

    Args:
        model: what was trained.
        folder: of the run.
        update: after which it is exported.
        sampler: what was trained of the sampler, kept for ``evaluate``; no file of the library.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
        ValueError: what was exported is not what was trained.
    """
    state = {
        "parameters": [p.detach() for p in shards_of(model).values(model.parameters)],
        "sampler": [p.detach() for p in sampler],
    }
    kept = checkpoint.save(folder / _PLACE, update, state, keep=1)
    for other in set((folder / _PLACE).glob("step-*")) - {kept}:  # a longer run that was worse
        shutil.rmtree(other, ignore_errors=True)
    return model.export(folder)


def load_exported(model: Model, folder: Path) -> int:
    """Put the exported parameters of a run into a freshly loaded model.

    Returns:
        The update after which they were taken.

    Raises:
        FileNotFoundError: the run has not exported anything yet.
        ValueError: the parameters are not those of this model.
    """
    stored = _exported(folder)
    tensors = stored.state["parameters"]
    shapes = [[list(t.shape) for t in each] for each in (tensors, model.parameters)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the model that run {folder} exported has parameters of other shapes than this model"
        )
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters, tensors, strict=True):
            parameter.copy_(tensor.to(parameter.device))
    return stored.step


def exported_sampler(sampler: GaussianSteps | BoundBlackBox, folder: Path) -> list[Tensor]:
    """What a run learned of its sampler, for one of the same kind; nothing if it cannot learn.

    Raises:
        FileNotFoundError: the run has not exported anything yet.
        ValueError: the run learned nothing of a sampler with so many steps.
    """
    if not sampler.parameters:
        return []
    tensors = _exported(folder).state.get("sampler", [])
    if [list(t.shape) for t in tensors] != [list(p.shape) for p in sampler.parameters]:
        had = f"those of {len(tensors[0])} steps" if tensors else "none"
        raise ValueError(
            f"the sampler has learned standard deviations of {len(sampler.parameters[0])} steps, "
            f"and run {folder} learned {had}: evaluate with as many steps, or without learned_std"
        )
    return tensors


def _exported(folder: Path) -> checkpoint.Checkpoint:
    stored = checkpoint.latest(folder / _PLACE)
    if stored is None:
        raise FileNotFoundError(
            f"run {folder} has exported no model yet; let it finish, or resume it"
        )
    return stored
