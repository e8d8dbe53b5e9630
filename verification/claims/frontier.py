"""The KL-reward frontier from samples of the pretrained model: what it is, its errors, its use.

The estimate is held against definitions, one sample after the other; what it tends to against
closed forms, on quantiles of known laws; its bias against sums over all outcomes; and what it says
of runs against optima of chains, which come from dynamic programming.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from ctrl.estimate import Estimate
from diffusion_envs.exact import GaussianProblem, MixtureProblem, Outcome, table
from diffusion_envs.frontier import Excess, Frontier, FrontierPoint
from diffusion_envs.samplers import BoundDDIM
from verification.claim import (
    Check,
    Setting,
    bound,
    claim,
    expectation,
    limit,
    pathwise,
    rounding,
    stated,
    wrong,
)
from verification.closed_form import frontier as exact
from verification.closed_form import tilt
from verification.closed_form.frontier import Binary
from verification.closed_form.vp_gaussian import SHORT, Normal, Quadratic, VPGaussian
from verification.gaussian_diffusion import START

OWN, FRONTIER = "verification.claims.frontier", "diffusion_envs.frontier.Frontier"
WHY_DOUBLE = "the frontier is computed in float64, whatever its rewards come in"
WEIGHTS = (1.1, 0.6)


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


# -- two prompts whose frontier is known ---------------------------------------------------------

GAUSSIAN, MIXTURE = GaussianProblem(), MixtureProblem()
LAW = Normal(np.array(GAUSSIAN.mean), np.array(GAUSSIAN.covariance))
QUADRATIC = Quadratic(np.array(GAUSSIAN.curvature), np.array(GAUSSIAN.slope), 0.0)


def density(x: np.ndarray) -> np.ndarray:
    """Of the mixture."""
    parts = zip(MIXTURE.weights, MIXTURE.means, MIXTURE.stds, strict=True)
    return sum((w * stats.norm.pdf(x, m, s) for w, m, s in parts), np.zeros_like(x))


def cosine(x: np.ndarray) -> np.ndarray:
    """The mixture's reward."""
    return MIXTURE.reward(torch.as_tensor(x)[:, None], ["-"] * len(x)).numpy()


def both(b: float) -> exact.Point:
    """The frontier of the two prompts, by closed form and by quadrature."""
    return exact.mean(
        [exact.of_gaussian(LAW, QUADRATIC, b), exact.of_density(density, cosine, b, reach=5.0)]
    )


@cache
def samples_of_both() -> list[np.ndarray]:
    """Rewards of points that stand for the two laws; of unlike numbers."""
    x = np.linspace(-5, 5, 200_001)
    mass = np.cumsum(density(x))
    at = np.searchsorted(mass / mass[-1], (np.arange(1500) + 0.5) / 1500)
    return [rewards_of(QUADRATIC, plane(LAW, 50)), cosine(x[at])]


TILTED = f"{FRONTIER}._tilted"
DEFINITION = [
    wrong("weights not normalised", TILTED, "gain / mass", "gain / sizes"),
    wrong(
        "KL without log n",
        TILTED,
        "kl = (reward - objective) / kl_weight",
        "kl = (reward - kl_weight * mass.log()) / kl_weight",
    ),
    wrong(
        "KL reversed",
        TILTED,
        "kl = (reward - objective) / kl_weight",
        "kl = (objective - self._rewards.sum(1, keepdim=True) / self._sizes) / kl_weight",
    ),
    wrong(
        "KL halved",
        TILTED,
        "(reward - objective) / kl_weight",
        "0.5 * (reward - objective) / kl_weight",
    ),
    wrong(
        "KL in reward instead of nats",
        TILTED,
        "(reward - objective) / kl_weight",
        "(reward - objective)",
    ),
    wrong("objective without KL", TILTED, "kl, self._best + objective", "kl, self._best + reward"),
    wrong(
        "b for 1/b",
        f"{FRONTIER}._exponentials",
        "self._rewards / kl_weight",
        "self._rewards * kl_weight",
    ),
    wrong(
        "b of each prompt in units of its rewards",
        f"{FRONTIER}._exponentials",
        "self._rewards / kl_weight",
        "self._rewards / self._rewards.std(1, keepdim=True) / kl_weight",
    ),
    wrong(
        "prompts pooled",
        f"{FRONTIER}.__init__",
        "members.setdefault(group, [])",
        "members.setdefault(0, [])",
    ),
    wrong(
        "prompts count by their samples",
        f"{FRONTIER}._interval",
        "(n * value - (n - 1) * usual).mean()",
        "(n * (n * value - (n - 1) * usual)).sum() / n.sum()",
    ),
]


@claim(
    statement="""
        From n samples of a prompt, with weights w proportional to exp(r / b): R(b) = sum w r,
        KL(b) = sum w log(n w), J*(b) = R - b KL = b log mean exp(r / b), averaged over prompts at
        one b, tend to reward, KL and objective of the law that maximises E[r] - b E[KL]. As a
        function of KL the best reward has slope b, and lies under all its tangents J*(b) + b KL.
        """,
    source="Gibbs' variational principle (Donsker & Varadhan 1975); arXiv 2605.07105",
    why_double=WHY_DOUBLE,
    wrongs=[
        *DEFINITION,
        wrong(
            "number of samples for the effective one",
            f"{FRONTIER}._whole",
            "mass.square() / e.square().sum(1, keepdim=True)",
            "self._sizes",
        ),
        wrong(
            "effective samples of all prompts for the least of them",
            f"{FRONTIER}._whole",
            "float(effective.min())",
            "float(effective.sum())",
        ),
        wrong(
            "reward at a KL without what the KL is worth",
            f"{FRONTIER}._at",
            "paid = kl_weight * nats",
            "paid = 0.0",
        ),
    ],
)
def kl_reward_frontier(setting: Setting) -> Iterator[Check]:
    """Drawn rewards against definitions; quantiles of two laws against closed forms."""
    generator = setting.generator("rewards")
    drawn = [
        (size * torch.randn(n, dtype=torch.float64, generator=generator) + shift).numpy()
        for n, size, shift in ((37, 0.6, 0.3), (52, 0.35, -1.2), (31, 0.8, 2.1))
    ]
    frontier, b = frontier_of(setting, drawn), 1.7
    units = rounding(52, 10.0)
    point = frontier.at_weight(b)
    want = exact.mean(exact.jackknifed(rewards, b) for rewards in drawn)
    n = rounding(52, 52.0)  # the jackknife multiplies by n what differs by 1 / n
    yield stated(pathwise("reward, KL and J* of drawn rewards", numbers(point), want), units=n)
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
    frontier = frontier_of(setting, samples_of_both())
    for b in WEIGHTS:
        want = both(b)
        yield limit(f"reward, KL and J* of two laws, b {b}", numbers(frontier.at_weight(b)), want)
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


# -- errors --------------------------------------------------------------------------------------

COIN, PRICE = Binary(0.4), 1.2
SIZES = (24, 48)


def expected(setting: Setting, n: int) -> tuple[np.ndarray, np.ndarray]:
    """E[estimate - truth] and E[correction], over all numbers of ones in n samples of the coin."""
    bias, correction = np.zeros(3), np.zeros(3)
    for ones in range(n + 1):
        chance = stats.binom.pmf(ones, n, COIN.probability)
        if chance < 1e-7:
            continue
        rewards = (np.arange(n) < ones).astype(np.float64)
        got = np.array(numbers(frontier_of(setting, [rewards]).at_weight(PRICE)))
        bias += chance * (got - COIN.at(PRICE))
        correction += chance * (got - exact.of_samples(rewards, PRICE))
    return bias, correction


INTERVAL = f"{FRONTIER}._interval"


@claim(
    statement="""
        From n samples of a prompt E[J*(b)] is too low by b chi^2 / (2 n) + O(n^-2), chi^2 of the
        tilt from P, where n / (1 + chi^2) is the effective number of samples; the jackknife takes
        this out, and the terms in 1 / n of R and KL, and what stays is O(n^-2). The standard error
        of J* is b chi / sqrt(n), the skewness of its influences that of the density ratio. Both
        fall with the square root of the number of prompts, since prompts are fixed.
        """,
    source="delta method; Quenouille 1956; Efron & Tibshirani 1993, equation 14.15",
    why_double=WHY_DOUBLE,
    wrongs=[
        wrong(
            "no correction",
            INTERVAL,
            "n * value - (n - 1) * usual",
            "value",
        ),
        wrong(
            "correction of the wrong sign",
            INTERVAL,
            "n * value - (n - 1) * usual",
            "value + (n - 1) * (usual - value)",
        ),
        wrong(
            "half of the correction",
            INTERVAL,
            "n * value - (n - 1) * usual",
            "value - 0.5 * (n - 1) * (usual - value)",
        ),
        wrong(
            "sample left out, its place kept",
            f"{FRONTIER}._estimated",
            "self._tilted(mass - e, gain - each, n - 1, kl_weight)",
            "self._tilted(mass - e, gain - each, n, kl_weight)",
        ),
        wrong(
            "standard error of the mean of the resamples",
            INTERVAL,
            "float(errors.std())",
            "float(errors.std()) / len(errors) ** 0.5",
        ),
        wrong(
            "standard error of one prompt for that of all",
            INTERVAL,
            "keepdim=True))).mean(0)",
            "keepdim=True)))[0]",
        ),
        wrong(
            "prompts that differ for an error",
            INTERVAL,
            "float(errors.std())",
            "float(value.std(correction=0))",
        ),
        wrong(
            "samples themselves for resamples",
            "diffusion_envs.frontier._resampled",
            "(uniform * sizes[:, None]).long()",
            "torch.arange(most).expand(shape).clone()",
        ),
        wrong("skewness of the other sign", INTERVAL, "usual - left_out", "left_out - usual"),
        wrong("skewness not divided by 6", INTERVAL, "skewness / 6", "skewness"),
    ],
)
def errors_of_the_frontier(setting: Setting) -> Iterator[Check]:
    """A coin's reward, over all outcomes; and many prompts alike."""
    chi_square = COIN.moment(PRICE, 2)
    size = 0.5 * PRICE * chi_square
    by_size = [n * np.array(expected(setting, n)) for n in SIZES]
    bias, correction = 2 * by_size[1] - by_size[0]  # of c / n + d / n^2 + ..., times n, leaves c
    for name, left in zip(("reward", "KL", "J*"), bias, strict=True):
        yield limit(f"n times the bias of {name}", left, 0.0, scale=size)
    yield limit("n times the correction of J*", correction[2], size)
    n, prompts = 100, 60
    shifts = np.linspace(-3, 3, prompts)[:, None]  # of rewards, which change no weight
    drawn = (np.arange(n) < COIN.probability * n) + shifts
    point = frontier_of(setting, list(drawn), resamples=300).at_weight(PRICE)
    got = point.objective
    error = PRICE * np.sqrt(chi_square / n / prompts)
    yield limit("standard error of J*", got.standard_error, error)
    skewness = COIN.moment(PRICE, 3) / chi_square**1.5
    yield limit("acceleration of J*", 6 * got.acceleration * np.sqrt(n * prompts), skewness)


# -- runs ----------------------------------------------------------------------------------------

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
    gain, shift = GAUSSIAN.best_correction(sampler)
    law = GAUSSIAN.law_of(0 * gain, 0 * shift, sampler)
    points = plane(Normal(law.mean.numpy(), law.covariance.numpy()), 60)
    changes = mixture.best_correction(sampler)
    mass = mixture.law_of(0 * changes, sampler)[0].cumsum(0).numpy()
    at = np.searchsorted(mass / mass[-1], (np.arange(3000) + 0.5) / 3000)
    return [
        (rewards_of(QUADRATIC, points), GAUSSIAN.optimum(sampler)),
        (mixture.rewards.numpy()[at], mixture.optimum(sampler)),
    ]


def judged(frontier: Frontier, reward: float, kl: float, error: float = 0.002) -> Excess:
    """What the frontier says of a run."""
    return frontier.excess(Estimate(reward, error, 1000), Estimate(kl, error, 1000))


EXCESS = f"{FRONTIER}.excess"


@claim(
    statement="""
        No policy's reward is above the frontier over prompts at the KL of the chain that it
        samples: the optimum of a chain by dynamic programming is below it, and above it at half its
        KL, which is reported as a fault, as is the KL of the SDE that the chain discretises, which
        is smaller at few steps. Over pairs (prompt, start), frontier and KL are those of the
        optimal process with its initial law fixed, whose path KL is 1/2 int g^2 E|grad V*/b|^2: it
        is below the frontier over prompts, as no policy changes the start.
        """,
    source="data processing inequality; Domingo-Enrich et al. 2024, arXiv 2409.08861, section 4",
    why_double=WHY_DOUBLE,
    wrongs=[
        wrong(
            "KL halved",
            TILTED,
            "(reward - objective) / kl_weight",
            "0.5 * (reward - objective) / kl_weight",
        ),
        wrong(
            "KL doubled",
            TILTED,
            "(reward - objective) / kl_weight",
            "2 * (reward - objective) / kl_weight",
        ),
        wrong(
            "KL of the SDE for that of the chain",
            f"{OWN}.charged",
            "return ChainCost",
            "return BoundDDIM",
        ),
        wrong(
            "frontier less the run",
            EXCESS,
            "reward.mean - point.reward.mean",
            "point.reward.mean - reward.mean",
        ),
        wrong(
            "error of the KL left out", EXCESS, "point.kl_weight * kl.standard_error if", "0.0 if"
        ),
        wrong(
            "error of the reward left out",
            EXCESS,
            "(reward.standard_error + slope_error)",
            "slope_error",
        ),
        wrong("frontier taken for exact", EXCESS, "point.reward.upper_error(CONFIDENCE)", "0.0"),
        wrong(
            "starts left out of the key",
            f"{FRONTIER}.__init__",
            "members.setdefault(group, [])",
            "members.setdefault(0, [])",
        ),
        wrong(
            "fault where the frontier is unknown",
            EXCESS,
            "point, False, False, words",
            "point, False, True, words",
        ),
    ],
)
def runs_below_the_frontier(setting: Setting) -> Iterator[Check]:
    """Optima of two chains; a process from fixed starts; errors of a run."""
    for name, (rewards, best) in zip(("Gaussian", "mixture"), runs(charged()), strict=True):
        frontier = frontier_of(setting, [rewards])
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


def errors_of_a_run(setting: Setting) -> Iterator[Check]:
    """The lower bound of the excess, from its three errors."""
    generator = setting.generator("draws")
    drawn = torch.randn(2000, dtype=torch.float64, generator=generator).numpy()
    frontier, run, kl = frontier_of(setting, [drawn]), (1.7, 0.04), (1.1, 0.05)
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
    groups = [rewards_of(QUADRATIC, plane(law, 70)) for law in laws]
    optimum = tilt.optimum_from(MEMORY, QUADRATIC, b, horizon).of(START)
    want = [
        QUADRATIC.expectation(optimum),
        tilt.optimal_path_kl(MEMORY, QUADRATIC, b, START),
        tilt.optimal_value(MEMORY, QUADRATIC, b, horizon).expectation(START),
    ]
    got = frontier_of(setting, groups).at_weight(b)
    yield limit("fixed starts: reward, path KL and J* of the optimal process", numbers(got), want)
    pooled = frontier_of(setting, [np.concatenate(groups)])
    yield limit(
        "over prompts: reward, KL and J* of the tilt",
        numbers(pooled.at_weight(b)),
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
    points = [exact.of_gaussian(law, QUADRATIC, b) for law in laws]
    shares = np.exp([point.objective / b for point in points])
    best = float(shares @ [point.reward for point in points] / shares.sum())
    value = b * float(np.log(shares.mean()))
    return exact.Point(best, (best - value) / b, value)
