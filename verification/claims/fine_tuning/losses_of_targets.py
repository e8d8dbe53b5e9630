"""Losses by preferences, weights and adjoints, as a run takes them, against their formulas.

D3PO: -log sigmoid(beta (clip L_w - clip L_l)), L = log p_th / p_pre of a step; dense reward:
Plackett and Luce's order of means over steps; tilted regression w |u|^2 / 2 - (w - c) u.z;
adjoint matching 1/2 |c^(1/2) (score - pretrained) + c^(-1/2) gain a / b|^2, a the lean adjoint
at the end of the step.

Rows, model and sampler are those of `losses-of-steps`; the lean adjoint is carried by Jacobians by
hand.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ctrl.noise import stream
from diffusion_envs import objectives
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.closed_form.objectives import Steps, clip
from verification.problems import losses as case

SOURCE = (
    "arXiv 2311.13231 (D3PO), 2402.08265 (dense reward), 1505.01874 (tilted regression), "
    "2409.08861 (adjoint matching)"
)

KL_WEIGHT, BETA, CLIP = 1.7, 0.8, 0.25


def _pairs(beta: float, low: float, high: float) -> Callable[[Steps], np.ndarray]:
    preference = case.PREFERENCES[case.which(2)[:, 0]]
    return lambda rows: exact.preferred_pairs(
        clip(rows.log_ratio(rows.pretrained), low, high), preference, beta
    )


def _order(compared: int, beta: float, width: float) -> Callable[[Steps], np.ndarray]:
    preference = case.PREFERENCES.reshape(-1, 3)

    def losses(rows: Steps) -> np.ndarray:
        ratio = clip(rows.log_ratio(rows.pretrained), -width, width).reshape(-1, case.STEPS, 3)
        logits = beta * ratio.mean(1)
        each = [
            exact.plackett_luce(one, likes, compared)
            for one, likes in zip(logits, preference, strict=True)
        ]
        return np.repeat(np.array(each), 3 * case.STEPS)

    return losses


def _tilted(rows: Steps) -> np.ndarray:
    control = (rows.gain / rows.std)[:, None] * (rows.mean - rows.old)
    square, linear = np.sum(control**2, axis=1), np.sum(control * rows.noise, axis=1)
    return 0.5 * rows.advantage * square - (rows.advantage - 0.6) * linear


def _matched(slopes: np.ndarray, path_kl: bool = False) -> Callable[[Steps], np.ndarray]:
    path, step = case.which(1).T
    adjoint = case.adjoints(slopes)[path, step + 1]

    def losses(rows: Steps) -> np.ndarray:
        cost = rows.kl_factor * rows.size if path_kl else (rows.gain / rows.std) ** 2
        root = np.sqrt(cost)[:, None]
        wanted = rows.gain[:, None] * adjoint / (KL_WEIGHT * root)
        return 0.5 * np.sum((root * (rows.mean - rows.pretrained) + wanted) ** 2, axis=1)

    return losses


REWARD_SLOPES = exact.slope(case.reward, case.STATES[:, -1])


def by_queries(setting: Setting, pairs: int, width: float) -> np.ndarray:
    """Differences of the reward either side of the last states, along drawn normals."""
    generator = stream(setting.seed, "own losses", "targets")
    z = np.stack(
        [torch.randn(pairs, case.DIM, generator=generator).numpy() for _ in range(case.PATHS)]
    )
    z, x = z.astype(float), case.STATES[:, -1][:, None]
    differences = (case.reward(x + width * z) - case.reward(x - width * z)) / (2 * width)
    return np.mean(differences[:, :, None] * z, axis=1)


COMPARED: dict[str, tuple[Any, Callable[[Steps], np.ndarray]]] = {
    "D3PO": (objectives.D3PO(beta=BETA, clip=CLIP), _pairs(BETA, -CLIP, CLIP)),
    "D3PO, published clip": (
        objectives.D3PO(beta_per_pixel=2.1, clip_per_pixel=0.09),
        _pairs(2.1 / case.DIM, case.DIM * np.log(1 - 0.09), case.DIM * np.log(1 + 0.09)),
    ),
    "dense reward": (
        objectives.DenseReward(members=3, beta=BETA, clip=CLIP),
        _order(2, BETA, CLIP),
    ),
    "dense reward, whole orders, published clip": (
        objectives.DenseReward(members=3, compared=3, beta_per_pixel=2.1, clip_per_pixel=0.09),
        _order(3, 2.1 / case.DIM, 0.09 * case.DIM),
    ),
    "tilted regression": (objectives.TiltedRegression(control_variate=0.6), _tilted),
    "adjoint matching": (objectives.AdjointMatching(kl_weight=KL_WEIGHT), _matched(REWARD_SLOPES)),
    "adjoint matching by path KL": (
        objectives.AdjointMatching(kl_weight=KL_WEIGHT, path_kl=True),
        _matched(REWARD_SLOPES, path_kl=True),
    ),
}


def checks(setting: Setting) -> Iterator[Check]:
    """Losses of all rows, and their slopes in the current scores."""
    for name, (objective, formula) in COMPARED.items():
        got = case.shipped(setting, objective)
        yield pathwise(name, got, case.value_and_slope(formula, objective.group))

    queries = objectives.ZerothOrderAdjointMatching(kl_weight=KL_WEIGHT, pairs=5, width=0.3)
    formula = _matched(by_queries(setting, 5, 0.3))
    got = case.shipped(setting, queries)
    yield pathwise("adjoint matching by queries", got, case.value_and_slope(formula))


MISTAKES = r"""
diffusion_envs.objectives.path_steps.reference_log_ratio
    log-ratio to the pretrained: sign | ((own - other) * noise => ((other - own) * noise
    log-ratio to the pretrained: 1/2 missing | 0.5 * (own.square() => 1.0 * (own.square()
    log-ratio to the pretrained: variance | rows.score_gain / rows.std => rows.score_gain / rows.std**2
diffusion_envs.objectives.d3po.D3PO.loss
    D3PO: loser preferred | (first - second).sign() => (second - first).sign()
    D3PO: beta forgotten | beta * (first => (first
    D3PO: learned from ties | torch.where(first == second, 0 * loss, loss) => loss
diffusion_envs.objectives.d3po.D3PO.trusted
    D3PO: clip of a pixel on the sum | coordinates(rows) * low, coordinates(rows) * high => low, high
diffusion_envs.objectives.d3po.preference_of
    preferences of other paths | [steps.path] => [steps.path.flip(0)]
diffusion_envs.objectives.dense_reward.plackett_luce
    dense reward: worst first | descending=True => descending=False
    dense reward: sums over what is better | .flip(-1).logcumsumexp(-1).flip(-1) => .logcumsumexp(-1)
diffusion_envs.objectives.dense_reward.DenseReward.loss
    dense reward: sum over steps | .mean(1)\n        preference => .sum(1)\n        preference
    dense reward: learned from ties | torch.where(tied, 0 * losses, losses) => losses
diffusion_envs.objectives.dense_reward.DenseReward.half_width
    dense reward: clip of a pixel on the sum | trusted_width(rows, self.clip_per_pixel, self.clip_per_pixel)
        => trusted_width(rows, self.clip_per_pixel, None)
diffusion_envs.objectives.tilted_regression.TiltedRegression.loss
    tilted regression: 1/2 missing | 0.5 * weight => weight
    tilted regression: control variate's sign | weight - self.control_variate => weight + self.control_variate
    tilted regression: control in units of the state | rows.score_gain / rows.std => rows.score_gain
diffusion_envs.objectives.adjoint_matching.AdjointMatching.targets
    adjoint at the beginning of the step | adjoint[:, 1:] => adjoint[:, :-1]
    adjoint carried by the fine-tuned model | with model.pretrained(): => if True:
diffusion_envs.objectives.adjoint_matching.AdjointMatching.loss
    adjoint matching: factor 14 | return 0.5 => return 7.0
    adjoint matching: path KL without eta | rows.kl_factor * rows.step_size => rows.step_size
diffusion_envs.environment.Environment.pretrained_mean
    adjoint carried by the fine-tuned model | with self.model.pretrained(): => if True:
    adjoint carried by another step | self.steps.mean(which => self.steps.mean(0 * which
diffusion_envs.environment.Environment.reward_gradient_by_queries
    by queries: width forgotten | (2 * width * pairs) => (2 * pairs)
    by queries: sum over pairs | (2 * width * pairs) => (2 * width)
    by queries: one side | above - below => above
shared
    control not in units of the noise, in loss
    b for 1/b, in loss
    Jacobian at the next state
    reward gradient not carried back
    sign of the adjoint
"""
