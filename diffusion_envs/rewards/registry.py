"""Rewards by name, as command lines say them: one, or a weighted sum of several.

red                                        needs no model
clip-score                                 needs one: a folder, a file, a hub id or a URL
clip-score=1 jpeg-compressibility=0.1      a weighted sum
my_module:my_function                      one's own
path/file.py:my_function                   one's own, in a file
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from diffusion_envs.rewards import aesthetic, clip_score, hps, image_reward, pick_score
from diffusion_envs.rewards.aesthetic import Aesthetic
from diffusion_envs.rewards.classifier import ClassConfidence, PromptAlignment
from diffusion_envs.rewards.clip_score import CLIPScore
from diffusion_envs.rewards.colour import Colour
from diffusion_envs.rewards.contract import Reward, load, name_of_loaded
from diffusion_envs.rewards.hps import HPS
from diffusion_envs.rewards.image_reward import ImageReward
from diffusion_envs.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from diffusion_envs.rewards.pick_score import PickScore
from diffusion_envs.rewards.remote import Remote
from diffusion_envs.rewards.text_in_picture import ReadableText, TextInPicture
from diffusion_envs.rewards.vlm_judge import VLMJudge
from diffusion_envs.rewards.weighted import Weighted
from diffusion_envs.rewards.weights import Weights

OWN = "my_module:my_function"


@dataclass(frozen=True)
class Named:
    """A reward with a name.

    Attributes:
        kind: its class.
        settings: those of its fields that the name stands for.
        model: what its first field names, in words; None where it needs no model.
        weights: the files of its model, where they can be fetched.
        judges_only: it only judges, and trains nothing.
        at: how it is made from a place, where that is not its first field.
    """

    kind: Callable[..., Reward]
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    weights: Weights | None = None
    judges_only: bool = False
    at: Callable[..., Reward] | None = None

    def make(self, place: str | None) -> Reward:
        """The reward, with its model from a place."""
        return (self.at or self.kind)(*([] if self.model is None else [place]), **self.settings)

    def makes(self, reward: Reward) -> bool:
        """Whether this name is that reward's, wherever its model is."""
        if type(reward) is not self.kind:
            return False
        if self.model is None:
            return reward == self.make(None)
        return all(getattr(reward, name) == value for name, value in self.settings.items())


def _learned(kind: Callable[..., Reward], weights: Weights, **settings: Any) -> Named:
    return Named(kind, settings, "a folder, a file or a hub id", weights)


REWARDS: Mapping[str, Named] = {
    "prompt-alignment": Named(PromptAlignment, {"classifier": "reward"}),
    "class-confidence": Named(ClassConfidence, {"classifier": "reward"}),
    "prompt-alignment-judge": Named(PromptAlignment, {"classifier": "judge"}, judges_only=True),
    "class-confidence-judge": Named(ClassConfidence, {"classifier": "judge"}, judges_only=True),
    "jpeg-compressibility": Named(JpegCompressibility),
    "jpeg-incompressibility": Named(JpegIncompressibility),
    "remote": Named(Remote, model="the URL of a server, such as http://127.0.0.1:8000"),
    "vlm-judge": Named(VLMJudge, model="MODEL@URL of a chat endpoint", at=VLMJudge.at),
    "red": Named(Colour, {"channel": "red"}),
    "green": Named(Colour, {"channel": "green"}),
    "blue": Named(Colour, {"channel": "blue"}),
    "text-in-picture": Named(TextInPicture),
    "readable-text": Named(ReadableText),
    "image-reward": _learned(ImageReward, image_reward.WEIGHTS),
    "hps": _learned(HPS, hps.WEIGHTS, version="2.1"),
    "hps-2.0": _learned(HPS, hps.WEIGHTS_2_0, version="2.0"),
    "pick-score": _learned(PickScore, pick_score.WEIGHTS),
    "clip-score": _learned(CLIPScore, clip_score.WEIGHTS),
    "aesthetic": _learned(Aesthetic, aesthetic.WEIGHTS, version="v2"),
    "aesthetic-v1": _learned(Aesthetic, aesthetic.WEIGHTS_V1, version="v1"),
}


def require_reward(name: str, value: Any) -> None:
    """Refuse what is no reward: words, a class, a table of several, or anything else.

    Args:
        name: of the argument, for messages.
        value: what is there.

    Raises:
        TypeError: it cannot be called with images and prompts; the message says what can.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be a function or an object, got the class {value.__name__}: make one, "
            f"{value.__name__}(...)"
        )
    if callable(value):
        return
    remedy = "pass a function of images and prompts"
    if isinstance(value, str) and value in REWARDS:
        entry = REWARDS[value]
        settings = [f"{name}={setting!r}" for name, setting in entry.settings.items()]
        made: Any = entry.at or entry.kind
        asked = ", ".join(settings if entry.model is None else ["...", *settings])
        remedy = f"from Python it is rewards.{made.__qualname__}({asked})"
    elif isinstance(value, str) and ":" in value:
        remedy = "from Python import the function and pass it itself, or rewards.load(...)"
    elif isinstance(value, Mapping | list | tuple):
        remedy = "for a sum of several pass rewards.Weighted({'name': (reward, weight), ...})"
    raise TypeError(f"{name} must be callable, got {value!r:.80}: {remedy}")


@dataclass(frozen=True)
class Words:
    """A reward in words, until it is known where its model is."""

    words: tuple[str, ...]

    def __call__(self, *_: Any) -> NoReturn:
        """Never: ``resolve`` makes it a reward first."""
        raise TypeError(f"reward {' '.join(self.words)} is words still")


def resolve(
    reward: Reward, judges: Mapping[str, Reward], models: Sequence[str]
) -> tuple[Reward, dict[str, Reward]]:
    """A reward and judges, each made where it is ``Words``.

    Args:
        reward: what trains.
        judges: by name.
        models: PLACE, where one of them needs a model, or NAME=PLACE for each.

    Raises:
        ValueError: a name is none; or where a model is, is not told, or is of no use.
        FileNotFoundError: a model is not there.
    """
    asked = [(reward, "reward"), *((judge, "judge") for judge in judges.values())]
    names = [
        n for each, kind in asked if isinstance(each, Words) for n in weights(each.words, kind)
    ]
    told = places(models, names)
    made = [make(each.words, told, k) if isinstance(each, Words) else each for each, k in asked]
    return made[0], dict(zip(judges, made[1:], strict=True))


def weights(words: Sequence[str], kind: str = "reward") -> dict[str, float]:
    """Names with their weights: NAME alone, or NAME=WEIGHT for each of several.

    Raises:
        ValueError: there is none, or one stands there twice, or a weight is no finite number.
    """
    if len(words) == 1 and "=" not in words[0]:
        return {words[0]: 1.0}
    taken: dict[str, float] = {}
    for word in words:
        name, _, weight = word.partition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or name in taken:
            why = "twice" if name in taken else "without a finite weight"
            raise ValueError(
                f"{kind} {word} is there {why}: say one NAME, or NAME=WEIGHT for each of several, "
                "such as red=1 jpeg-compressibility=0.5"
            )
        taken[name] = value
    if not taken:
        raise ValueError(f"{kind} must name at least one reward, got none")
    return taken


def places(words: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Where the model of each reward is.

    Args:
        words: PLACE, where one reward needs a model, or NAME=PLACE for each.
        names: of all rewards that are asked for.

    Raises:
        ValueError: a reward's place is missing or said twice, or no reward needs it.
    """
    needing = [n for n in dict.fromkeys(names) if n in REWARDS and REWARDS[n].model is not None]
    usage = f"say --reward-model {'PLACE' if len(needing) == 1 else 'NAME=PLACE'}"
    told: dict[str, str] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or name not in REWARDS:  # a place may have an "=", too
            name, place = needing[0] if len(needing) == 1 else "", word
        if name in told or name not in needing:
            why = "stands there twice" if name in told else "is of none of them"
            which = ", ".join(needing) or "none"
            raise ValueError(
                f"reward_model {word} {why}: rewards here that need a model: {which}; {usage}"
            )
        told[name] = place
    if missing := [name for name in needing if name not in told]:
        raise ValueError(f"reward {missing[0]} needs {REWARDS[missing[0]].model}; {usage}")
    return told


def make(words: Sequence[str], models: Mapping[str, str], kind: str = "reward") -> Reward:
    """The reward that words name.

    Args:
        words: one NAME, or several NAME=WEIGHT.
        models: where the models are, by name (``places``).
        kind: what it is for, in messages: "reward" or "judge".

    Raises:
        ValueError: there is no such name, or a weight is none, or a place is not told.
        FileNotFoundError: a model is not there.
    """
    parts = weights(words, kind)
    if len(words) == 1 and "=" not in words[0]:
        return _one(words[0], models, kind)
    return Weighted(
        {_part(name): (_one(name, models, kind), weight) for name, weight in parts.items()}
    )


def _part(name: str) -> str:
    """What a part of a sum is called: one's own by its function's name."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name.rpartition(":")[2])


def _one(name: str, models: Mapping[str, str], kind: str) -> Reward:
    if ":" in name:
        return load(name, kind)
    public = {n: each for n, each in REWARDS.items() if kind == "judge" or not each.judges_only}
    entry = named(kind, name, public, OWN)
    if entry.model is not None and name not in models:
        raise ValueError(f"{kind} {name} needs {entry.model}, and no place is told")
    return entry.make(models.get(name))


def name_of(reward: Reward) -> str | None:
    """The words that make this reward, if there are any, without its model's place."""
    own = name_of_loaded(reward)
    if isinstance(reward, Weighted):
        names = [name_of(part) for part, _ in reward.terms.values()]
        if reward.normalise or None in names:
            return None
        sums = zip(names, reward.terms.values(), strict=True)
        return " ".join(f"{name}={weight:g}" for name, (_, weight) in sums)
    return own or next((name for name, entry in REWARDS.items() if entry.makes(reward)), None)


def named(kind: str, name: str, table: Mapping[str, Any], own: str = "") -> Any:
    """The entry of a table.

    Args:
        kind: what it is for, in messages.
        name: of the entry.
        table: by name.
        own: how one says one's own, if one may.

    Raises:
        ValueError: there is no such name; the nearest is suggested.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    mine = f" (or your own, as {own} or path/file.py:my_function)" if own else ""
    raise ValueError(f"{kind} must be one of {', '.join(table)}, got {name!r}{hint}{mine}")
