"""Rewards: any callable (images in [0, 1], prompts) -> one number for each image."""

from diffusion_envs.rewards.aesthetic import Aesthetic
from diffusion_envs.rewards.classifier import ClassConfidence, PromptAlignment
from diffusion_envs.rewards.clip_score import CLIPScore
from diffusion_envs.rewards.colour import Colour
from diffusion_envs.rewards.contract import (
    Counting,
    Embedder,
    InParts,
    Reward,
    RewardError,
    Scorer,
    differentiable_score,
    embed,
    load,
    require_inputs,
    reward_name,
    score,
    score_in_parts,
)
from diffusion_envs.rewards.declaration import Declaration, Declaring
from diffusion_envs.rewards.hps import HPS
from diffusion_envs.rewards.image_reward import ImageReward
from diffusion_envs.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from diffusion_envs.rewards.overlapped import Overlapped, require_calls
from diffusion_envs.rewards.pick_score import PickScore
from diffusion_envs.rewards.remote import Remote
from diffusion_envs.rewards.text_in_picture import ReadableText, TextInPicture
from diffusion_envs.rewards.time_limit import limited, require_seconds, within
from diffusion_envs.rewards.transformed import Cached, Limited, Threshold
from diffusion_envs.rewards.vlm_judge import VLMJudge
from diffusion_envs.rewards.weighted import Weighted, statistics

__all__ = [
    "HPS",
    "Aesthetic",
    "CLIPScore",
    "Cached",
    "ClassConfidence",
    "Colour",
    "Counting",
    "Declaration",
    "Declaring",
    "Embedder",
    "ImageReward",
    "InParts",
    "JpegCompressibility",
    "JpegIncompressibility",
    "Limited",
    "Overlapped",
    "PickScore",
    "PromptAlignment",
    "ReadableText",
    "Remote",
    "Reward",
    "RewardError",
    "Scorer",
    "TextInPicture",
    "Threshold",
    "VLMJudge",
    "Weighted",
    "differentiable_score",
    "embed",
    "limited",
    "load",
    "require_calls",
    "require_inputs",
    "require_seconds",
    "reward_name",
    "score",
    "score_in_parts",
    "statistics",
    "within",
]
