"""One file per method: a frozen dataclass of hyperparameters, its advantages and its loss."""

from diffusion_envs.objectives.protocol import Objective, Rollout, Rows
from diffusion_envs.objectives.score_as_action import (
    ScoreAsAction,
    ScoreAsActionReleased,
    ScoreAsActionSampled,
)

__all__ = [
    "Objective",
    "Rollout",
    "Rows",
    "ScoreAsAction",
    "ScoreAsActionReleased",
    "ScoreAsActionSampled",
]
