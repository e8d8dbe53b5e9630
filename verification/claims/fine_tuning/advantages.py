"""What each method takes a step, or a sample, to be worth: against formulas by sums.

In a group (or prompt): (r - mean) / (std + offset), std the population's; ranks, ties halved;
parts sum_k w_k A_k / |w|; clipped. Score as action: sum_j e^{-rate (t_j - t_k)} (V_{j+1} -
V_j - b cost_j), centred over paths. DPOK: r - V_k - b cost of later steps; TDPO the same,
standardised over paths and steps. Tilts: n e^{r/b} / sum; RAM: r less the mean of the others.

The roll-out is that of `losses-of-steps`, with prompts of one, two and three paths; weights of dual
averaging are those of the average of all first variations, written as a sum.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffusion_envs import objectives
from diffusion_envs.preferences import FromReward
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.problems import losses as case

SOURCE = (
    "arXiv 2305.13301 (DDPO), 2505.05470 (GRPO), 2601.05242 (parts), 2305.16381 (DPOK), "
    "2402.08552 (TDPO), 2502.01819, 2509.16117 (NFT), 2502.02954, 2605.10759"
)

B, CLIP = 0.9, 1.1
PAIRS = np.arange(case.PATHS) // 2
TRIPLES = np.arange(case.PATHS) // 3


def every_step(of_paths: np.ndarray) -> np.ndarray:
    """The same at every step."""
    return np.repeat(of_paths[:, None], case.STEPS, axis=1)


def _clipped(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -CLIP, CLIP)


def _of_prompts(least: int) -> np.ndarray:
    own = exact.in_groups(case.REWARDS, case.PROMPTS, lambda r: exact.z_scores(r, 1e-6))
    count = np.array([sum(prompt == case.PROMPTS) for prompt in case.PROMPTS])
    return _clipped(np.where(count < least, exact.z_scores(case.REWARDS, 1e-6), own))


def _of_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return exact.in_groups(rewards, groups, lambda r: exact.z_scores(r, 1e-4))


def _of_all(rewards: np.ndarray) -> np.ndarray:
    centred = exact.in_groups(rewards, TRIPLES, lambda r: r - sum(r) / 3)
    return centred / (np.std(rewards) + 1e-4)


def _parts() -> np.ndarray:
    weights = np.array(list(case.PART_WEIGHTS.values()))
    each = [_of_groups(part, TRIPLES) for part in case.PARTS.T]
    return weights @ each / np.sqrt(np.sum(weights**2))


def _centred(rate: float, b: float) -> np.ndarray:
    gains = exact.generalised_advantages(case.VALUES, -b * case.COSTS, case.SIZES, rate)
    return gains - sum(gains) / case.PATHS


def _released() -> np.ndarray:
    gains = case.VALUES[:, 1:] - case.VALUES[:, :-1]
    std = np.sqrt(np.sum((gains - sum(gains) / case.PATHS) ** 2, axis=0) / (case.PATHS - 1))
    return _clipped((gains - sum(gains) / case.PATHS) / (std + 1e-8))


def _later(k: int) -> np.ndarray:
    return sum((case.COSTS[:, j] for j in range(k + 1, case.STEPS)), np.zeros(case.PATHS))


DPOK = case.REWARDS[:, None] - case.VALUES[:, :-1]
DPOK_CHARGED = DPOK - B / 3.2 * np.stack([_later(k) for k in range(case.STEPS)], axis=1)
TDPO = (DPOK - DPOK.sum() / DPOK.size) / np.sqrt(
    np.sum((DPOK - DPOK.sum() / DPOK.size) ** 2) / (DPOK.size - 1)
)


def _tilts(prompts: np.ndarray, variation: Callable[..., Any], rounds: int) -> np.ndarray:
    return exact.in_groups(
        case.REWARDS, prompts, lambda r: exact.dual_averaging(r, variation, B, rounds)
    )


def _others(r: np.ndarray) -> np.ndarray:
    return r - (sum(r) - r) / (len(r) - 1) if len(r) > 1 else r


LONE = case.PROMPTS == 2  # its baseline is the mean of all others
RAM = np.where(
    LONE,
    case.REWARDS - (sum(case.REWARDS) - case.REWARDS) / 5,
    exact.in_groups(case.REWARDS, case.PROMPTS, _others),
)
NFT = exact.in_groups(case.REWARDS, case.PROMPTS, lambda r: r - sum(r) / len(r)) / (
    np.std(case.REWARDS) + 1e-4
)
GRPO = {"group": 3, "advantage_clip": CLIP}
COMPARED: dict[str, tuple[Any, np.ndarray]] = {
    "DDPO, by prompt": (objectives.DDPO(advantage_clip=CLIP), every_step(_of_prompts(2))),
    "DDPO, small prompts by all": (
        objectives.DDPOScoreFunction(advantage_clip=CLIP, min_count=3),
        every_step(_of_prompts(3)),
    ),
    "GRPO": (objectives.GRPO(**GRPO), every_step(_clipped(_of_groups(case.REWARDS, TRIPLES)))),
    "GRPO, the batch's deviation": (
        objectives.GRPO(whole_batch_std=True, **GRPO),
        every_step(_clipped(_of_all(case.REWARDS))),
    ),
    "GRPO by parts": (objectives.GRPO(advantage="parts", **GRPO), every_step(_clipped(_parts()))),
    "score as action": (objectives.ScoreAsAction(kl_weight=B, gae_rate=0.6), _centred(0.6, B)),
    "score as action, one step ahead": (
        objectives.ScoreAsAction(kl_weight=B, gae_rate=np.inf),
        _centred(1e4, B),
    ),
    "score as action, drawn": (
        objectives.ScoreAsActionSampled(kl_weight=0.0, gae_rate=0.6),
        _centred(0.6, 0.0),
    ),
    "score as action, released": (
        objectives.ScoreAsActionReleased(advantage_clip=CLIP),
        _released(),
    ),
    "DPOK": (objectives.DPOK(kl_weight=B), DPOK),
    "DPOK, charged the path KL": (
        objectives.DPOK(kl_weight=B, reward_weight=3.2, path_kl=True),
        DPOK_CHARGED,
    ),
    "TDPO": (objectives.TDPO(), TDPO),
    "tilted regression": (
        objectives.TiltedRegression(kl_weight=B),
        every_step(_tilts(case.PROMPTS, lambda r, q: r, 1)),
    ),
    "distributional optimisation": (
        objectives.DistributionalOptimisation(kl_weight=B, rounds=3),
        _tilts(case.PROMPTS, lambda r, q: r, 1),
    ),
    "distributional optimisation, near a target": (
        objectives.DistributionalOptimisation(
            kl_weight=B, rounds=7, first_variation=objectives.NearTarget(0.5)
        ),
        _tilts(case.PROMPTS, lambda r, q: (0.5 - sum(q * r)) * r, 7),
    ),
    "RAM": (objectives.ReinforceAdjointMatching(), RAM),
    "NFT": (objectives.DiffusionNFT(), NFT),
    "Diffusion-DPO": (objectives.DiffusionDPO(), np.sign([0.6, -0.6, -0.6, 0.6, 0.0, 0.0])),
} | {
    f"none: {kind.__name__}": (kind(), np.zeros((case.PATHS, case.STEPS)))
    for kind in (
        objectives.D3PO,
        objectives.DenseReward,
        objectives.AdjointMatching,
        objectives.DxMI,
    )
}


def checks(setting: Setting) -> Iterator[Check]:
    """Advantages of all paths and steps."""
    for name, (objective, want) in COMPARED.items():
        got = objective.advantages(case.rollout(setting, objective.group))
        yield pathwise(name, got, want, scale=1.0 if not np.any(want) else None)

    ties = case.REWARDS[[0, 1, 0, 3, 4, 5]]
    tied = replace(case.rollout(setting, 3), rewards=setting.tensor(ties))
    objective = objectives.GRPO(advantage="ranks", **GRPO)
    places = [exact.ranks(r) for r in ties.reshape(2, 3)]
    want = np.concatenate([(r - 1) / np.std(r) for r in places])
    yield pathwise("GRPO by ranks", objective.advantages(tied), every_step(_clipped(want)))
    chosen = FromReward()(torch.zeros(case.PATHS), [], tied.rewards, range(case.PATHS), 3)
    yield pathwise("preferences of rewards", chosen, np.concatenate(places))


MISTAKES = r"""
diffusion_envs.objectives.protocol.per_prompt
    one prompt's statistics for all | one = condition == prompt => one = condition >= prompt
diffusion_envs.rewards.rounding.standardised
    not centred | (rewards - rewards.mean(-1, keepdim=True)) => rewards
diffusion_envs.rewards.rounding.floored_std
    sample's deviation for the population's | correction=0 => correction=1
diffusion_envs.rewards.rounding.ranks
    ranks: ties count whole | 0.5).sum(-1) - 0.5 => 1.0).sum(-1) - 1.0
    ranks: the smallest reward first | (above > 0) => (above < 0)
diffusion_envs.objectives.ddpo.standardised
    small prompts by themselves | count < min_count => count < 0
diffusion_envs.objectives.ddpo._DDPO.advantages
    DDPO: not clipped | rewards.clamp(-self.advantage_clip, self.advantage_clip) => rewards
diffusion_envs.objectives.grpo.group_advantages
    GRPO: mean of all | by_group.mean(1, keepdim=True) => by_group.mean()
    GRPO: offset forgotten | (floored_std(rewards) + STD_OFFSET) => floored_std(rewards)
diffusion_envs.objectives.grpo.part_advantages
    GRPO: parts summed, not normalised | total / math.hypot(*weights) => total
    GRPO: parts of equal weight | total += weight * group => total += group
diffusion_envs.objectives.grpo.rank_advantages
    GRPO: ranks of all | rewards.view(-1, group) => rewards.view(1, -1)
diffusion_envs.objectives.grpo.GroupRelative.advantages
    GRPO: not clipped | .clamp(-self.advantage_clip, self.advantage_clip) => ``
diffusion_envs.objectives.score_as_action._ContinuousTime.advantages
    KL cost charged with the other sign | -self.kl_weight * rollout => self.kl_weight * rollout
    not centred over paths | gains - gains.mean(0) => gains
    centred over steps | gains - gains.mean(0) => gains - gains.mean(1, keepdim=True)
diffusion_envs.objectives.score_as_action.ScoreAsActionReleased.advantages
    released: values, not their differences | rollout.values.diff(dim=1) => rollout.values[:, 1:]
    released: over all steps at once | gains.std(0) => gains.std()
diffusion_envs.objectives.dpok.DPOK.advantages
    DPOK: value of the next state | rollout.values[:, :-1] => rollout.values[:, 1:]
    DPOK: the step's own cost charged twice | ` - rollout.costs` => ``
diffusion_envs.objectives.dpok.DPOK.cost_weight
    DPOK: cost in the loss's units | self.kl_weight / self.reward_weight => self.kl_weight
diffusion_envs.objectives.tdpo.TDPO.advantages
    TDPO: standardised step by step | gains.std() => gains.std(0)
    TDPO: value of the next state | rollout.values[:, :-1] => rollout.values[:, 1:]
diffusion_envs.objectives.tilted_regression.tilt_weights
    tilt: b for 1/b | host[one] / kl_weight => host[one] * kl_weight
    tilt: weights of sum 1 | int(one.sum()) * (host => (host
diffusion_envs.objectives.distributional.dual_averaging
    dual averaging: equal weights of the average | 2 / (k + 1) => 1 / k
    dual averaging: the last variation alone | 2 / (k + 1) => 1.0
    dual averaging: b for 1/b | potential / kl_weight => potential * kl_weight
diffusion_envs.objectives.distributional.NearTarget.__call__
    near a target: sign | self.target - weights => weights - self.target + 2 * 0 * weights
diffusion_envs.objectives.distributional.mean_reward
    mean reward: twice | return rewards => return 2 * rewards
diffusion_envs.objectives.distributional.DistributionalOptimisation.advantages
    distributional: weights of sum 1 | len(rewards) * weights => weights
diffusion_envs.objectives.ram.without_others_mean
    RAM: a sample in its own baseline | (values.sum() - values) / (len(values) - 1) => values.mean() + 0 * values
    RAM: baseline of all prompts | if int(one.sum()) > 1: => if False:
diffusion_envs.objectives.nft.DiffusionNFT.advantages
    NFT: mean of all prompts | rewards[one] - rewards[one].mean() => rewards[one] - rewards.mean()
    NFT: deviation of the prompt | (floored_std(rewards) + STD_OFFSET) => (floored_std(centred) + STD_OFFSET)
diffusion_envs.objectives.diffusion_dpo.DiffusionDPO.advantages
    Diffusion-DPO: both members preferred | [sign, -sign] => [sign, sign]
diffusion_envs.objectives.d3po.D3PO.advantages
    advantages of something | torch.zeros_like => torch.ones_like
diffusion_envs.objectives.dense_reward.DenseReward.advantages
    advantages of something | torch.zeros_like => torch.ones_like
diffusion_envs.objectives.adjoint_matching.AdjointMatching.advantages
    advantages of something | torch.zeros_like => torch.ones_like
diffusion_envs.objectives.dxmi._ByValue.advantages
    advantages of something | torch.zeros_like => torch.ones_like
shared
    value of step i for i + 1
    infinite rate taken for 0
"""
