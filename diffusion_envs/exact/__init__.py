"""Fine-tuning problems whose optimum is known exactly, on the loop that images use."""

from diffusion_envs.exact.problems import (
    GaussianProblem,
    MixtureProblem,
    Outcome,
    Problem,
    log_normaliser,
    table,
)
from diffusion_envs.exact.rewards import CosineReward, QuadraticReward
from diffusion_envs.models.exact import (
    AffineCorrection,
    CorrectedDenoiser,
    CorrectedScore,
    NeuralCorrection,
)

__all__ = [
    "AffineCorrection",
    "CorrectedDenoiser",
    "CorrectedScore",
    "CosineReward",
    "GaussianProblem",
    "MixtureProblem",
    "NeuralCorrection",
    "Outcome",
    "Problem",
    "QuadraticReward",
    "log_normaliser",
    "table",
]
