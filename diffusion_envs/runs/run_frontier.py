"""A run beside the best that any policy can have: the frontier of its model, reward and prompts.

Frontier    ``diffusion_envs.frontier``: the most reward at each KL from the pretrained model, from
            samples of that model alone: its held-out ones, and ``frontier_samples`` more. Prompts
            weigh equally; only those count that have a held-out sample.
Bound       E[reward] <= frontier(KL of what is generated) <= frontier(KL of the chain): a run that
            is above the frontier at its ``chain_kl`` by more than chance is a fault. The SDE's path
            KL, which most objectives charge, is another number in few steps, and nothing is bounded
            at it: a share at it may exceed 1.
Optimum     at the objective's weight b, J* = max of E[reward] - b KL of what is generated. No run
            exceeds it when charged the chain's KL. Where the start of a path says something about
            its end, the best policy has less, since no policy chooses the start:
            then 100 % is out of reach.
Errors      The share of a gap, a / c, has the standard error sqrt(var a + (a / c)^2 var c) / c, as
            if the run's part a and the frontier's c were independent. They share the held-out
            samples of the pretrained model, whose errors partly cancel, so it is rather too large.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from ctrl import Estimate
from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.frontier import (
    COVERAGE,
    FEWEST_EFFECTIVE_SAMPLES,
    Excess,
    Frontier,
    FrontierPoint,
    Interval,
)
from diffusion_envs.runs.evaluation import Evaluation
from diffusion_envs.runs.further_samples import STREAM, further_rewards
from diffusion_envs.training import parallel

KINDS = {"chain_kl": "the KL of the sampled chain", "path_kl": "the SDE's path KL"}
_MOST = 10_000_000  # samples that anyone would draw
_BEYOND = 12  # points of the curve where it is unknown
_Z = NormalDist().inv_cdf(0.5 + COVERAGE / 2)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFrontier:
    """How near a run is to the best possible; what is not known is None or left out.

    Attributes:
        sentences: the same in plain words, and why something is not known.
        fault: the run is above what any policy can have: in words; None if it is not.
        samples: of the pretrained model.
        prompts: that they are of.
        pretrained: reward of the pretrained model, over prompts.
        reward: of the exported model.
        gain: paired by seed.
        kl: of the exported model, nats, by the names of ``KINDS``.
        kl_weight: of the objective, in reward per nat; None if it has none.
        optimum: the best at that weight.
        share_of_gap: of the optimum's J over the pretrained model's, what the run has, by which KL
            is charged.
        at_kl: the frontier at the run's KL, by which KL that is.
        share_of_gain: of the frontier's gain there, what the run has.
        excess: the run's reward less the frontier's at the KL of the sampled chain.
        curve: points of the frontier, from 0 nats on; the last ones may be unknown.
    """

    sentences: tuple[str, ...]
    fault: str | None = None
    samples: int = 0
    prompts: int = 0
    pretrained: Estimate | None = None
    reward: Estimate | None = None
    gain: Estimate | None = None
    kl: Mapping[str, Estimate] = field(default_factory=dict)
    kl_weight: float | None = None
    optimum: FrontierPoint | None = None
    share_of_gap: Mapping[str, Interval] = field(default_factory=dict)
    at_kl: Mapping[str, FrontierPoint] = field(default_factory=dict)
    share_of_gain: Mapping[str, Interval] = field(default_factory=dict)
    excess: Excess | None = None
    curve: tuple[FrontierPoint, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, without the curve."""
        single = {"pretrained": self.pretrained, "reward": self.reward, "gain": self.gain}
        single |= {"optimum": self.optimum}
        named = {"kl": self.kl, "share_of_gap": self.share_of_gap}
        named |= {"at_kl": self.at_kl, "share_of_gain": self.share_of_gain}
        excess, plain = self.excess, {k: v.as_dict() for k, v in single.items() if v is not None}
        if excess is not None and excess.known:
            plain["excess"] = {"mean": excess.mean, "low": excess.low}
        return {
            "samples": self.samples,
            "prompts": self.prompts,
            "kl_weight": self.kl_weight,
            **plain,
            **{name: {k: v.as_dict() for k, v in each.items()} for name, each in named.items()},
            "fault": self.fault,
            "sentences": list(self.sentences),
        }

    def drawn(self) -> dict[str, Any]:
        """Plain JSON of the curve, for ``frontier.json``."""
        curve = [point.as_dict() for point in self.curve]
        return {"samples": self.samples, "prompts": self.prompts, "curve": curve}


def compare(
    environment: Environment,
    before: Evaluation,
    after: Evaluation,
    path: Path,
    *,
    samples: int,
    kl_weight: float | None,
    batch: int,
    progress: bool = False,
    accelerator: Accelerator | None = None,
) -> RunFrontier:
    """The frontier from the pretrained model's samples, and the exported model beside it.

    Nothing that goes wrong here loses a run: it is told in the result's sentence.

    Args:
        environment: of the run.
        before: the pretrained model.
        after: the exported model, on the same seeds.
        path: where further samples are kept.
        samples: how many more to draw of the pretrained model.
        kl_weight: of the objective, in reward per nat.
        batch: samples rolled out at once.
        progress: show a bar.
        accelerator: processes that share the further samples; None: this one makes all.
    """
    try:
        further = further_rewards(
            environment, samples, path, batch=batch, progress=progress, accelerator=accelerator
        )
        generator = stream(environment.seed, STREAM, "resamples")
        prompts = environment.prompts
        return frontier_of(before, after, further, prompts, kl_weight, generator=generator)
    except parallel.LostProcessError:
        raise
    except Exception as error:  # whatever it is, the run is done and must be reported
        _log.warning("the frontier cannot be computed", exc_info=True)
        return RunFrontier((f"The frontier cannot be computed: {error}.",))


def frontier_of(
    before: Evaluation,
    after: Evaluation,
    further: Float[Tensor, " further"],
    prompts: Sequence[str],
    kl_weight: float | None,
    *,
    generator: torch.Generator,
) -> RunFrontier:
    """The frontier, and a run beside it.

    Args:
        before: the pretrained model, sample i with prompt i modulo their number.
        after: the fine-tuned model on the same seeds.
        further: more rewards of the pretrained model, of prompts in the same turn.
        prompts: of the run.
        kl_weight: reward per nat; None if no J is to be compared.
        generator: of the bootstrap.
    """
    n = len(after.rewards)
    held = [i % len(prompts) for i in range(n)]
    more = [i for i in range(len(further)) if i % len(prompts) < n]
    groups = held + [i % len(prompts) for i in more]
    values = torch.cat([before.rewards[:n].double(), further[more].double()])
    least, rarest = min((count, k) for k, count in Counter(groups).items())
    if least < 2:
        words = f"prompt {prompts[rarest]!r} has one sample of the pretrained model only"
        asked = len(set(groups))
        needed = _needed(asked, n, FEWEST_EFFECTIVE_SAMPLES)
        sentence = f"There is no frontier: {words}; {needed}."
        return RunFrontier((sentence,), samples=len(values), prompts=asked, kl_weight=kl_weight)
    run = _Run(Frontier(values, groups, generator=generator), before, after, held, least)
    return run.beside_the_frontier(len(values), kl_weight)


@dataclass(frozen=True)
class _Run:
    """An exported model beside a frontier.

    Attributes:
        frontier: of the pretrained model.
        before: the pretrained model.
        after: the exported one.
        held: prompt of each held-out sample.
        least: samples of the pretrained model that every prompt has.
    """

    frontier: Frontier
    before: Evaluation
    after: Evaluation
    held: Sequence[int]
    least: int

    def beside_the_frontier(self, samples: int, kl_weight: float | None) -> RunFrontier:
        """All numbers and sentences."""
        rewards = self.after.rewards
        nats = {"chain_kl": self.after.chain_kl, "path_kl": self.after.path_kl}
        kl = {k: self.over(v) for k, v in nats.items() if bool(torch.isfinite(v).all())}
        reward = self.over(rewards)
        optimum = None if kl_weight is None else self.frontier.at_weight(kl_weight)
        closed = {}
        if kl_weight is not None and optimum is not None:
            closed = {k: s for k in kl if (s := self.closed(nats[k], kl_weight, optimum))}
        at_kl = {k: self.frontier.at_kl(value.mean) for k, value in kl.items()}
        gains = {k: s for k in kl if (s := self.share_of_gain(kl[k], at_kl[k]))}
        excess = self.frontier.excess(reward, kl["chain_kl"]) if "chain_kl" in kl else None
        fault = excess.sentence if excess is not None and excess.fault else None
        of_optimum = self.of_optimum(optimum, kl_weight, closed, kl)
        of_gain = self.of_gain(excess, at_kl, gains)
        return RunFrontier(
            sentences=tuple(words for words in (of_gain, of_optimum) if words),
            fault=fault,
            samples=samples,
            prompts=len(self.frontier.groups),
            pretrained=self.frontier.pretrained,
            reward=reward,
            gain=self.over(rewards - self.before.rewards[: len(rewards)]),
            kl=kl,
            kl_weight=kl_weight,
            optimum=optimum,
            share_of_gap=closed,
            at_kl=at_kl,
            share_of_gain=gains,
            excess=excess,
            curve=self.curve(max((value.mean for value in kl.values()), default=0.0)),
        )

    def over(self, values: Float[Tensor, " n"]) -> Estimate:
        """Mean over prompts of the mean of each, which are the frontier's groups."""
        return mean_over_groups(values, self.held)

    def curve(self, nats: float) -> tuple[FrontierPoint, ...]:
        """The frontier as far as it is known, and on to ``nats`` as few samples have it."""
        known = self.frontier.curve()
        last = known[-1].kl.mean
        if self.frontier.flat or nats <= last:
            return tuple(known)
        steps = [last + (nats - last) * (k / _BEYOND) ** 2 for k in range(1, _BEYOND + 1)]
        return (*known, *(self.frontier.at_kl(step) for step in steps))

    # -- shares -----------------------------------------------------------------------------------

    def gap(self, optimum: FrontierPoint) -> Estimate:
        """J of the optimum over that of the pretrained model."""
        pretrained, best = self.frontier.pretrained, optimum.objective
        error = math.hypot(best.standard_error, pretrained.standard_error)
        return Estimate(best.mean - pretrained.mean, error, pretrained.n)

    def closed(
        self, nats: Float[Tensor, " n"], kl_weight: float, optimum: FrontierPoint
    ) -> Interval | None:
        """The run's share of that gap."""
        if not optimum.known:
            return None
        gained = self.after.rewards - self.before.rewards[: len(nats)] - kl_weight * nats
        return _share(self.over(gained), self.gap(optimum))

    def share_of_gain(self, kl: Estimate, point: FrontierPoint) -> Interval | None:
        """The run's share of what the frontier gains at a KL."""
        if not point.known:
            return None
        pretrained, best = self.frontier.pretrained, point.reward
        slope = point.kl_weight * kl.standard_error if kl.standard_error else 0.0
        error = math.hypot(best.standard_error, pretrained.standard_error, slope)
        most = Estimate(best.mean - pretrained.mean, error, pretrained.n)
        gained = self.after.rewards - self.before.rewards[: len(self.held)]
        return _share(self.over(gained), most)

    # -- words ------------------------------------------------------------------------------------

    def of_optimum(
        self,
        optimum: FrontierPoint | None,
        kl_weight: float | None,
        closed: Mapping[str, Interval],
        kl: Mapping[str, Estimate],
    ) -> str:
        """What the best policy has at the objective's weight, and what of it the run has."""
        if optimum is None or kl_weight is None:
            return (
                "The objective has no kl_weight in reward per nat, so there is no optimum of "
                "reward - kl_weight KL to compare the run with."
            )
        what = f"reward - {kl_weight:g} KL"
        if not optimum.known:
            return f"The largest {what} that a policy can have is not known: {self.why(optimum)}."
        gap = self.gap(optimum)
        words = (
            f"The largest {what} that a policy can have is {optimum.objective}, {gap.mean:.3g} "
            f"above the pretrained model's, with a reward of {optimum.reward.mean:.3g} at "
            f"{optimum.kl.mean:.3g} nats."
        )
        shares = [f"{percent(s)} if charged {KINDS[k]} ({kl[k]} nats)" for k, s in closed.items()]
        if shares:
            return f"{words} Of this gap the run has closed {' and '.join(shares)}."
        if not kl:
            return f"{words} What the run has closed of it is not known, as its KL is not."
        return f"{words} That is within chance of 0, so there is no share of it to tell."

    def of_gain(
        self,
        excess: Excess | None,
        at_kl: Mapping[str, FrontierPoint],
        shares: Mapping[str, Interval],
    ) -> str:
        """How the run's gain compares with the best possible at its KL."""
        if excess is None:
            known = "not known" if bool(self.after.chain_kl.isnan().any()) else "infinite"
            why = "a black box shows no steps" if known == "not known" else "a step has no noise"
            return f"The KL of the sampled chain is {known} ({why}), and so no reward is bounded."
        if not excess.known:
            return (
                f"The most reward that a policy can have at the run's {excess.point.kl.mean:.3g} "
                f"nats (the KL of its sampled chain) is not known: {self.why(excess.point)}."
            )
        start = "" if excess.fault else f"{excess.sentence} "
        named = [f"{percent(share)} at {KINDS[k]}" for k, share in shares.items()]
        if not named:
            return f"{start}The frontier's gain there is within chance of 0."
        return f"{start}Of the most that can be gained, the run has gained {' and '.join(named)}."

    def why(self, point: FrontierPoint) -> str:
        """Why a point is unknown, and what would do."""
        if self.frontier.flat:
            return point.sentence
        n = len(self.held)
        by_share = self.least * FEWEST_EFFECTIVE_SAMPLES / point.effective_samples
        # a tilt that has so many nats leaves at most exp(-KL) of the samples effective
        by_kl = FEWEST_EFFECTIVE_SAMPLES * math.exp(min(point.kl.mean, 100.0))
        needed = _needed(len(self.frontier.groups), n, max(by_share, by_kl))
        return (
            f"of the pretrained model's {self.least} samples of a prompt "
            f"{point.effective_samples:.2g} are effective, where {FEWEST_EFFECTIVE_SAMPLES:g} are "
            f"needed; {needed}"
        )


def _needed(prompts: int, held_out: int, each: float) -> str:
    """How many samples would do, in words."""
    more = each * prompts - held_out
    if more > _MOST:
        return "it would take more of them than can be drawn"
    rounding = 10 ** max(0, math.floor(math.log10(max(more, 1.0))) - 1)
    count = math.ceil(more / rounding) * rounding
    return (
        f"at least {math.ceil(each):,} samples of each prompt are needed: frontier_samples of "
        f"{count} or more (a finished run may be resumed with --frontier-samples {count})"
    )


def mean_over_groups(values: Float[Tensor, " n"], groups: Sequence[int]) -> Estimate:
    """Mean over groups of each one's mean; groups are fixed, samples within them are random.

    Where a group has one sample, its variance is taken to be that of all samples.
    """
    sample = values.detach().double()
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    whole = Estimate.of(sample)
    all_variance = whole.standard_error**2 * whole.n
    parts = [Estimate.of(sample[members]) for members in rows.values()]
    variances = [p.standard_error**2 if p.n > 1 else all_variance for p in parts]
    mean = sum(part.mean for part in parts) / len(parts)
    return Estimate(mean, math.sqrt(sum(variances)) / len(parts), whole.n)


def _share(part: Estimate, whole: Estimate) -> Interval | None:
    """part / whole with its error; None where the whole is within chance of 0."""
    if not whole.mean > _Z * whole.standard_error:
        return None
    share = part.mean / whole.mean
    error = math.hypot(part.standard_error, share * whole.standard_error) / whole.mean
    return Interval(share, share - _Z * error, share + _Z * error, error)


def percent(share: Interval) -> str:
    """A share in per cent, with its interval."""
    if share.high < 0:
        return "none (it has lost)"
    mean, low, high = (100 * value for value in (share.mean, share.low, share.high))
    return f"{mean:.0f} % ({low:.0f} to {high:.0f} %)"
