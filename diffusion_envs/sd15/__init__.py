"""Stable Diffusion as an environment: fine-tune it with ``finetune``, or from the command line."""

from diffusion_envs.sd15.finetune import Run, finetune

__all__ = ["Run", "finetune"]
