"""The KL-reward frontier from samples of the pretrained model: what it is, its errors, its use.

The estimate is held against definitions, one sample after the other; what it tends to against
closed forms, on quantiles of known laws; its bias against sums over all outcomes; and what it says
of runs against optima of chains, which come from dynamic programming.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

from diffusion_envs.exact import GaussianProblem, MixtureProblem
from diffusion_envs.frontier import Frontier, FrontierPoint
from verification.claim import Setting
from verification.closed_form.gaussian_law import Normal, Quadratic


def frontier_of(setting: Setting, groups: Sequence[np.ndarray], resamples: int = 20) -> Frontier:
    """The estimate, from the rewards of each prompt."""
    names = [name for name, rewards in enumerate(groups) for _ in rewards]
    rewards = torch.as_tensor(np.concatenate(groups))
    return Frontier(rewards, names, resamples=resamples, generator=setting.generator("resamples"))


def numbers(point: FrontierPoint) -> list[float]:
    """Reward, KL and objective."""
    return [point.reward.mean, point.kl.mean, point.objective.mean]


def quantiles(n: int) -> np.ndarray:
    """Of the standard normal law: n samples that stand for it."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n)


def plane(law: Normal, side: int) -> np.ndarray:
    """side^2 points that stand for a normal law in two dimensions."""
    z = np.stack(np.meshgrid(quantiles(side), quantiles(side)), -1).reshape(-1, 2)
    return law.mean + z @ np.linalg.cholesky(law.covariance).T


def rewards_of(reward: Quadratic, points: np.ndarray) -> np.ndarray:
    """Of rows of points."""
    return np.asarray(reward(points))


GAUSSIAN, MIXTURE = GaussianProblem(), MixtureProblem()
QUADRATIC = Quadratic(np.array(GAUSSIAN.curvature), np.array(GAUSSIAN.slope), 0.0)
