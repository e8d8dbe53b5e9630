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
from diffusion_envs.rewards.remote import Remote
from diffusion_envs.rewards.vlm_judge import VLMJudge

__all__ = [
    "ClassConfidence",
    "Colour",
    "Counting",
    "Embedder",
    "JpegCompressibility",
    "JpegIncompressibility",
    "PromptAlignment",
    "Remote",
    "Reward",
    "RewardError",
    "VLMJudge",
    "differentiable_score",
    "embed",
    "load",
    "require_inputs",
    "reward_name",
    "score",
]
