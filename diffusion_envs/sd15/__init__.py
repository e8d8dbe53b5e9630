"""Stable Diffusion as an environment: fine-tune it with ``finetune``, or from the command line."""

import dataclasses
from pathlib import Path
from typing import Any

from diffusion_envs.runs.finetune import Run
from diffusion_envs.runs.finetune import finetune as _finetune
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.sd15.stable_diffusion import StableDiffusion
from diffusion_envs.training.update_size import UpdateSize

__all__ = ["Run", "StableDiffusion", "finetune"]


def finetune(model: str | Path | StableDiffusion = "tiny", **arguments: Any) -> Run:
    """``runs.finetune.finetune``, which documents ``arguments``, with a Stable Diffusion model.

    Args:
        model: "tiny", a folder in diffusers' layout, or a hub id; ``StableDiffusion`` for other
            guidance, adapter, precision or device.
        arguments: reward, prompts, output, objective, sampler, steps, updates, size, options, seed,
            resume.

    Raises:
        TypeError: an argument belongs to the model, the sizes or the options; the message says how.
    """
    for kind, place in _PLACES.items():
        for name in arguments.keys() & {f.name for f in dataclasses.fields(kind)}:
            raise TypeError(
                f"{name} is no argument of finetune: say {place}, {kind.__name__}({name}="
                f"{arguments[name]!r})"
            )
    named = model if isinstance(model, StableDiffusion) else StableDiffusion(model)
    return _finetune(named, **arguments)


_PLACES: dict[type, str] = {
    StableDiffusion: "how the model is used by model=sd15.StableDiffusion(...)",
    UpdateSize: "sizes of an update by size=UpdateSize(...)",
    RunOptions: "how the run is watched by options=RunOptions(...)",
}
