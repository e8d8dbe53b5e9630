"""Rewards: any callable (images in [0, 1], prompts) -> one number for each image."""

from diffusion_envs.rewards.classifier import ClassConfidence, PromptAlignment
from diffusion_envs.rewards.colour import Colour
from diffusion_envs.rewards.contract import (
    Counting,
    Embedder,
    Reward,
    RewardError,
    differentiable_score,
    embed,
    load,
    require_inputs,
    reward_name,
    score,
)
from diffusion_envs.rewards.jpeg import JpegCompressibility, JpegIncompressibility

__all__ = [
    "ClassConfidence",
    "Colour",
    "Counting",
    "Embedder",
    "JpegCompressibility",
    "JpegIncompressibility",
    "PromptAlignment",
    "Reward",
    "RewardError",
    "differentiable_score",
    "embed",
    "load",
    "require_inputs",
    "reward_name",
    "score",
]
