"""Rewards: any callable (images in [0, 1], prompts) -> one number for each image."""

from diffusion_envs.rewards.aesthetic import Aesthetic
from diffusion_envs.rewards.classifier import ClassConfidence, PromptAlignment
from diffusion_envs.rewards.clip_score import CLIPScore
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
from diffusion_envs.rewards.declaration import Declaration, Declaring
from diffusion_envs.rewards.hps import HPS
from diffusion_envs.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from diffusion_envs.rewards.pick_score import PickScore

__all__ = [
    "HPS",
    "Aesthetic",
    "CLIPScore",
    "ClassConfidence",
    "Colour",
    "Counting",
    "Declaration",
    "Declaring",
    "Embedder",
    "JpegCompressibility",
    "JpegIncompressibility",
    "PickScore",
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
