"""The exported model: for its own library, and as tensors for ``evaluate``."""

import shutil
from pathlib import Path

import torch

from diffusion_envs.models.protocol import Model
from diffusion_envs.runs import checkpoint

_PLACE = "exported"  # in the run's folder


def export(model: Model, folder: Path, update: int) -> Path:
    """Write the model as it is; the file that its own library loads.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
        ValueError: what was exported is not what was trained.
    """
    state = {"parameters": [p.detach() for p in model.parameters]}
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
    stored = checkpoint.latest(folder / _PLACE)
    if stored is None:
        raise FileNotFoundError(
            f"run {folder} has exported no model yet; let it finish, or resume it"
        )
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
