"""One file per method: a frozen dataclass of hyperparameters, its advantages and its loss."""

from diffusion_envs.objectives.protocol import (
    BackpropObjective,
    NoisedObjective,
    NoisedRows,
    Objective,
    PathObjective,
    Rollout,
    Rows,
)
from diffusion_envs.objectives.score_as_action import (
    ScoreAsAction,
    ScoreAsActionReleased,
    ScoreAsActionSampled,
)

__all__ = [
    "BackpropObjective",
    "NoisedObjective",
    "NoisedRows",
    "Objective",
    "PathObjective",
    "Rollout",
    "Rows",
    "ScoreAsAction",
    "ScoreAsActionReleased",
    "ScoreAsActionSampled",
]
