"""The KL-reward frontier: the best reward at a KL from the pretrained model, of its samples alone.

Setting      Rewards r of samples that the pretrained model drew, in groups (one per prompt). For
             b > 0 the law that maximises E[r] - b KL is, within each group, P exp(r / b) / Z. With
             e_i = exp(r_i / b), w_i = e_i / sum e over the n samples of a group,
                 J*(b) = b log mean e,   R(b) = sum w r,   KL(b) = sum w log(n w) = (R - J*) / b,
             each averaged over groups, which weigh equally whatever their numbers of samples. One b
             serves all groups: the optimum where the mean KL over groups is what is paid.
Frontier     R as a function of KL increases and is concave, with slope b (d J* / d b = -KL), and
             R(K) = min over b of J*(b) + b K: every b bounds the reward at every KL from above.
Errors       From n samples of a group J*(b) comes out too low, by b (1 / ESS - 1 / n) / 2 to first
             order in 1 / n, where ESS = 1 / sum w^2 is the effective number of samples; the biases
             of R and KL are of that order too. The jackknife takes out the term in 1 / n, in closed
             form, since a sample that is left out leaves two sums. What stays is O(1 / n^2).
             Standard errors are by bootstrap within groups. Few samples with large weights make
             errors skewed: the truth is more often far above the estimate than below it. So the
             upper end of an interval is z + a (2 z^2 + 1) standard errors away, a the acceleration
             ([H92]; at 95 % it holds the truth in 90 to 96 of 100 cases for Gaussian rewards down
             to 20 effective samples, and the 99.9 % bound fails in 0.1 to 1.4 of 100). Groups are
             fixed: the error of having chosen these prompts (or starts) is in NO interval.
Runs         What a run generates has at most the KL of its paths, so the frontier over prompts
             bounds the reward of a run at its path KL. Groups (prompt, start), with several samples
             from each start, bound it more tightly: no policy changes the initial law, and with the
             start fixed the optimum's path KL is the KL of what it generates from that start. Both
             need the KL of the chain that was sampled (the sum of ``GaussianSteps.transition_kl``
             over its steps), not the path KL of the SDE that it discretises (``path_kl``), which is
             smaller at few steps. Rewards of the run must be averaged over the same groups.
Limits       Where a group has fewer than 20 effective samples the frontier is unknown: what the
             tilt would need has not been seen, and the largest reward seen is no bound.
Sources      Gibbs' variational principle (Donsker & Varadhan 1975). Frontiers from samples of the
             pretrained model: arXiv 2605.07105. [ET93] Efron & Tibshirani, An Introduction to the
             Bootstrap, chapters 6 (standard errors) and 11 (jackknife). [H92] Hall, The Bootstrap
             and Edgeworth Expansion, section 3.5: skewness, as in Johnson's modified t.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctrl.estimate import Estimate

FEWEST_EFFECTIVE_SAMPLES = 20.0
COVERAGE = 0.95  # of two-sided intervals
CONFIDENCE = 0.999  # of the one-sided bound beyond which a run is a fault
_LEAST_EXPONENT = -700.0  # exp of it is a normal double
_HALVINGS = 100
_MOST_RANGES = 1e6
_REMEDY = "draw more samples of the pretrained model in each group"


@dataclass(frozen=True)
class Interval:
    """A number with its error.

    Attributes:
        mean: corrected for bias where it is known.
        low: lower end of the 95 % interval; where the frontier is unknown, what is known of it.
        high: upper end; infinite where nothing bounds it.
        standard_error: by bootstrap; 0 where exact, infinite where unknown.
        acceleration: a sixth of the skewness of its error, by the jackknife ([ET93] 14.15).
    """

    mean: float
    low: float
    high: float
    standard_error: float
    acceleration: float = 0.0

    def upper_error(self, confidence: float) -> float:
        """What may be added to the mean, one-sided; longer than the normal's where skewed."""
        return self.standard_error * _quantile(confidence, self.acceleration)

    def as_dict(self) -> dict[str, float | None]:
        """Plain JSON; what is infinite is null."""
        names = ("mean", "low", "high", "standard_error")
        return {name: _plain(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the frontier.

    Attributes:
        kl_weight: b, reward per nat; the frontier's slope here. Infinite at 0 nats, 0 where no b
            spends so much KL on these samples.
        reward: the best at this b, or at this KL.
        kl: from the pretrained model, nats.
        objective: reward - kl_weight kl.
        effective_samples: the least over groups.
        sentence: why the point is unknown; empty where it is known.
    """

    kl_weight: float
    reward: Interval
    kl: Interval
    objective: Interval
    effective_samples: float
    sentence: str = ""

    @property
    def known(self) -> bool:
        """Whether there were samples enough in every group."""
        return not self.sentence

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; what is infinite is null."""
        return {
            "kl_weight": _plain(self.kl_weight),
            "reward": self.reward.as_dict(),
            "kl": self.kl.as_dict(),
            "objective": self.objective.as_dict(),
            "effective_samples": self.effective_samples,
            "known": self.known,
            "sentence": self.sentence,
        }


class _Tilted(NamedTuple):
    """What the tilt at one b has, in each group, and for each variant of its samples."""

    reward: Tensor
    kl: Tensor
    objective: Tensor


@dataclass(frozen=True)
class Excess:
    """A run's reward less the frontier's at the run's KL.

    Attributes:
        mean: negative for what the run left unused.
        low: the excess is above it but for a probability of 0.1 %.
        point: of the frontier, at the run's KL.
        known: whether the frontier is known there, and the run's KL is finite.
        fault: the run is above what any policy can have at its KL: an error in the code, or a KL
            that is counted too low. Never where the frontier is unknown.
        sentence: the same in words.
    """

    mean: float
    low: float
    point: FrontierPoint
    known: bool
    fault: bool
    sentence: str


class Frontier:
    """Best reward at a KL from the pretrained model, of samples of the pretrained model alone.

    See the module for what it can and cannot say. Groups are prompts, or pairs (prompt, start).

    Attributes:
        pretrained: the mean over groups of their mean reward, with the error of samples within
            groups (groups are fixed).
        groups: their keys, in order of appearance.
        flat: whether rewards are all equal in every group, so that no KL buys anything.
    """

    def __init__(
        self,
        rewards: Float[Tensor, " n"],
        groups: Sequence[Hashable],
        *,
        resamples: int = 200,
        generator: torch.Generator,
    ) -> None:
        """Read the samples and draw the bootstrap's resamples.

        Args:
            rewards: one for each sample of the pretrained model.
            groups: what each sample belongs to: its prompt, or (prompt, start).
            resamples: of the bootstrap.
            generator: of the resamples, on the CPU.

        Raises:
            ValueError: a reward is not finite, a group has fewer than two samples, there are too
                few resamples, or lengths differ.
        """
        if rewards.ndim != 1 or len(rewards) != len(groups) or not len(rewards):
            raise ValueError(
                "rewards must be [n] with one group for each and n at least 1, got rewards "
                f"{list(rewards.shape)} and {len(groups)} groups"
            )
        if resamples < 20:
            raise ValueError(f"resamples must be at least 20 to tell an error, got {resamples}")
        values = rewards.detach().cpu().double()  # float64 is not on every device
        if bad := int((~torch.isfinite(values)).sum()):
            at = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(
                f"rewards must be finite, but {bad} of {len(values)} are not (the first is "
                f"rewards[{at}] = {values[at]:g}, of group {groups[at]!r}); mend the reward, or "
                "leave those samples out only if a run would too"
            )
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        if few := [group for group, indices in members.items() if len(indices) < 2]:
            raise ValueError(
                f"every group needs at least 2 samples, but {len(few)} of {len(members)} have one "
                f"(the first is {few[0]!r}); draw more samples of each (some 20 times exp(KL) or "
                "more), or group by prompt alone"
            )
        self.groups = tuple(members)
        sizes = torch.tensor([[len(indices)] for indices in members.values()])
        self._present = torch.arange(int(sizes.max())) < sizes  # [groups, most]
        order = torch.tensor([index for indices in members.values() for index in indices])
        padded = values.new_full(self._present.shape, -math.inf)
        padded[self._present] = values[order]
        # Rewards are kept less the best of their group, so that no exponential overflows.
        self._best = padded.amax(1, keepdim=True)
        self._rewards = (padded - self._best).masked_fill(~self._present, 0.0)
        self._range = -float(self._rewards.min())
        self._counts = _resampled(sizes, resamples, generator)
        self._sizes = sizes.double()
        self.pretrained = self._of_pretrained()

    @property
    def flat(self) -> bool:
        """Whether rewards are all equal in every group."""
        return self._range == 0

    def at_weight(self, kl_weight: float) -> FrontierPoint:
        """The optimum of E[r] - kl_weight KL, one kl_weight for all groups.

        Raises:
            ValueError: ``kl_weight`` is not positive and finite.
        """
        if not 0 < kl_weight < math.inf:
            raise ValueError(
                f"kl_weight must be positive and finite, in reward per nat, got {kl_weight}; the "
                "pretrained model itself is at_kl(0.0)"
            )
        reward, kl, effective = self._whole(kl_weight)
        if effective < FEWEST_EFFECTIVE_SAMPLES:
            last = self._last_known
            least = 0.0 if last == math.inf else self._whole(last)[1]
            spent = Interval(kl, min(least, kl), math.inf, math.inf)
            return self._unknown(kl_weight, reward, spent, effective)
        return FrontierPoint(kl_weight, *self._estimated(kl_weight), effective)

    def at_kl(self, nats: float) -> FrontierPoint:
        """The best reward at this KL, with the error that it has at this KL.

        The b at which the samples' KL is ``nats`` by bisection, KL being monotone in b; there the
        reward is J* + b nats. (A change of the samples changes the frontier at a KL as it changes
        J*, to first order, since b minimises J* + b nats.)

        Raises:
            ValueError: ``nats`` is negative or not a number.
        """
        if not nats >= 0:
            raise ValueError(
                f"nats must not be negative, got {nats}; a KL estimated by log ratios can be below "
                "0 by chance, one by transition KLs cannot"
            )
        if nats == 0:
            return self._at_zero()
        ties = ((self._rewards == 0) & self._present).sum(1, keepdim=True)  # with the best
        reached = float((self._sizes / ties).log().mean())  # as b tends to 0
        if nats >= reached * (1 - 1e-12):
            largest = float(self._best.mean())
            return self._unknown(0.0, largest, _exact(nats), float(ties.min()))
        return self._at(self._weight_at(nats), nats)

    def curve(self, points: int = 40) -> list[FrontierPoint]:
        """The frontier from 0 nats to where samples run out, evenly in the square root of KL.

        Only the first point where nothing else is known.

        Raises:
            ValueError: fewer than two points.
        """
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}")
        last = self._last_known
        if last == math.inf:
            return [self._at_zero()]
        most = self._whole(last)[1]
        shares = [(k / (points - 1)) ** 2 for k in range(1, points - 1)]
        inner = [self._at(self._weight_at(share * most), share * most) for share in shares]
        return [self._at_zero(), *inner, self._at(last, most)]

    def excess(self, reward: Estimate, kl: Estimate) -> Excess:
        """What a run's reward is above the frontier at the run's KL; normally it is below.

        The lower bound combines the error of the frontier with those of the run: of its reward, and
        of its KL times the slope b, which add up as they may depend on each other in any way.
        (By concavity b times the KL's error is at least what it changes.)

        Args:
            reward: of held-out samples of the run, averaged over the same groups as here.
            kl: of the chain that was sampled, nats (see the module).

        Raises:
            ValueError: the run's reward is not finite, or its KL is negative or not a number.
        """
        if not math.isfinite(reward.mean):
            raise ValueError(f"the run's reward must be finite, got {reward.mean}")
        point = self.at_kl(kl.mean)
        gap = reward.mean - point.reward.mean
        if not point.known:
            infinite = (
                "the KL is infinite, as of a sampler without noise: nothing bounds the reward"
            )
            why = point.sentence if math.isfinite(kl.mean) else infinite
            words = f"Whether the run is above the frontier is unknown: {why}."
            return Excess(gap, -math.inf, point, False, False, words)
        slope_error = point.kl_weight * kl.standard_error if kl.standard_error else 0.0
        of_run = _quantile(CONFIDENCE) * (reward.standard_error + slope_error)
        low = gap - math.hypot(point.reward.upper_error(CONFIDENCE), of_run)
        where = f"at {kl.mean:.3g} nats (the frontier is at {point.reward})"
        if low > 0:
            words = (
                f"Fault: the run's reward {reward} is above the best that any policy can have "
                f"{where}, by {gap:.3g}, surely by {low:.3g}: its KL is counted too low, its "
                "rewards are not of the same prompts, or there is an error in the code."
            )
        else:
            side = "below" if gap <= 0 else "above, within the error of,"
            words = f"The run's reward {reward} is {abs(gap):.3g} {side} the best possible {where}."
        return Excess(gap, low, point, True, low > 0, words)

    # -- estimates --------------------------------------------------------------------------------

    def _of_pretrained(self) -> Estimate:
        n = self._sizes
        means = self._rewards.sum(1, keepdim=True) / n
        squares = (self._rewards - means).square().masked_fill(~self._present, 0.0)
        variances = squares.sum(1, keepdim=True) / (n - 1)
        error = (variances / n).sum().sqrt() / len(n)
        return Estimate(float((means + self._best).mean()), float(error), int(n.sum()))

    def _exponentials(self, kl_weight: float) -> Float[Tensor, "groups most"]:
        """exp((r - best) / b), and 0 where there is no sample."""
        # The clamp is for a resample without any sample that has weight, which would be 0 / 0.
        exponents = (self._rewards / kl_weight).clamp(min=_LEAST_EXPONENT)
        return exponents.exp().masked_fill(~self._present, 0.0)

    def _tilted(
        self,
        mass: Float[Tensor, "groups columns"],
        gain: Float[Tensor, "groups columns"],
        sizes: Float[Tensor, "groups 1"],
        kl_weight: float,
    ) -> _Tilted:
        """R, KL and J* of each group, from its sums of e and of r e."""
        objective = kl_weight * (mass / sizes).log()
        reward = gain / mass
        kl = (reward - objective) / kl_weight
        return _Tilted(self._best + reward, kl, self._best + objective)

    def _whole(self, kl_weight: float) -> tuple[float, float, float]:
        """R and KL, not corrected, and the least effective number of samples over groups."""
        e = self._exponentials(kl_weight)
        mass, gain = e.sum(1, keepdim=True), (e * self._rewards).sum(1, keepdim=True)
        whole = self._tilted(mass, gain, self._sizes, kl_weight)
        effective = mass.square() / e.square().sum(1, keepdim=True)
        kl = max(0.0, float(whole.kl.mean()))  # but for round-off it is not negative
        return float(whole.reward.mean()), kl, float(effective.min())

    def _estimated(self, kl_weight: float) -> tuple[Interval, Interval, Interval]:
        """R, KL and J* averaged over groups, corrected, with their errors."""
        e, n = self._exponentials(kl_weight), self._sizes
        each = e * self._rewards
        mass, gain = e.sum(1, keepdim=True), each.sum(1, keepdim=True)
        whole = self._tilted(mass, gain, n, kl_weight)
        without = self._tilted(mass - e, gain - each, n - 1, kl_weight)  # one sample left out
        drawn = self._counts @ torch.stack([e, each], 2)
        resampled = self._tilted(drawn[..., 0], drawn[..., 1], n, kl_weight)
        return (
            self._interval(whole.reward, without.reward, resampled.reward),
            self._interval(whole.kl, without.kl, resampled.kl),
            self._interval(whole.objective, without.objective, resampled.objective),
        )

    def _interval(
        self,
        value: Float[Tensor, "groups 1"],
        left_out: Float[Tensor, "groups most"],
        resampled: Float[Tensor, "groups resamples"],
    ) -> Interval:
        """Of the mean over groups: bias by the jackknife, standard error by the bootstrap."""
        n = self._sizes
        usual = left_out.masked_fill(~self._present, 0.0).sum(1, keepdim=True) / n
        mean = float((n * value - (n - 1) * usual).mean())
        # The bootstrap's variance of a mean is (n - 1) / n of that of independent samples.
        errors = ((n / (n - 1)).sqrt() * (resampled - resampled.mean(1, keepdim=True))).mean(0)
        influence = (((n - 1) / n) * (usual - left_out)).masked_fill(~self._present, 0.0)
        size = float(influence.square().sum().sqrt())
        skewness = float(influence.pow(3).sum()) / size**3 if size else 0.0
        return _interval(mean, float(errors.std()), skewness / 6)

    # -- points -----------------------------------------------------------------------------------

    def _at(self, kl_weight: float, nats: float) -> FrontierPoint:
        """The point at this KL, which is that of the samples at this b."""
        reward, _, effective = self._whole(kl_weight)
        if effective < FEWEST_EFFECTIVE_SAMPLES:
            return self._unknown(kl_weight, reward, _exact(nats), effective)
        *_, objective = self._estimated(kl_weight)
        paid = kl_weight * nats
        reward = replace(
            objective,
            mean=objective.mean + paid,
            low=objective.low + paid,
            high=objective.high + paid,
        )
        return FrontierPoint(kl_weight, reward, _exact(nats), objective, effective)

    def _at_zero(self) -> FrontierPoint:
        reward = _interval(self.pretrained.mean, self.pretrained.standard_error)
        effective = float(self._sizes.min())
        words = "" if effective >= FEWEST_EFFECTIVE_SAMPLES else _too_few(effective)
        return FrontierPoint(math.inf, reward, _exact(0.0), reward, effective, words)

    def _unknown(
        self, kl_weight: float, reward: float, kl: Interval, effective: float
    ) -> FrontierPoint:
        """What few samples say, not corrected, in the interval of what is known all the same.

        The frontier rises, and is below its tangent at the last known point.
        """
        last = self._last_known
        start = self._at_zero() if last == math.inf else self._at(last, self._whole(last)[1])
        slope = kl.high - start.kl.mean
        top = math.inf if last == math.inf else start.reward.high + last * slope
        best = Interval(reward, min(start.reward.low, reward), max(reward, top), math.inf)
        value = reward - kl_weight * kl.mean if kl_weight else reward
        low = start.reward.low - kl_weight * start.kl.mean
        objective = Interval(value, min(low, value), math.inf, math.inf)
        words = self._why_unknown(kl_weight, reward, kl.mean, effective)
        return FrontierPoint(kl_weight, best, kl, objective, effective, words)

    def _why_unknown(self, kl_weight: float, reward: float, nats: float, effective: float) -> str:
        if self.flat:
            return (
                "the rewards are all equal in every group: as far as the samples show, the "
                f"frontier is flat at {reward:.4g} and no KL buys reward"
            )
        if kl_weight == 0:
            return (
                f"{nats:.3g} nats are more than it takes to generate the best samples of every "
                f"group alone (reward {reward:.4g}), and better ones have not been seen; {_REMEDY}"
            )
        return _too_few(effective)

    @cached_property
    def _last_known(self) -> float:
        """The least b with effective samples enough in every group; infinite if there is none."""
        if self.flat or float(self._sizes.min()) < FEWEST_EFFECTIVE_SAMPLES:
            return math.inf
        least = self._range / -_LEAST_EXPONENT
        if self._whole(least)[2] >= FEWEST_EFFECTIVE_SAMPLES:
            return least
        return self._least_weight(lambda b: self._whole(b)[2] >= FEWEST_EFFECTIVE_SAMPLES)

    def _weight_at(self, nats: float) -> float:
        """The b at which the samples' KL is this, which some b must reach."""
        # Beyond 1e6 ranges KL is round-off, and any b bounds the reward, here to 1e-6 of the range.
        return min(
            self._least_weight(lambda b: self._whole(b)[1] <= nats), _MOST_RANGES * self._range
        )

    def _least_weight(self, holds: Callable[[float], bool]) -> float:
        """The least b at which something holds that holds at all larger ones, by bisection."""
        low = high = self._range
        for _ in range(_HALVINGS):
            if holds(high):
                break
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            if not holds(low):
                break
            low, high = 0.5 * low, low
        for _ in range(_HALVINGS):
            if high <= low * (1 + 1e-14):
                break
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high


def _resampled(
    sizes: Int[Tensor, "groups 1"], resamples: int, generator: torch.Generator
) -> Float[Tensor, "groups resamples most"]:
    """How often each sample is drawn if each group draws as many as it has, with replacement."""
    most = int(sizes.max())
    shape = (len(sizes), resamples, most)
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
    drawn = (uniform * sizes[:, None]).long()
    draws = (torch.arange(most) < sizes[:, None]).double().expand(shape)
    return torch.zeros(shape, dtype=torch.float64).scatter_add_(2, drawn, draws)


def _quantile(confidence: float, acceleration: float = 0.0) -> float:
    """One-sided, in standard errors; skewness to the other side is not made use of."""
    z = NormalDist().inv_cdf(confidence)
    return z + max(0.0, acceleration) * (2 * z**2 + 1)


def _interval(mean: float, error: float, acceleration: float = 0.0) -> Interval:
    one_sided = 0.5 + COVERAGE / 2
    low = mean - error * _quantile(one_sided, -acceleration)
    high = mean + error * _quantile(one_sided, acceleration)
    return Interval(mean, low, high, error, acceleration)


def _exact(value: float) -> Interval:
    return Interval(value, value, value, 0.0)


def _too_few(effective: float) -> str:
    return (
        f"only {effective:.3g} effective samples are left in a group, where "
        f"{FEWEST_EFFECTIVE_SAMPLES:g} are needed; {_REMEDY}"
    )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
