"""``sd15.finetune`` with all its settings side by side, as tests vary one of them at a time."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusion_envs import sd15
from diffusion_envs.runs.options import RunOptions


def finetune(model: str | Path = "tiny", **settings: Any) -> sd15.Run:
    """Each setting goes to the dataclass that has it."""
    of_model, of_run = (
        {f.name: settings.pop(f.name) for f in fields(kind) if f.name in settings}
        for kind in (sd15.StableDiffusion, RunOptions)
    )
    named = sd15.StableDiffusion(model, **of_model)
    return sd15.finetune(named, options=RunOptions(**of_run), **settings)
