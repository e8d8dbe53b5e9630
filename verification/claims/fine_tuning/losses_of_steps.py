"""Policy gradients' losses of single steps, as a run takes them, against their formulas.

With L = log p_th(x'|x) - log p_old(x'|x) of the step's normal laws, A its advantage and KL
that from the pretrained step: DDPO -min(rho A, clip(rho) A), rho = e^L; GRPO the same +
b KL; GRPO-Guard normalises L and weighs steps by 1 / length; Flow-DPPO masks by KL(old || th);
DPOK truncates and charges |epsilon - epsilon_pre|^2; PCPO is linear in L; TDPO is
DDPO with a critic.

The rows are those that ``PathLosses`` makes of a roll-out of numbers, with the environment's model
and DDIM's tables; the formulas are written in numpy from the densities, their slopes in the current
score are complex steps. Log-ratios lie on both sides of every clip.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffusion_envs import objectives
from verification.claim import Check, Setting, array, pathwise
from verification.closed_form import objectives as exact
from verification.closed_form.objectives import Steps, clip, least, ppo
from verification.problems import losses as case

SOURCE = (
    "arXiv 2305.13301 (DDPO), 2505.05470 and 2505.07818 (GRPO), 2510.22319 (GRPO-Guard), "
    "2606.11025 (Flow-DPPO), 2305.16381 (DPOK), 2509.25774 (PCPO), 2402.08552 (TDPO), 2502.01819"
)

CLIP, KL_WEIGHT, MOST, MOST_OF_PATH = 0.6, 1.7, 0.2, 0.9


@dataclass(frozen=True)
class Compared:
    """An objective with numbers for its settings, and its formula."""

    objective: Any
    formula: Callable[[Steps], np.ndarray]

    @property
    def group(self) -> int:
        """Members of a group."""
        return self.objective.group


def _ratio(rows: Steps) -> np.ndarray:
    return rows.log_ratio(rows.old)


def _kl(rows: Steps) -> np.ndarray:
    return KL_WEIGHT * rows.kl(rows.pretrained)


def _at(per_step: np.ndarray, group: int = 1) -> np.ndarray:
    return per_step[case.which(group)[:, 1]]


def _guard(rows: Steps) -> np.ndarray:
    lengths = -np.diff(case.NODES.s)
    scale = case.STD / np.mean(case.STD)
    weight = 1 / lengths
    weight = weight / np.mean(weight * scale)
    shift = rows.kl(rows.old)  # half a square of the mean's shift, in standard deviations
    normalised = _at(scale, 2) * (_ratio(rows) + shift)
    return _kl(rows) - _at(weight, 2) * ppo(normalised, rows.advantage, CLIP)


def _per_path(rows: Steps) -> np.ndarray:
    each = rows.kl(rows.old).reshape(-1, len(case.STD), 2)
    paths = np.broadcast_to(each.sum(1, keepdims=True), each.shape).ravel()
    return _kl(rows) - exact.masked_ratio(rows, paths, MOST_OF_PATH)


def _pcpo(rows: Steps) -> np.ndarray:
    weights = case.SCORE_GAIN / (case.STD * case.NODES.sigma[:-1])
    credit = _at(np.mean(weights) / weights, 2)
    most = CLIP * np.abs(rows.advantage)
    gain = rows.advantage + least(rows.advantage * _ratio(rows), most)
    return _kl(rows) - credit * gain


def _dpok(penalty: Callable[[Steps], np.ndarray]) -> Callable[[Steps], np.ndarray]:
    return lambda rows: (
        KL_WEIGHT * penalty(rows) - 3.2 * np.exp(clip(_ratio(rows), -CLIP, CLIP)) * rows.advantage
    )


def _noise_gap(rows: Steps) -> np.ndarray:
    gap = _at(case.NODES.sigma)[:, None] * (rows.mean - rows.pretrained)
    return np.sum(gap**2, axis=1)


GROUPED: dict[str, Any] = {"group": 2, "kl_weight": KL_WEIGHT}
COMPARED = {
    "DDPO by the score function": Compared(
        objectives.DDPOScoreFunction(), lambda rows: -_ratio(rows) * rows.advantage
    ),
    "DDPO": Compared(
        objectives.DDPO(clip=CLIP), lambda rows: -ppo(_ratio(rows), rows.advantage, CLIP)
    ),
    "DDPO, the clip per pixel": Compared(
        objectives.DDPO(clip_per_pixel=0.11),
        lambda rows: -ppo(_ratio(rows), rows.advantage, 0.11 * case.DIM),
    ),
    "GRPO": Compared(
        objectives.GRPO(clip=CLIP, **GROUPED),
        lambda rows: _kl(rows) - ppo(_ratio(rows), rows.advantage, CLIP),
    ),
    "GRPO-Guard": Compared(objectives.GRPOGuard(clip=CLIP, **GROUPED), _guard),
    "Flow-DPPO": Compared(
        objectives.FlowDPPO(max_kl=MOST, **GROUPED),
        lambda rows: _kl(rows) - exact.masked_ratio(rows, rows.kl(rows.old), MOST),
    ),
    "Flow-DPPO, per path": Compared(
        objectives.FlowDPPO(max_kl=MOST_OF_PATH, per_path=True, **GROUPED), _per_path
    ),
    "PCPO": Compared(objectives.PCPO(clip=CLIP, **GROUPED), _pcpo),
    "DPOK": Compared(
        objectives.DPOK(clip=CLIP, kl_weight=KL_WEIGHT, reward_weight=3.2), _dpok(_noise_gap)
    ),
    "DPOK with the transition's KL": Compared(
        objectives.DPOK(clip=CLIP, kl_weight=KL_WEIGHT, reward_weight=3.2, exact_kl=True),
        _dpok(lambda rows: rows.kl(rows.pretrained)),
    ),
    "DPOK with the path KL": Compared(
        objectives.DPOK(clip=CLIP, kl_weight=KL_WEIGHT, reward_weight=3.2, path_kl=True),
        _dpok(lambda rows: rows.path_kl),
    ),
    "TDPO": Compared(
        objectives.TDPO(clip=CLIP), lambda rows: -ppo(_ratio(rows), rows.advantage, CLIP)
    ),
    "TDPO-R": Compared(
        objectives.TDPOReset(clip_per_pixel=0.11),
        lambda rows: -ppo(_ratio(rows), rows.advantage, 0.11 * case.DIM),
    ),
}


def checks(setting: Setting) -> Iterator[Check]:
    """Losses of all rows, and their slopes in the current scores."""
    for name, compared in COMPARED.items():
        got = case.shipped(setting, compared.objective)
        yield pathwise(name, got, case.value_and_slope(compared.formula, compared.group))

    groups = torch.arange(case.PATHS // 2)
    every = np.tile(np.arange(len(case.STD)), (case.PATHS // 2, 1))
    for name in ("GRPO", "Flow-DPPO, per path"):
        objective = COMPARED[name].objective
        made = replace(case.update(setting, objective, batch=5), train_steps=len(case.STD))
        losses = objective.losses_of(made)
        drawn = losses._steps(len(groups), len(case.STD), made.stream("steps"))
        yield pathwise(f"{name}: steps, each once", np.sort(drawn.numpy()), every)
        advantages = array(losses.advantages)[tuple(case.which(2).T)]
        rows = replace(case.numbers(2), advantage=advantages)
        mean = np.sum(COMPARED[name].formula(rows)) / case.PATHS
        mean = mean if name == "GRPO" else mean / len(case.STD)
        total = sum(losses.losses(groups, made.stream("steps")))
        assert isinstance(total, torch.Tensor)
        yield pathwise(f"{name}: mean over paths, in pieces", total, mean)


MISTAKES = r"""
diffusion_envs.objectives.path_steps.transition_log_ratio
    log-ratio without its square | - 0.5 * shift => - 0 * shift
    log-ratio: variance for standard deviation | rows.score_gain / rows.std => rows.score_gain / rows.std**2
diffusion_envs.objectives.path_steps.transition_kl
    KL fourteen times | return 0.5 * => return 7.0 *
    KL from the old policy | rows.mean - _reference(rows) => rows.mean - rows.old_mean
diffusion_envs.objectives.path_steps.trusted_width
    clip per pixel not times the pixels | clip_per_pixel * coordinates(rows) => clip_per_pixel
diffusion_envs.objectives.path_steps.PathLosses.rows
    noise of another path | noise=stored("noises") => noise=stored("noises").flip(0)
diffusion_envs.objectives.path_steps.PathLosses.losses
    sum over rows for their mean | .sum() * steps / len(which) => .sum() * steps
    steps of a joined path counted twice | `            steps = 1\n` => `            pass\n`
diffusion_envs.objectives.path_steps.PathLosses._steps
    steps drawn with replacement | .argsort(1)[:, :used] => .mul(steps).long()[:, :used]
diffusion_envs.objectives.ddpo.DDPOScoreFunction.loss
    score function: sign | return -transition => return transition
diffusion_envs.objectives.ddpo.DDPO.loss
    DDPO: sign | return -clipped => return clipped
diffusion_envs.objectives.grpo.GroupRelative.kl_cost
    GRPO: weight of the KL | self.kl_weight * transition => transition
diffusion_envs.objectives.grpo.GRPO.loss
    GRPO: sign of the gain | (rows) - gain => (rows) + gain
diffusion_envs.objectives.grpo_guard.GRPOGuard.rows
    Guard: not of mean 1 | (scale / time).mean() => scale.mean()
    Guard: longer steps weigh more | 1 / (time * (scale / time).mean()) => time / (scale * time).mean()
diffusion_envs.objectives.grpo_guard.GRPOGuard.normalised
    Guard: not normalised | rows.scale * (shift => (shift
diffusion_envs.objectives.grpo_guard.GRPOGuard.loss
    Guard: steps not weighed | rows.weight * gain => gain
diffusion_envs.objectives.flow_dppo.FlowDPPO.divergence
    Flow-DPPO: divergence without 1/2 | 0.5 * shift => shift
    Flow-DPPO: a step's mean for the path | rows.steps * of_paths => of_paths
diffusion_envs.objectives.flow_dppo.FlowDPPO.masked
    Flow-DPPO: what leads back is masked | * rows.advantage > 0 => * rows.advantage < 0
diffusion_envs.objectives.flow_dppo.FlowDPPO.loss
    Flow-DPPO: no importance weight | .exp() => .exp().detach()
diffusion_envs.objectives.pcpo.native_weights
    PCPO: change of the score | ` * sampler.sigma[:-1]` => ``
    PCPO: noise level at the end of the step | sigma[:-1] => sigma[1:]
diffusion_envs.objectives.pcpo.PCPO.rows
    PCPO: credit inverted | weights.mean() / weights if => weights / weights.mean() if
diffusion_envs.objectives.pcpo.PCPO.loss
    PCPO: hinge on the other side | torch.minimum(rows => torch.maximum(rows
diffusion_envs.objectives.dpok.noise_gap
    DPOK: a gap of scores | ` * rows.sigma[:, None]` => ``
diffusion_envs.objectives.dpok.truncated_surrogate
    DPOK: not truncated | .clamp(-half_width, half_width) => ``
diffusion_envs.objectives.dpok.DPOK.loss
    DPOK: reward not weighed | self.reward_weight * gain => gain
diffusion_envs.objectives.tdpo.TDPO.loss
    TDPO: sign | return -clipped => return clipped
shared
    log-ratio averaged over coordinates
    clipped always
    ratio to first order
"""
