"""What fine-tuning did besides raising the reward: a panel of numbers, and a sentence about them.

Everything is measured on held-out seeds, paired with the pretrained model on the same seeds:

    reward, reward_gain          and the gain over the pretrained model
    judge.NAME, judge_gain.NAME  of rewards that only judge
    path_kl                      from the pretrained model, nats; left out where it is not finite
    diversity.SPACE              mean distance of two pictures of one prompt
    diversity_gain.SPACE         less that of the pretrained model's pictures
    distance.SPACE               mean distance of a picture from the pretrained one of its seed

Spaces      "pixels": root mean square difference, values in [0, 1], so the distance is too;
            others: 1 - cosine of the embeddings that a judge or reward offers, in [0, 2].
Diversity   the mean over prompts of the mean over pairs (a U-statistic in each prompt); its
            standard error by the jackknife over samples within prompts ([ES81]: never too small in
            expectation for U-statistics, as n Var(U_n) falls with n), for the gain over the paired
            samples. On three unequal points it is 27 % too large with 4 samples of a prompt, 10 %
            with 8. A prompt with one sample has no pair and is left out; with two, the error is
            unknown (infinite).

The verdict compares the last panel with the pretrained model, and with the panel at which a judge
or a diversity was best, so that it sees what rises first and falls later.

Source      [ES81] Efron & Stein 1981, "The Jackknife Estimate of Variance", Annals of Statistics 9.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import Estimate
from diffusion_envs import rewards
from diffusion_envs.runs.evaluation import Evaluation

PIXELS = "pixels"
_WATCHED = ("judge_gain.", "diversity_gain.")


# -- the numbers ---------------------------------------------------------------------------------


def pixel_distances(
    one: Float[Tensor, " n *picture"], other: Float[Tensor, " m *picture"]
) -> Float[Tensor, "n m"]:
    """Root mean square difference of every picture of one with every one of the other."""
    flat, to = one.flatten(1).double(), other.flatten(1).double()
    return _euclidean(flat, to) / math.sqrt(flat.shape[1])


def cosine_distances(
    one: Float[Tensor, "n width"], other: Float[Tensor, "m width"]
) -> Float[Tensor, "n m"]:
    """1 - cosine of every two embeddings."""
    unit, to = (torch.nn.functional.normalize(v.double(), dim=1) for v in (one, other))
    return 0.5 * _euclidean(unit, to).square()  # |a - b|^2 / 2 = 1 - a.b


def _euclidean(one: Tensor, other: Tensor) -> Tensor:
    direct = "donot_use_mm_for_euclid_dist"  # what is equal is at distance 0 exactly
    return torch.cdist(one, other, compute_mode=direct)


def mean_over_pairs(
    kernel: Callable[[list[int]], Float[Tensor, "k k"]], prompts: Sequence[str]
) -> Estimate | None:
    """Mean over prompts of the mean of a symmetric kernel over pairs, with a jackknife error.

    Args:
        kernel: of all pairs of some samples, given their indices; its diagonal is not used.
        prompts: one for each sample.

    Returns:
        None if no prompt has two samples.
    """
    means, variances, used = [], [], 0
    for prompt in dict.fromkeys(prompts):
        members = [i for i, name in enumerate(prompts) if name == prompt]
        n = len(members)
        if n < 2:
            continue
        used += n
        table = kernel(members).double()
        rows = table.sum(1) - table.diagonal()  # what each sample's pairs add up to
        total = rows.sum() / 2
        means.append(total.item() / (n * (n - 1) / 2))
        if n == 2:
            variances.append(math.inf)
            continue
        without = (total - rows) / ((n - 1) * (n - 2) / 2)  # the mean with one sample left out
        variances.append(((n - 1) / n * (without - without.mean()).square().sum()).item())
    if not means:
        return None
    error = math.sqrt(sum(variances)) / len(means)
    return Estimate(sum(means) / len(means), error, used)


def embeddings(
    reward: rewards.Reward, judges: Mapping[str, rewards.Reward]
) -> dict[str, rewards.Embedder]:
    """Those that the reward and the judges offer, by name."""
    named = {"reward": reward, **judges}
    return {name: found for name, found in named.items() if isinstance(found, rewards.Embedder)}


def panel(
    before: Evaluation,
    after: Evaluation,
    embedders: Mapping[str, rewards.Embedder] | None = None,
) -> dict[str, Estimate]:
    """The numbers of a fine-tuned model, paired with the pretrained one (see the module).

    Args:
        before: the pretrained model; it may have more samples than ``after``, not fewer.
        after: the fine-tuned model on the same seeds.
        embedders: spaces to measure distances in besides pixels, by name.

    Raises:
        ValueError: the two are not of the same prompts.
    """
    n = len(after.prompts)
    if list(before.prompts[:n]) != list(after.prompts):
        raise ValueError("before and after must be of the same prompts, sample by sample")
    was = before.first(n)
    found = {"reward": Estimate.of(after.rewards)}
    found["reward_gain"] = Estimate.of(after.rewards - was.rewards)
    for name, values in after.judged.items():
        found[f"judge.{name}"] = Estimate.of(values)
        found[f"judge_gain.{name}"] = Estimate.of(values - was.judged[name])
    if bool(torch.isfinite(after.path_kl).all()):
        found["path_kl"] = Estimate.of(after.path_kl)
    spaces = {PIXELS: (pixel_distances, was.images, after.images)}
    for name, embedder in (embedders or {}).items():
        old, new = (rewards.embed(embedder, pictures) for pictures in (was.images, after.images))
        spaces[name] = (cosine_distances, old, new)
    for name, (distances, old, new) in spaces.items():
        found |= _distances(name, distances, old, new, after.prompts)
    return found


def _distances(
    name: str,
    distances: Callable[[Tensor, Tensor], Tensor],
    old: Tensor,
    new: Tensor,
    prompts: Sequence[str],
) -> dict[str, Estimate]:
    def gain(members: list[int]) -> Tensor:
        return distances(new[members], new[members]) - distances(old[members], old[members])

    moved = [distances(new[k : k + 1], old[k : k + 1])[0, 0] for k in range(len(new))]
    found = {f"distance.{name}": Estimate.of(torch.stack(moved))}
    diversity = mean_over_pairs(lambda rows: distances(new[rows], new[rows]), prompts)
    changed = mean_over_pairs(gain, prompts)
    if diversity is not None and changed is not None:
        found |= {f"diversity.{name}": diversity, f"diversity_gain.{name}": changed}
    return found


# -- the sentence --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether reward was gained at the cost of judges or diversity.

    Attributes:
        fallen: judges and diversities that fell while the reward rose, as "judge NAME" or
            "diversity of SPACE"; empty if none did.
        since: the first update of the panels, up to the last one, that all say so.
        sentence: plain words.
    """

    fallen: tuple[str, ...]
    since: int | None
    sentence: str

    @property
    def over_optimised(self) -> bool:
        """Whether anything fell while the reward rose."""
        return bool(self.fallen)


def verdict(panels: Sequence[Mapping[str, Any]], z: float = 3.0) -> Verdict | None:
    """Say whether, and since when, reward rises while judges or diversity fall.

    A rise or a fall counts beyond ``z`` standard errors: of the paired gain over the pretrained
    model, or of the difference of two panels' gains, as if they were independent (they share seeds,
    so the error is rather too large). One comparison errs with probability 0.13 % at z = 3; there
    are two of them for each judge and each diversity of a panel.

    Args:
        panels: lines of ``panel.jsonl``, oldest first: ``update``, and estimates as plain JSON.
        z: standard errors.

    Returns:
        None if there is no panel.
    """
    if not panels:
        return None
    last = _traded(panels, z)
    if last:
        k = len(panels)
        while k > 1 and _traded(panels[: k - 1], z):
            k -= 1
        since = int(panels[k - 1]["update"])
        judges = any(name.startswith("judge ") for name in last)
        words = _list([f"{name} ({change})" for name, (_, change) in last.items()])
        reward = next(iter(last.values()))[0]
        opening = (
            f"since update {since} the reward has risen ({reward}) while {words} fell, each by "
            f"more than {z:g} standard errors"
        )
        if judges:
            sentence = f"Over-optimisation: {opening}."
        else:
            sentence = (
                f"Over-optimisation, if variety matters: {opening}. No judge fell; the optimum "
                "that was asked for may be less diverse than the pretrained model, too."
            )
        return Verdict(tuple(last), since, sentence)
    return Verdict((), None, _nothing_fell(panels[-1], z))


def _traded(panels: Sequence[Mapping[str, Any]], z: float) -> dict[str, tuple[str, str]]:
    """Name of what fell by the last panel -> (rise of the reward, its fall), in words."""
    now, found = panels[-1], dict[str, tuple[str, str]]()
    for key in (key for key in now if key.startswith(_WATCHED)):
        known = [then for then in panels[:-1] if key in then]
        best = max(known, key=lambda then: then[key]["mean"], default=None)
        for then in (None, best) if best is not None else (None,):
            rise = _change(now, then, "reward_gain")
            fall = _change(now, then, key)
            if _beyond(rise, z) and _beyond((-fall[0], fall[1]), z):
                place = (
                    "over the pretrained model" if then is None else f"from update {then['update']}"
                )
                found.setdefault(_name(key), (f"{_words(rise)} {place}", f"{_words(fall)} {place}"))
    return found


def _change(
    now: Mapping[str, Any], then: Mapping[str, Any] | None, key: str
) -> tuple[float, float]:
    """Mean and standard error of a gain, or of its change since an earlier panel."""
    mean, error = now[key]["mean"], _error(now[key])
    if then is None:
        return mean, error
    return mean - then[key]["mean"], math.hypot(error, _error(then[key]))


def _error(estimate: Mapping[str, Any]) -> float:
    error = estimate["standard_error"]
    return math.inf if error is None else error


def _beyond(change: tuple[float, float], z: float) -> bool:
    mean, error = change
    return mean > 0 and math.isfinite(error) and mean > z * error


def _nothing_fell(now: Mapping[str, Any], z: float) -> str:
    rise = _change(now, None, "reward_gain")
    watched = [key for key in now if key.startswith(_WATCHED)]
    if not _beyond(rise, z):
        changes = {key: _change(now, None, key) for key in watched}
        lost = [
            f"{_name(key)} ({_words(change)})"
            for key, change in changes.items()
            if _beyond((-change[0], change[1]), z)
        ]
        worse = f"; yet {_list(lost)} fell: the model got worse" if lost else ""
        return (
            f"The reward has not risen by more than {z:g} standard errors ({_words(rise)}), so "
            f"there is no over-optimisation to see{worse}."
        )
    names = [_name(key) for key in watched]
    if not names:
        return (
            f"The reward has risen ({_words(rise)}); without a judge, and with one picture of a "
            "prompt, over-optimisation would not show."
        )
    judged = any(name.startswith("judge ") for name in names)
    unseen = "" if judged else " There was no judge, so only a loss of diversity would have shown."
    return (
        f"No over-optimisation is seen: the reward has risen ({_words(rise)}), and {_list(names)} "
        f"{'has' if len(names) == 1 else 'have'} not fallen by more than {z:g} standard errors."
        f"{unseen}"
    )


def _name(key: str) -> str:
    kind, _, what = key.partition(".")
    if kind == "judge_gain":
        return f"judge {what}"
    return f"diversity of {what}" if what == PIXELS else f"diversity of the {what}'s features"


def _words(change: tuple[float, float]) -> str:
    mean, error = change
    known = f" ± {error:.2g}" if math.isfinite(error) else ""
    return f"{mean:+.3g}{known}".replace("-", "\N{MINUS SIGN}")


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
