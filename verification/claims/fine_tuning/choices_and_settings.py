"""Which sample is preferred, how often a step is drawn, and what an objective tells the loop.

Rewards within 128 spacings of floats tie; people who are not sure choose by r + T g, g Gumbel's
noise, so that one of two wins with probability sigmoid(difference / T). Dense reward draws step
k with probability proportional to discount^k. A reward per nat is b of J = E[r] - b KL where a
method has one; policies that sample follow the trained one by a decay, or never.

Noise of choices has a name for each sample: the same in any batch.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ctrl.noise import stream
from diffusion_envs import objectives
from diffusion_envs.preferences import BradleyTerry, compare
from diffusion_envs.rewards.rounding import ranks
from verification.claim import Check, Setting, expectation, pathwise
from verification.problems.losses import PATHS, REWARDS, STEPS, rollout

SOURCE = "arXiv 2402.08265 (dense reward), 2509.16117 (NFT); Luce 1959, individual choice behavior"

B = 0.9
# what the loop is told: reward per nat, old policy kept after an update, rates, their decay
TOLD: list[tuple[Any, list[float]]] = [
    (objectives.DDPO(), [np.inf, 0.0, 3e-4, 0.0, 1.0]),
    (objectives.ScoreAsAction(kl_weight=B), [B, 0.0, 3e-3, 0.0, 1.0]),
    (objectives.AdjointMatching(kl_weight=B), [B, 0.0, 1e-3, 0.0, 1.0]),
    (objectives.TiltedRegression(kl_weight=B), [B, 1.0, 1e-3, 0.0, 1.0]),
    (objectives.DistributionalOptimisation(kl_weight=B), [B, 1.0, 1e-3, 0.0, 1.0]),
    (objectives.ReinforceAdjointMatching(kl_weight=B), [B, 0.0, 1e-3, 0.0, 1.0]),
    (objectives.DPOK(kl_weight=B, reward_weight=3.2), [np.inf, 0.0, 1e-5, 0.0, 1.0]),
    (objectives.DPOK(kl_weight=B, reward_weight=3.2, exact_kl=True), [B / 3.2, 0, 1e-5, 0, 1]),
    (objectives.DRaFT(kl_weight=B), [B, 0.0, 1e-3, 0.0, 1.0]),
    (objectives.AlignProp(kl_weight=B), [B, 0.0, 1e-3, 0.0, 1.0]),
    (objectives.DiffusionDPO(), [np.inf, 1.0, 1e-3, 0.0, 1.0]),
    (objectives.DiffusionDPO(online=True), [np.inf, 0.0, 1e-3, 0.0, 1.0]),
    (objectives.DxMI(kl_weight=B, std_rate=0.02), [B, 0.0, 1e-3, 0.02, 1.0]),
    (objectives.ContinuousDxMIReleasedFromData(rate_decay=0.99), [np.inf, 0.0, 3e-7, 0.0, 0.99]),
]


def told(objective: Any) -> list[float]:
    """Those numbers; a reward per nat that there is none of is infinite."""
    per_nat = objective.reward_per_nat
    each = [objective.old_decay(3), *objective.rates, objective.decay]
    return [np.inf if per_nat is None else per_nat, *each]


def _choices(setting: Setting) -> Iterator[Check]:
    """Rewards that rounding may tell apart, and choices of people who are not sure."""
    spacing = torch.finfo(setting.dtype).eps
    near = setting.tensor([[1.0, 1.0 - 100 * spacing, 1.0 - 240 * spacing]])
    yield pathwise("ties within 128 spacings", ranks(near), [[1.5, 1.5, 0.0]])
    made = rollout(setting)
    alike = setting.tensor(1 - spacing * np.linspace(0, 100, PATHS))
    got = objectives.TDPO().advantages(replace(made, rewards=alike))
    yield pathwise("TDPO: nothing of equal rewards", got, np.zeros((PATHS, STEPS)), scale=1.0)
    unsure, rewards = BradleyTerry(temperature=0.7, seed=5), setting.tensor(REWARDS)
    drawn = [
        float(torch.rand((), generator=stream(5, "choice", i), dtype=torch.float64))
        for i in range(PATHS)
    ]
    images = torch.zeros(PATHS)
    got = compare(unsure, images, [""] * PATHS, rewards, range(PATHS), 2)
    yield pathwise("Bradley and Terry's choices", got, REWARDS - 0.7 * np.log(-np.log(drawn)))


def checks(setting: Setting) -> Iterator[Check]:
    """Ties and choices, steps, and what the loop is told."""
    yield from _choices(setting)
    told_all = np.array([told(objective) for objective, _ in TOLD])
    want = np.array([numbers for _, numbers in TOLD])
    yield pathwise("what the loop is told", 1 / (1 + told_all), 1 / (1 + want))

    # the law of steps, as they are drawn: by their probabilities
    weights = objectives.DenseReward(discount=0.8).step_probabilities(STEPS)
    geometric = [0.8**k * (1 - 0.8) / (1 - 0.8**STEPS) for k in range(STEPS)]
    yield expectation("dense reward: probabilities of steps", weights, geometric)  # pyright: ignore[reportArgumentType]  # not None
    nft = objectives.DiffusionNFT(old_decay_rate=0.01, most_old_decay=0.3)
    decays = [nft.old_decay(update) for update in (0, 4, 99)]
    yield pathwise("NFT: what the sampling policy keeps", decays, [0.01, 0.05, 0.3])


MISTAKES = r"""
diffusion_envs.rewards.rounding.rounding
    rounding of half the spacings | return SPACINGS => return 0.5 * SPACINGS
diffusion_envs.preferences.BradleyTerry.__call__
    Bradley-Terry: noise of a normal law's tail | -(-uniform.log()).log() => -uniform.log()
    Bradley-Terry: 1/temperature | + self.temperature * noise => + noise / self.temperature
    Bradley-Terry: one noise for all | stream(self.seed, "choice", i) => stream(self.seed, "choice", 0)
diffusion_envs.objectives.diffusion_dpo.DiffusionDPO.old_decay
    Diffusion-DPO: pairs of the policy as it is | return 0.0 if self.online else 1.0 => return 0.0
diffusion_envs.objectives.dxmi_from_data.ContinuousDxMIReleasedFromData.decay
    rate that does not fall | return self.rate_decay => return 1.0
diffusion_envs.objectives.dpok.DPOK.reward_per_nat
    DPOK: a weight in the loss's units | return self.kl_weight / self.reward_weight => return self.kl_weight
diffusion_envs.objectives.nft.DiffusionNFT.old_decay
    NFT: decay of the update before | (update + 1) => update
diffusion_envs.objectives.dense_reward.DenseReward.step_probabilities
    dense reward: late steps first | self.discount ** torch => (1 / self.discount) ** torch
    dense reward: probabilities not normalised | weights / weights.sum() => weights
"""
