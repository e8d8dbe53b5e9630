"""What fine-tuning did besides raising the reward: over-optimisation metrics, and a verdict.

Metrics     on held-out seeds, paired with the pretrained model on the same seeds:

    reward, reward_gain          and the gain over the pretrained model
    judge.NAME, judge_gain.NAME  of held-out rewards
    judge_std.NAME               standard deviation over the pretrained model's samples
    path_kl                      from the pretrained model, nats; left out where it is not finite
    chain_kl                     that of the chain that was sampled, not of the SDE
    diversity.SPACE              mean distance of two pictures of one prompt
    pretrained_diversity.SPACE   that of the pretrained model's pictures
    diversity_gain.SPACE         the former less the latter
    distance.SPACE               mean distance of a picture from the pretrained one of its seed
    separation.SPACE             mean distance of two pretrained pictures, whatever their prompts

    SPACE is "pixels": root mean square difference, values in [0, 1], so the distance is too; or
    the name of a judge or reward that offers embeddings: 1 - cosine, in [0, 2]; or "stlpips", where
    it is asked for: a perceptual distance (perceptual.py). Diversity is the mean over prompts of
    the mean over pairs, its standard error by the jackknife; a prompt with one sample has no pair
    and is left out, with two the error is unknown (infinite).

Verdict     A sentence opens with a fall only if the fall is both beyond chance and large enough to
            matter: a one-sided t-bound must lie beyond a margin, not beyond 0.

    judge       JUDGE_FALL = 0.2 standard deviations of the pretrained model's samples. If both
                laws are normal, a picture of the fine-tuned model then beats one of the pretrained
                model with probability Phi(-0.2 / sqrt 2) = 44 %, instead of 50 %.
    diversity   DIVERSITY_FALL = 10 % of the pretrained model's: what is lost if a share f =
                sqrt(0.1) = 32 % of a prompt's pictures become one and the same (f^2 of its pairs).
                It has collapsed with COLLAPSE = 50 % lost: 71 % are one and the same.
    pictures    are lost if they are far from the pretrained ones in every space, and no judge has
                held. Far is more than c times the separation:
                - c = 1 where the path KL is not known. Another sample of the pretrained model is at
                  the separation itself, so what is beyond it is no sample of that model.
                - c = 1/sqrt 2 for pixels, 1/2 for 1 - cosine and ST-LPIPS (squared distances but
                  for a factor), where the path KL is beyond FAR. That is how far the mean of all
                  pretrained pictures is, as E|X - EX|^2 = E|X - X'|^2 / 2: a picture further away
                  than one and the same for all says nothing about the pretrained picture of its
                  seed. This alone proves no loss, for a chaotic sampler leads to another picture of
                  the same law; the path KL, which bounds the KL of the laws of pictures from above,
                  excludes that reading only when it is small. So it must be large too.
    path KL     is FAR beyond 13 nats: the best of N pretrained pictures has a KL of log N -
                (N - 1) / N, 12.8 nats for N = one million. Further than that is no selection that
                anyone could have made instead of fine-tuning.

Chance      One verdict, asked once about all the lines of a run, names a fall that is not there
            with probability at most LEVEL = 5 % (Bonferroni): half of LEVEL is for the comparisons
            of the last line with the pretrained model (each judge, each diversity, the pictures),
            half for those with each earlier line, which show what rises first and falls later; all
            of LEVEL is for the former if there is one line only. The bound holds for any dependence
            between metrics and lines, as far as t-bounds do. Simulated rates: see
            benchmarks/over_optimisation.py. A verdict asked after every line, as in the report of
            an unfinished run, is another chance to be wrong each time.
            Differences from an earlier line are taken as independent: both are paired with the same
            pretrained samples and share seeds, so the error is rather too large. A diversity's
            t-bound has 2n/3 degrees of freedom, which n samples in prompts of at least 3 have.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from ctrl import Estimate
from diffusion_envs import rewards
from diffusion_envs.runs import perceptual
from diffusion_envs.runs.distances import (
    cosine_distances,
    mean_over_pairs,
    pixel_distances,
    standard_deviation,
)
from diffusion_envs.runs.evaluation import Evaluation
from diffusion_envs.training import parallel

PIXELS = "pixels"
LEVEL = 0.05  # probability of a false alarm, at most
JUDGE_FALL = 0.2  # standard deviations over the pretrained model's samples
DIVERSITY_FALL, COLLAPSE = 0.1, 0.5  # of the pretrained model's diversity
FAR = 13.0  # nats
_WATCHED = ("judge_gain.", "diversity_gain.")


# -- the metrics ---------------------------------------------------------------------------------


def embeddings(
    reward: rewards.Reward, judges: Mapping[str, rewards.Reward]
) -> dict[str, rewards.Embedder]:
    """Those that the reward and the judges offer, by name."""
    named = {"reward": reward, **judges}
    return {name: offer for name, offer in named.items() if isinstance(offer, rewards.Embedder)}


def metrics(
    before: Evaluation,
    after: Evaluation,
    embedders: Mapping[str, rewards.Embedder] | None = None,
    stlpips: perceptual.ShiftTolerantAlexNet | None = None,
    reward_timeout: float | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Estimate]:
    """The over-optimisation metrics of a fine-tuned model (see the module).

    Args:
        before: the pretrained model; it may have more samples than ``after``, not fewer.
        after: the fine-tuned model on the same seeds.
        embedders: spaces to measure distances in besides pixels, by name.
        stlpips: the network of a further, perceptual distance.
        reward_timeout: seconds that one call of an embedder may take; None for any.
        accelerator: processes that share out the pictures; None: this one does all.

    Raises:
        RewardError: an embedder raises, returns something unusable, or is late.
        ValueError: the two are not of the same prompts.
    """
    n = len(after.prompts)
    if list(before.prompts[:n]) != list(after.prompts):
        raise ValueError("before and after must be of the same prompts, sample by sample")
    was = before.first(n)
    numbers = {"reward": Estimate.of(after.rewards)}
    numbers["reward_gain"] = Estimate.of(after.rewards - was.rewards)
    for name, values in after.judged.items():
        numbers[f"judge.{name}"] = Estimate.of(values)
        numbers[f"judge_gain.{name}"] = Estimate.of(values - was.judged[name])
        numbers[f"judge_std.{name}"] = standard_deviation(was.judged[name])
    for name, nats in (("path_kl", after.path_kl), ("chain_kl", after.chain_kl)):
        if bool(torch.isfinite(nats).all()):
            numbers[name] = Estimate.of(nats)
    spaces = {PIXELS: (pixel_distances, was.images, after.images)}
    both = (was.images, after.images)
    for name, embedder in (embedders or {}).items():
        what = f"embedding of {type(embedder).__name__} ({name}) on {n} pictures"

        def embedded(
            some: Tensor, embedder: rewards.Embedder = embedder, what: str = what
        ) -> Tensor:
            return rewards.within(
                reward_timeout, partial(rewards.embed, embedder, some), what, some
            )

        old, new = (_of_all(embedded, pictures, accelerator) for pictures in both)
        spaces[name] = (cosine_distances, old, new)
    if stlpips is not None:
        vectors = partial(perceptual.vectors, stlpips)
        old, new = (_of_all(vectors, pictures, accelerator) for pictures in both)
        spaces[perceptual.STLPIPS] = (perceptual.squared_distances, old, new)
    for name, (distances, old, new) in spaces.items():
        numbers |= _in_space(name, distances, old, new, after.prompts)
    return numbers


def _of_all(
    function: Callable[[Tensor], Tensor], pictures: Tensor, accelerator: Accelerator | None
) -> Tensor:
    """A function of pictures, each by itself, which processes share out."""

    def asked(own: range) -> dict[str, Tensor]:
        return {"": function(pictures[own.start : own.stop])}

    return parallel.of_all(asked, len(pictures), accelerator)[""]


def _in_space(
    name: str,
    distances: Callable[[Tensor, Tensor], Tensor],
    old: Float[Tensor, " n *picture"],
    new: Float[Tensor, " n *picture"],
    prompts: Sequence[str],
) -> dict[str, Estimate]:
    """Diversity, distance and separation in one space."""
    formerly = distances(old, old)
    of_seeds = [distances(new[k : k + 1], old[k : k + 1])[0, 0] for k in range(len(new))]
    numbers = {"distance": Estimate.of(torch.stack(of_seeds))}

    def was(rows: list[int]) -> Tensor:
        return formerly[rows][:, rows]

    def now(rows: list[int]) -> Tensor:
        return distances(new[rows], new[rows])

    pairs = {
        "separation": mean_over_pairs(was, [""] * len(prompts)),
        "diversity": mean_over_pairs(now, prompts),
        "pretrained_diversity": mean_over_pairs(was, prompts),
        "diversity_gain": mean_over_pairs(lambda rows: now(rows) - was(rows), prompts),
    }
    numbers |= {what: value for what, value in pairs.items() if value is not None}
    return {f"{what}.{name}": value for what, value in numbers.items()}


# -- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether reward was gained at the cost of judges, diversity or the pictures themselves.

    Attributes:
        fallen: what fell by more than a margin that matters, as "judge NAME", "diversity of SPACE"
            or "pictures"; empty if nothing did.
        since: the update of the first line from which on all say so.
        sentence: what was seen, in plain words with numbers, and what could not be seen.
        over_optimised: the reward rose, while a judge fell, a diversity collapsed, or the pictures
            were lost.
    """

    fallen: tuple[str, ...]
    since: int | None
    sentence: str
    over_optimised: bool = False


@dataclass(frozen=True)
class _Change:
    """A mean with its standard error and the degrees of freedom of a t-bound."""

    mean: float
    error: float
    degrees: float

    def beyond(self, margin: float, level: float) -> bool:
        """Whether the mean is above a margin but for a probability of ``level``."""
        return self.mean - margin > self.error * _quantile(self.degrees, level)

    def plus(self, factor: float, other: "_Change") -> "_Change":
        """This plus ``factor`` times another, of any dependence: errors add up."""
        error = self.error + abs(factor) * other.error
        return _Change(self.mean + factor * other.mean, error, min(self.degrees, other.degrees))

    def times(self, factor: float) -> "_Change":
        """``factor`` times this."""
        return _Change(factor * self.mean, abs(factor) * self.error, self.degrees)

    def __str__(self) -> str:
        known = f" ± {self.error:.2g}" if math.isfinite(self.error) else ""
        return f"{self.mean:+.3g}{known}".replace("-", "\N{MINUS SIGN}")


def _quantile(degrees: float, level: float) -> float:
    return float(stdtrit(degrees, 1 - level))


@dataclass(frozen=True)
class _Findings:
    """What the last of some lines says.

    Attributes:
        rise: of the reward over the pretrained model.
        risen: whether that is beyond chance.
        falls: what fell -> by how much, in words.
        severe: those of them that make a rise of the reward an over-optimisation.
        held: names that did not fall by more than their margin, beyond chance.
    """

    rise: _Change
    risen: bool
    falls: Mapping[str, str]
    severe: frozenset[str]
    held: frozenset[str]

    @property
    def over_optimised(self) -> bool:
        return self.risen and bool(self.severe)


def verdict(lines: Sequence[Mapping[str, Any]], level: float = LEVEL) -> Verdict | None:
    """Say what fell, by how much and since when, and whether it is over-optimisation.

    Args:
        lines: of ``over_optimisation.jsonl``, oldest first: ``update``, and the metrics as plain
            JSON.
        level: probability, at most, that something is said to have fallen that did not fall by its
            margin (see the module).

    Returns:
        None if there is no line.
    """
    if not lines:
        return None
    last = _findings(lines, level)
    since = None
    if last.falls:
        k = len(lines)
        while k > 1:
            before = _findings(lines[: k - 1], level)
            if not (before.over_optimised if last.over_optimised else before.falls):
                break
            k -= 1
        since = int(lines[k - 1]["update"])
    sentence = " ".join([_opening(last, since, lines[-1]), *_distances(last, lines[-1])])
    return Verdict(tuple(last.falls), since, sentence, last.over_optimised)


def _findings(lines: Sequence[Mapping[str, Any]], level: float) -> _Findings:
    now, earlier = lines[-1], lines[:-1]
    keys = [key for key in now if key.startswith(_WATCHED)]
    share = level / 2 if earlier else level
    from_pretrained = share / (len(keys) + 1)  # and the pictures
    from_earlier = share / max(1, len(keys) * len(earlier))
    rise = _read(now, "reward_gain")
    falls, severe, held = dict[str, str](), set[str](), set[str]()
    for key in keys:
        name, (unit, factor) = _name(key), _margin(now, key)
        change = _read(now, key)
        place = "over the pretrained model"
        fall = change.times(-1.0)
        certain = from_pretrained
        if change.plus(factor, unit).beyond(0.0, certain):
            held.add(name)
        if not fall.plus(-factor, unit).beyond(0.0, certain):
            best = max(
                (line for line in earlier if key in line),
                key=lambda line, key=key: line[key]["mean"],
                default=None,
            )
            if best is None or not _since(now, best, "reward_gain").beyond(0.0, LEVEL / 2):
                continue
            certain, fall = from_earlier, _since(now, best, key).times(-1.0)
            place = f"from update {best['update']}"
            if not fall.plus(-factor, unit).beyond(0.0, certain):
                continue
        falls[name] = f"{fall.times(-1.0)} {place}, {_size(key, fall, unit)}"
        collapsed = fall.plus(-COLLAPSE, unit).beyond(0.0, certain)
        if key.startswith("judge_gain.") or collapsed:
            severe.add(name)
    judges = {name for name in held if name.startswith("judge ")} - falls.keys()
    if not judges and _lost(now, from_pretrained):
        falls["pictures"] = "nothing left of the pretrained ones of their seeds"
        severe.add("pictures")
    risen = rise.beyond(0.0, LEVEL / 2)
    return _Findings(rise, risen, falls, frozenset(severe), frozenset(held - falls.keys()))


def _lost(now: Mapping[str, Any], level: float) -> bool:
    """Whether the pictures are far from the pretrained ones in every space."""
    known = "path_kl" in now
    if known and not _read(now, "path_kl").beyond(FAR, level):
        return False
    spaces = [key.partition(".")[2] for key in now if key.startswith("distance.")]
    if not spaces or any(f"separation.{space}" not in now for space in spaces):
        return False
    return all(
        _read(now, f"distance.{space}")
        .plus(-_far(space, known), _read(now, f"separation.{space}"))
        .beyond(0.0, level)
        for space in spaces
    )


def _far(space: str, path_kl_known: bool) -> float:
    """The distance that is far, in separations."""
    if not path_kl_known:
        return 1.0
    return math.sqrt(0.5) if space == PIXELS else 0.5


def _margin(now: Mapping[str, Any], key: str) -> tuple[_Change, float]:
    """The unit in which a fall is measured, and how many of them matter."""
    kind, _, what = key.partition(".")
    if kind == "judge_gain":
        return _read(now, f"judge_std.{what}"), JUDGE_FALL
    return _read(now, f"pretrained_diversity.{what}"), DIVERSITY_FALL


def _read(line: Mapping[str, Any], key: str) -> _Change:
    estimate = line[key]
    error, n = estimate["standard_error"], estimate["n"]
    of_pairs = "diversity" in key.partition(".")[0]
    degrees = max(1.0, 2 * n / 3 if of_pairs else n - 1.0)
    return _Change(float(estimate["mean"]), math.inf if error is None else float(error), degrees)


def _since(now: Mapping[str, Any], then: Mapping[str, Any], key: str) -> _Change:
    """The change of a gain since an earlier line, as if the two were independent."""
    new, old = _read(now, key), _read(then, key)
    degrees = min(new.degrees, old.degrees)
    return _Change(new.mean - old.mean, math.hypot(new.error, old.error), degrees)


# -- words ---------------------------------------------------------------------------------------


def _constant(now: Mapping[str, Any]) -> bool:
    """Whether all samples have one reward, which is that of the pretrained model's."""
    reward, gain = now.get("reward"), now["reward_gain"]
    if reward is None or gain["mean"] != 0:
        return False
    return reward["standard_error"] == 0 and gain["standard_error"] == 0


def _opening(seen: _Findings, since: int | None, now: Mapping[str, Any]) -> str:
    reward = f"the reward has risen ({seen.rise} over the pretrained model)"
    words = _list([_fell(name, how) for name, how in seen.falls.items()])
    unjudged = not any(key.startswith("judge_gain.") for key in now)
    if not seen.risen:
        if not seen.falls and _constant(now):
            return (
                f"Every held-out sample has the reward {now['reward']['mean']:g}, before and "
                "after: where all samples have the same, there is nothing to learn from."
            )
        start = f"The reward has not risen beyond chance ({seen.rise})"
        if seen.falls:
            return f"{start}, yet since update {since} {words}: the model got worse."
        return f"{start}, so there is no over-optimisation to see."
    if seen.falls:
        only_variety = all(name.startswith("diversity") for name in seen.falls)
        if not only_variety:
            return f"Over-optimisation: since update {since} {reward} while {words}."
        start = "Over-optimisation, if variety matters" if seen.severe else "Less variety"
        judges = "There was no judge" if unjudged else "No judge fell"
        return (
            f"{start}: since update {since} {reward} while {words}. {judges}; the optimum that was "
            "asked for may be less diverse than the pretrained model, too."
        )
    return _nothing_fell(seen, now, reward, unjudged)


def _nothing_fell(seen: _Findings, now: Mapping[str, Any], reward: str, unjudged: bool) -> str:
    changes = {_name(key): _read(now, key) for key in now if key.startswith(_WATCHED)}
    held = [f"{_said(name)} ({changes[name]})" for name in changes if name in seen.held]
    unclear = [f"{_said(name)} ({changes[name]})" for name in changes if name not in seen.held]
    judged = any(name.startswith("judge ") for name in seen.held)
    parts = []
    if held:
        has = "has" if len(held) == 1 else "have"
        parts.append(f"{_list(held)} {has} held")
    if unclear:
        parts.append(f"samples are too few to tell for {_list(unclear)}")
    if judged:
        return f"No over-optimisation is seen: {reward}; {', and '.join(parts)}."
    if unjudged:
        parts.append(
            "there was no judge, so only a loss of diversity would have shown"
            if changes
            else "without a judge, and without three pictures of a prompt, over-optimisation "
            "would not show"
        )
    if not held:
        return f"Over-optimisation cannot be told: {reward}; {', and '.join(parts)}."
    return f"No loss of diversity is seen: {reward}; {', and '.join(parts)}."


def _distances(seen: _Findings, now: Mapping[str, Any]) -> list[str]:
    """How far the model is from the pretrained one, where that matters to a reader."""
    far = "path_kl" in now and now["path_kl"]["mean"] > FAR
    sentences = []
    if far:
        judged = any(name.startswith("judge ") for name in seen.held)
        advice = "" if judged or seen.falls else " Look at the pictures before you use the model."
        sentences.append(
            f"The path KL from the pretrained model is {_nats(now['path_kl']['mean'])}, beyond "
            f"what choosing the best of a million pretrained pictures would cost ({FAR:g}).{advice}"
        )
    if "pictures" in seen.falls or far:
        spaces = [key.partition(".")[2] for key in now if key.startswith("distance.")]
        measured = [
            f"{now[f'distance.{space}']['mean']:.3g} against "
            f"{now[f'separation.{space}']['mean']:.3g} ({_space(space)})"
            for space in spaces
            if f"separation.{space}" in now
        ]
        if measured:
            sentences.append(
                "Mean distance of a picture from the pretrained one of its seed, against that of "
                f"two pretrained pictures: {_list(measured)}."
            )
    return sentences


def _nats(value: float) -> str:
    return f"{value:.3g} nats" if value < 1000 else f"{value:,.0f} nats"


def _said(name: str) -> str:
    """A judge that is called judge is the judge."""
    return "the judge" if name == "judge judge" else name


def _fell(name: str, how: str) -> str:
    return f"the pictures have {how}" if name == "pictures" else f"{_said(name)} fell ({how})"


def _size(key: str, fall: _Change, unit: _Change) -> str:
    share = fall.mean / unit.mean if unit.mean else math.inf
    if key.startswith("judge_gain."):
        return f"{share:.2g} standard deviations of the pretrained model's samples"
    return f"{100 * share:.0f} % of the pretrained model's"


def _name(key: str) -> str:
    kind, _, what = key.partition(".")
    return f"judge {what}" if kind == "judge_gain" else f"diversity of {_space(what)}"


def _space(name: str) -> str:
    return {PIXELS: PIXELS, perceptual.STLPIPS: "ST-LPIPS"}.get(name, f"the {name}'s features")


def _list(words: Sequence[str]) -> str:
    if not words:
        return ""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
