"""No run lies above the frontier: KLs of chains, fixed starts, errors of a run.

No policy's reward is above the frontier over prompts at the KL of the chain that it
samples: the optimum of a chain by dynamic programming is below it, and above it at half its
KL, which is reported as a fault, as is the KL of the SDE that the chain discretises, which
is smaller at few steps. Over pairs (prompt, start), frontier and KL are those of the
optimal process with its initial law fixed, whose path KL is 1/2 int g^2 E|grad V*/b|^2: it
is below the frontier over prompts, as no policy changes the start.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from ctrl.estimate import Estimate
from diffusion_envs.exact import MixtureProblem, Outcome, table
from diffusion_envs.frontier import Excess, Frontier, FrontierPoint
from diffusion_envs.samplers import BoundDDIM
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import frontier as exact
from verification.closed_form import tilt
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.vp_gaussian import SHORT, VPGaussian
from verification.problems import frontier as case
from verification.problems.gaussian_diffusion import START

SOURCE = "data processing inequality; Domingo-Enrich et al. 2024, arXiv 2409.08861, section 4"
WHY_DOUBLE = "the frontier is computed in float64, whatever its rewards come in"

STEPS = 6


class ChainCost(BoundDDIM):
    """DDIM whose KL is that of the chain: (gain / std)^2 for |change of score|^2 / 2."""

    @property
    def kl_factor(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # as on flows
        """Per unit of the clock."""
        return (self.gain / self.std).square() / self.integrated_g2


def charged() -> type[BoundDDIM]:
    """The sampler with the KL that counts: that of its chain."""
    return ChainCost


@cache
def runs(kind: type[BoundDDIM]) -> list[tuple[np.ndarray, Outcome]]:
    """Rewards of what the pretrained chain generates, and the best policy for its KL."""
    sampler, mixture = kind(1.0, table(), STEPS), MixtureProblem()
    gain, shift = case.GAUSSIAN.best_correction(sampler)
    law = case.GAUSSIAN.law_of(0 * gain, 0 * shift, sampler)
    points = case.plane(Normal(law.mean.numpy(), law.covariance.numpy()), 60)
    changes = mixture.best_correction(sampler)
    mass = mixture.law_of(0 * changes, sampler)[0].cumsum(0).numpy()
    at = np.searchsorted(mass / mass[-1], (np.arange(3000) + 0.5) / 3000)
    return [
        (case.rewards_of(case.QUADRATIC, points), case.GAUSSIAN.optimum(sampler)),
        (mixture.rewards.numpy()[at], mixture.optimum(sampler)),
    ]


def judged(frontier: Frontier, reward: float, kl: float, error: float = 0.002) -> Excess:
    """What the frontier says of a run."""
    return frontier.excess(Estimate(reward, error, 1000), Estimate(kl, error, 1000))


def errors_of_a_run(setting: Setting) -> Iterator[Check]:
    """The lower bound of the excess, from its three errors."""
    generator = setting.generator("draws")
    drawn = torch.randn(2000, dtype=torch.float64, generator=generator).numpy()
    frontier, run, kl = case.frontier_of(setting, [drawn]), (1.7, 0.04), (1.1, 0.05)
    got = frontier.excess(Estimate(*run, 100), Estimate(*kl, 100))
    at, z = frontier.at_kl(kl[0]), stats.norm.ppf(0.999)
    longer = z + at.reward.acceleration * (2 * z**2 + 1)
    of_run = z * (run[1] + at.kl_weight * kl[1])
    margin = float(np.hypot(at.reward.standard_error * longer, of_run))
    yield pathwise("excess and its lower bound", [got.mean, got.low], _less(run[0], at, margin))


def _less(reward: float, at: FrontierPoint, margin: float) -> list[float]:
    return [reward - at.reward.mean, reward - at.reward.mean - margin]


# A process that remembers where it starts: from noising time 0.4, where alpha is 0.67.
MEMORY = VPGaussian(SHORT.mean, SHORT.covariance, 2.0, 2.0, horizon=0.4)


def from_fixed_starts(setting: Setting) -> Iterator[Check]:
    """Four starts with the moments of a normal law: values are quadratic, so only they matter."""
    b, end, horizon = 0.9, MEMORY.posterior(MEMORY.horizon), MEMORY.horizon
    root = np.sqrt(2) * np.linalg.cholesky(START.covariance).T
    starts = [START.mean + sign * row for row in root for sign in (1, -1)]
    laws = [Normal(end.F @ x + end.f, end.C) for x in starts]
    groups = [case.rewards_of(case.QUADRATIC, case.plane(law, 70)) for law in laws]
    optimum = tilt.optimum_from(MEMORY, case.QUADRATIC, b, horizon).of(START)
    want = [
        case.QUADRATIC.expectation(optimum),
        tilt.optimal_path_kl(MEMORY, case.QUADRATIC, b, START),
        tilt.optimal_value(MEMORY, case.QUADRATIC, b, horizon).expectation(START),
    ]
    got = case.frontier_of(setting, groups).at_weight(b)
    yield limit(
        "fixed starts: reward, path KL and J* of the optimal process", case.numbers(got), want
    )
    pooled = case.frontier_of(setting, [np.concatenate(groups)])
    yield limit(
        "over prompts: reward, KL and J* of the tilt",
        case.numbers(pooled.at_weight(b)),
        choosing_starts(laws, b),
    )
    same = float(brentq(lambda b: choosing_starts(laws, b).kl - want[1], 0.9, 9.0))  # pyright: ignore[reportArgumentType]  # it returns a number
    yield limit(
        "what choosing the start too would add at the same KL",
        pooled.at_kl(want[1]).reward.mean - got.reward.mean,
        choosing_starts(laws, same).reward - want[0],
        scale=want[1] * b,
    )


def choosing_starts(laws: Sequence[Normal], b: float) -> exact.Point:
    """The frontier over prompts: its tilt has starts in proportion to exp(V* / b)."""
    points = [exact.of_gaussian(law, case.QUADRATIC, b) for law in laws]
    shares = np.exp([point.objective / b for point in points])
    best = float(shares @ [point.reward for point in points] / shares.sum())
    value = b * float(np.log(shares.mean()))
    return exact.Point(best, (best - value) / b, value)


def checks(setting: Setting) -> Iterator[Check]:
    """Optima of two chains; a process from fixed starts; errors of a run."""
    for name, (rewards, best) in zip(("Gaussian", "mixture"), runs(charged()), strict=True):
        frontier = case.frontier_of(setting, [rewards])
        right = judged(frontier, best.reward, best.path_kl)
        half = judged(frontier, best.reward, 0.5 * best.path_kl)
        scale = right.point.reward.mean - frontier.pretrained.mean  # what this KL can buy
        yield bound(f"{name}: optimum of the chain below the frontier", right.mean, 0.0, scale)
        told = [right.fault, half.fault, right.known, half.known]
        yield expectation(f"{name}: fault at half the KL, none at all of it", told, [0, 1, 1, 1])
        far = judged(frontier, 9.0, 50.0)
        yield expectation(
            f"{name}: unknown, no fault, at 50 nats", [far.known, far.fault], [0, 0], 1.0
        )
    yield from errors_of_a_run(setting)
    yield from from_fixed_starts(setting)


MISTAKES = """
diffusion_envs.frontier.Frontier._tilted
    KL doubled | (reward - objective) / kl_weight => 2 * (reward - objective) / kl_weight
verification.claims.fine_tuning.runs_below_the_frontier.charged
    KL of the SDE for that of the chain | return ChainCost => return BoundDDIM
diffusion_envs.frontier.Frontier.excess
    frontier less the run | reward.mean - point.reward.mean => point.reward.mean - reward.mean
    error of the KL left out | point.kl_weight * kl.standard_error if => 0.0 if
    error of the reward left out | (reward.standard_error + slope_error) => slope_error
    frontier taken for exact | point.reward.upper_error(CONFIDENCE) => 0.0
    fault where the frontier is unknown | point, False, False, words => point, False, True, words
shared
    KL halved
    prompts pooled
"""
