"""Stable Diffusion as an environment: fine-tune it with ``finetune``, or from the command line.

``finetune`` and ``Run`` are imported when they are first used: diffusers and transformers are
heavy.
"""

from typing import Any

__all__ = ["Run", "finetune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        module = importlib.import_module("diffusion_envs.sd15.finetune")
        globals().update(Run=module.Run, finetune=module.finetune)  # not the submodule of that name
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
