"""The KL-reward frontier of the pretrained model, from its samples.

From n samples of a prompt, with weights w proportional to exp(r / b): R(b) = sum w r,
KL(b) = sum w log(n w), J*(b) = R - b KL = b log mean exp(r / b), averaged over prompts at
one b, tend to reward, KL and objective of the law that maximises E[r] - b E[KL]. As a
function of KL the best reward has slope b, and lies under all its tangents J*(b) + b KL.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from scipy import stats

from verification.claim import Check, Setting, bound, expectation, limit, pathwise, rounding, stated
from verification.closed_form import frontier as exact
from verification.closed_form.gaussian_law import Normal
from verification.problems import frontier as case

SOURCE = "Gibbs' variational principle (Donsker & Varadhan 1975); arXiv 2605.07105"
WHY_DOUBLE = "the frontier is computed in float64, whatever its rewards come in"
COVERS = "several dimensions"

WEIGHTS = (1.1, 0.6)
LAW = Normal(np.array(case.GAUSSIAN.mean), np.array(case.GAUSSIAN.covariance))


def density(x: np.ndarray) -> np.ndarray:
    """Of the mixture."""
    parts = zip(case.MIXTURE.weights, case.MIXTURE.means, case.MIXTURE.stds, strict=True)
    return sum((w * stats.norm.pdf(x, m, s) for w, m, s in parts), np.zeros_like(x))


def cosine(x: np.ndarray) -> np.ndarray:
    """The mixture's reward."""
    return case.MIXTURE.reward(torch.as_tensor(x)[:, None], ["-"] * len(x)).numpy()


def both(b: float) -> exact.Point:
    """The frontier of the two prompts, by closed form and by quadrature."""
    return exact.mean(
        [exact.of_gaussian(LAW, case.QUADRATIC, b), exact.of_density(density, cosine, b, reach=5.0)]
    )


@cache
def samples_of_both() -> list[np.ndarray]:
    """Rewards of points that stand for the two laws; of unlike numbers."""
    x = np.linspace(-5, 5, 200_001)
    mass = np.cumsum(density(x))
    at = np.searchsorted(mass / mass[-1], (np.arange(1500) + 0.5) / 1500)
    return [case.rewards_of(case.QUADRATIC, case.plane(LAW, 50)), cosine(x[at])]


def checks(setting: Setting) -> Iterator[Check]:
    """Drawn rewards against definitions; quantiles of two laws against closed forms."""
    generator = setting.generator("rewards")
    drawn = [
        (size * torch.randn(n, dtype=torch.float64, generator=generator) + shift).numpy()
        for n, size, shift in ((37, 0.6, 0.3), (52, 0.35, -1.2), (31, 0.8, 2.1))
    ]
    frontier, b = case.frontier_of(setting, drawn), 1.7
    units = rounding(52, 10.0)
    point = frontier.at_weight(b)
    want = exact.mean(exact.jackknifed(rewards, b) for rewards in drawn)
    n = rounding(52, 52.0)  # the jackknife multiplies by n what differs by 1 / n
    yield stated(pathwise("reward, KL and J* of drawn rewards", case.numbers(point), want), units=n)
    least = min(exact.effective_samples(rewards, b) for rewards in drawn)
    effective = pathwise("least effective number of samples", point.effective_samples, least)
    yield stated(effective, units=units)
    nats = exact.mean(exact.of_samples(rewards, b) for rewards in drawn).kl
    at = frontier.at_kl(nats)
    yield stated(
        pathwise(
            "b and reward at a KL", [at.kl_weight, at.reward.mean], [b, want.objective + b * nats]
        ),
        units=n,
    )
    frontier = case.frontier_of(setting, samples_of_both())
    for b in WEIGHTS:
        want = both(b)
        yield limit(
            f"reward, KL and J* of two laws, b {b}", case.numbers(frontier.at_weight(b)), want
        )
        at = frontier.at_kl(want.kl)
        yield limit(
            f"reward and b at {want.kl:.2f} nats", [at.reward.mean, at.kl_weight], [want.reward, b]
        )
        rise = (
            frontier.at_kl(1.01 * want.kl).reward.mean - frontier.at_kl(0.99 * want.kl).reward.mean
        )
        yield limit(f"slope at {want.kl:.2f} nats", rise / (0.02 * want.kl), b)
        tangents = [both(b * factor) for factor in (0.5, 0.7, 1.4, 2.0)]
        yield bound(
            f"tangents above the frontier at {want.kl:.2f} nats",
            [at.reward.mean] * 4,
            [
                t.objective + b * f * want.kl
                for t, f in zip(tangents, (0.5, 0.7, 1.4, 2.0), strict=True)
            ],
        )
    few = frontier.at_weight(0.02)
    yield expectation("known where samples are enough", [few.known, at.known], [0.0, 1.0])


MISTAKES = """
diffusion_envs.frontier.Frontier._tilted
    weights not normalised | gain / mass => gain / sizes
    KL without log n | kl = (reward - objective) / kl_weight => kl = (reward - kl_weight * mass.log()) / kl_weight
    KL reversed | kl = (reward - objective) / kl_weight
        => kl = (objective - self._rewards.sum(1, keepdim=True) / self._sizes) / kl_weight
    KL in reward instead of nats | (reward - objective) / kl_weight => (reward - objective)
    objective without KL | kl, self._best + objective => kl, self._best + reward
diffusion_envs.frontier.Frontier._exponentials
    b for 1/b | self._rewards / kl_weight => self._rewards * kl_weight
    b of each prompt in units of its rewards | self._rewards / kl_weight
        => self._rewards / self._rewards.std(1, keepdim=True) / kl_weight
diffusion_envs.frontier.Frontier._interval
    prompts count by their samples | (n * value - (n - 1) * usual).mean()
        => (n * (n * value - (n - 1) * usual)).sum() / n.sum()
diffusion_envs.frontier.Frontier._whole
    number of samples for the effective one | mass.square() / e.square().sum(1, keepdim=True) => self._sizes
    effective samples of all prompts for the least of them | float(effective.min()) => float(effective.sum())
diffusion_envs.frontier.Frontier._at
    reward at a KL without what the KL is worth | paid = kl_weight * nats => paid = 0.0
shared
    KL halved
    prompts pooled
"""
