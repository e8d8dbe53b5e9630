"""Score as action's losses of single steps, as a run takes them, in both views and as released.

b KL_k - min(rho A, clip(rho) A): KL_k the path KL of the step, ((1 + eta^2) / (2 eta))^2 int g^2
|score - pretrained|^2 / 2; rho the ratio of densities of the next state (view B), or of the drawn
score N(mean, std^2), std = exploration / sigma (view A); its logarithm is clipped at c sqrt(share
of the step in the horizon). As released: no KL, and log rho is a mean over coordinates.

Rows, model and sampler are those of `losses-of-steps`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffusion_envs import objectives
from verification.claim import Check, Setting, pathwise
from verification.closed_form.objectives import Steps, ppo
from verification.problems.losses import ACTION_STD, ACTIONS, DIM, shipped, value_and_slope, which

SOURCE = '"Score as Action", arXiv 2502.01819, Theorems 3.1 and 4.1, and the authors\' code'

CLIP, KL_WEIGHT = 0.6, 1.7


def _ratio(rows: Steps) -> np.ndarray:
    return rows.log_ratio(rows.old)


def _by_share(rows: Steps) -> np.ndarray:
    width = CLIP * np.sqrt(rows.size / rows.horizon)
    return KL_WEIGHT * rows.path_kl - ppo(_ratio(rows), rows.advantage, width)


def _drawn(rows: Steps) -> np.ndarray:
    path, step = which(1).T
    action, std = ACTIONS[path, step], ACTION_STD[step][:, None]
    squares = (action - rows.old) ** 2 - (action - rows.mean) ** 2
    log_ratio = np.sum(squares / (2 * std**2), axis=1)
    width = CLIP * np.sqrt(rows.size / rows.horizon)
    return KL_WEIGHT * rows.path_kl - ppo(log_ratio, rows.advantage, width)


COMPARED: dict[str, tuple[Any, Callable[[Steps], np.ndarray]]] = {
    "score as action": (objectives.ScoreAsAction(clip=CLIP, kl_weight=KL_WEIGHT), _by_share),
    "score as action, the clip per pixel": (
        objectives.ScoreAsAction(clip_per_pixel=0.11, kl_weight=KL_WEIGHT),
        lambda rows: KL_WEIGHT * rows.path_kl - ppo(_ratio(rows), rows.advantage, 0.11 * DIM),
    ),
    "score as action, drawn": (
        objectives.ScoreAsActionSampled(clip=CLIP, kl_weight=KL_WEIGHT, exploration=0.35),
        _drawn,
    ),
    "score as action, released": (
        objectives.ScoreAsActionReleased(clip_per_pixel=0.11),
        lambda rows: -ppo(_ratio(rows) / DIM, rows.advantage, 0.11),
    ),
}


def checks(setting: Setting) -> Iterator[Check]:
    """Losses of all rows, and their slopes in the current scores."""
    for name, (objective, formula) in COMPARED.items():
        yield pathwise(name, shipped(setting, objective), value_and_slope(formula))


MISTAKES = r"""
diffusion_envs.objectives.path_steps.PathLosses.rows
    horizon of one step | rollout.step_sizes.sum() => rollout.step_sizes[0]
    step sizes not shuffled | rollout.step_sizes[step] => rollout.step_sizes[step.sort()[0]]
diffusion_envs.objectives.path_steps.path_kl_rate
    path KL without the step | ` * rows.step_size` => ``
diffusion_envs.objectives.score_as_action._ContinuousTime.half_width
    clip the same at every step | * (rows.step_size / rows.horizon).sqrt() => + 0 * rows.step_size
    clip by the share itself | (rows.step_size / rows.horizon).sqrt() => (rows.step_size / rows.horizon)
diffusion_envs.objectives.score_as_action._ContinuousTime._kl_cost
    score as action: half the KL | self.kl_weight * path => 0.5 * self.kl_weight * path
diffusion_envs.objectives.score_as_action.drawn_log_ratio
    drawn: 1/2 missing | 0.5 * shift => shift
    drawn: as if the mean had been drawn | (rows.action - rows.old_mean) => (rows.mean - rows.old_mean)
diffusion_envs.objectives.score_as_action.ScoreAsActionSampled.action_std
    drawn: exploration in units of the score | self.exploration / sigma => self.exploration + 0 * sigma
diffusion_envs.objectives.score_as_action.ScoreAsActionSampled.loss
    drawn: sign of the gain | - self._gain => + self._gain
diffusion_envs.objectives.score_as_action.ScoreAsActionReleased.log_ratio
    released: sum over coordinates | ` / coordinates(rows)` => ``
diffusion_envs.objectives.score_as_action.ScoreAsActionReleased.loss
    released: sign | return -clipped => return clipped
shared
    path KL of full noise
    clipped always
    lower end of the range missing
    ratio to first order
"""
