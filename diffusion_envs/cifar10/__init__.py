"""CIFAR-10: its data, its networks, their pretraining; fine-tune them with ``finetune``."""

from typing import TYPE_CHECKING, Any

from diffusion_envs.cifar10.pictures import Pictures

if TYPE_CHECKING:
    from diffusion_envs.cifar10.family import Cifar10Model, Run, finetune

__all__ = ["Cifar10Model", "Pictures", "Run", "finetune"]


def __getattr__(name: str) -> Any:
    """What fine-tunes, imported when it is asked for: rewards import this package's data."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffusion_envs.cifar10 import family

    return getattr(family, name)
