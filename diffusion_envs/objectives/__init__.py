"""One file per method: a frozen dataclass of hyperparameters, its advantages and its loss."""

from diffusion_envs.objectives.adjoint_matching import (
    AdjointMatching,
    ZerothOrderAdjointMatching,
)
from diffusion_envs.objectives.d3po import D3PO
from diffusion_envs.objectives.ddpo import DDPO, DDPOScoreFunction
from diffusion_envs.objectives.dense_reward import DenseReward
from diffusion_envs.objectives.diffusion_dpo import DiffusionDPO
from diffusion_envs.objectives.distributional import DistributionalOptimisation, NearTarget
from diffusion_envs.objectives.dpok import DPOK
from diffusion_envs.objectives.dxmi import ContinuousDxMI, ContinuousDxMIReleased, DxMI
from diffusion_envs.objectives.dxmi_from_data import (
    ContinuousDxMIFromData,
    ContinuousDxMIReleasedFromData,
    DxMIFromData,
)
from diffusion_envs.objectives.flow_dppo import FlowDPPO
from diffusion_envs.objectives.grpo import GRPO
from diffusion_envs.objectives.grpo_guard import GRPOGuard
from diffusion_envs.objectives.last_steps import BackpropObjective
from diffusion_envs.objectives.nft import DiffusionNFT
from diffusion_envs.objectives.noised_data import NoisedObjective, NoisedRows
from diffusion_envs.objectives.path_steps import PathObjective, Rows
from diffusion_envs.objectives.pcpo import PCPO
from diffusion_envs.objectives.protocol import Objective
from diffusion_envs.objectives.ram import ReinforceAdjointMatching
from diffusion_envs.objectives.reward_backpropagation import AlignProp, DRaFT, ReFL
from diffusion_envs.objectives.score_as_action import (
    ScoreAsAction,
    ScoreAsActionReleased,
    ScoreAsActionSampled,
)
from diffusion_envs.objectives.tdpo import TDPO, TDPOReset
from diffusion_envs.objectives.tilted_regression import TiltedRegression
from diffusion_envs.rollout import Rollout

__all__ = [
    "D3PO",
    "DDPO",
    "DPOK",
    "GRPO",
    "PCPO",
    "TDPO",
    "AdjointMatching",
    "AlignProp",
    "BackpropObjective",
    "ContinuousDxMI",
    "ContinuousDxMIFromData",
    "ContinuousDxMIReleased",
    "ContinuousDxMIReleasedFromData",
    "DDPOScoreFunction",
    "DRaFT",
    "DenseReward",
    "DiffusionDPO",
    "DiffusionNFT",
    "DistributionalOptimisation",
    "DxMI",
    "DxMIFromData",
    "FlowDPPO",
    "GRPOGuard",
    "NearTarget",
    "NoisedObjective",
    "NoisedRows",
    "Objective",
    "PathObjective",
    "ReFL",
    "ReinforceAdjointMatching",
    "Rollout",
    "Rows",
    "ScoreAsAction",
    "ScoreAsActionReleased",
    "ScoreAsActionSampled",
    "TDPOReset",
    "TiltedRegression",
    "ZerothOrderAdjointMatching",
]
