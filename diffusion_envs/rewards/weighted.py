"""Several rewards at once: their weighted sum, whose parts stay visible in log and report.

Formula     r = sum_k w_k (r_k - mean_k) / std_k, with mean 0 and std 1 where nothing is said.
Statistics  are fixed when the run starts (``statistics``, on pictures of the pretrained model). By
            those of a batch a picture's reward would depend on what else is in the batch, and no
            gain could be told; what compares the paths of a group may standardise each part there
            (``GRPO(advantage="parts")``).
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import sent
from diffusion_envs.rewards.contract import (
    Counting,
    Reward,
    RewardError,
    Scorer,
    differentiable_score,
    require_inputs,
    reward_name,
    score,
)
from diffusion_envs.rewards.rounding import all_alike

_NAME = re.compile(r"[A-Za-z0-9_.:-]+")


@dataclass(frozen=True)
class Part:
    """One reward of a sum, called as it is; it has a name there.

    Attributes:
        reward: what is asked.
        name: "pick", or "learned.pick" of a sum within the sum.
        weight: of the reward, in the units of the sum.
        mean: what is taken from the reward before.
        scale: what the rest is divided by.
    """

    reward: Reward
    name: str
    weight: float
    mean: float = 0.0
    scale: float = 1.0

    @property
    def __name__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For messages."""
        return f"{self.name} of Weighted"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> object:
        """What the reward returns."""
        return self.reward(images, prompts)


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of rewards by name, differentiable exactly if all of them are.

    Attributes:
        terms: each reward and its weight, by a name of letters, digits and any of "_-.:"; a weight
            may be negative, and a reward may be a sum itself, whose parts are "name.part".
        normalise: mean and standard deviation of each term, which are taken out before weighing;
            None for none, and for terms that it does not name.
    """

    terms: Mapping[str, tuple[Reward, float]]
    normalise: Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(
                'terms must be rewards and weights by name, such as {"jpeg": '
                f"(JpegCompressibility(), 0.1)}}, got {self.terms!r:.80}"
            )
        for name, term in self.terms.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"the name of a term must be of letters, digits and any of '_-.:', got {name!r}"
                )
            if not isinstance(term, Sequence) or len(term) != 2 or not callable(term[0]):
                raise ValueError(f"term {name!r} must be (reward, weight), got {term!r:.80}")
            if not _is_number(term[1]) or term[1] == 0:
                raise ValueError(
                    f"the weight of {name!r} must be a finite number other than 0, got "
                    f"{term[1]!r}: leave the term out, or make it a judge"
                )
        for name, fixed in (self.normalise or {}).items():
            if name not in self.terms:
                raise ValueError(
                    f"normalise names {name!r}, which is none of the terms {', '.join(self.terms)}"
                )
            if not (
                isinstance(fixed, Sequence)
                and len(fixed) == 2
                and all(map(_is_number, fixed))
                and fixed[1] > 0
            ):
                raise ValueError(
                    f"normalise of {name!r} must be (mean, std), finite and std positive, got "
                    f"{fixed!r}"
                )

        if len(self.weights) < len(self._parts):
            names = [part.name for part in self._parts]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two parts are called {twice!r}: rename a term")

    @functools.cached_property
    def _parts(self) -> tuple[Part, ...]:
        """Every reward that is no sum, in order."""
        parts: list[Part] = []
        for name, (reward, weight) in self.terms.items():
            mean, scale = (self.normalise or {}).get(name, (0.0, 1.0))
            if not isinstance(reward, Weighted):
                parts.append(Part(reward, name, float(weight), float(mean), float(scale)))
                continue
            parts += [
                Part(p.reward, f"{name}.{p.name}", weight * p.weight, p.mean, scale * p.scale)
                for p in reward._parts
            ]
        return tuple(parts)

    @functools.cached_property
    def _offset(self) -> float:
        """What the means of sums within the sum take away."""
        offset = 0.0
        for name, (reward, weight) in self.terms.items():
            if isinstance(reward, Weighted):
                mean, scale = (self.normalise or {}).get(name, (0.0, 1.0))
                offset += weight * (reward._offset - mean) / scale
        return offset

    @property
    def differentiable(self) -> bool:
        """Whether all rewards declare that they are."""
        return not self.without_gradient

    @property
    def concurrent(self) -> bool:
        """Whether all rewards declare that several threads may call them at once."""
        return all(getattr(part.reward, "concurrent", False) for part in self._parts)

    @property
    def without_gradient(self) -> list[str]:
        """The parts that do not declare to be differentiable, for messages."""
        return [
            f"{part.__name__} ({reward_name(part.reward)})"
            for part in self._parts
            if not getattr(part.reward, "differentiable", False)
        ]

    @property
    def weights(self) -> Mapping[str, float]:
        """Each part's weight; that of a sum within the sum is a product."""
        return {part.name: part.weight for part in self._parts}

    @property
    def counts(self) -> Mapping[str, int]:
        """What the parts count, as "pick.prompts_cut"."""
        return {
            f"{part.name}.{name}": count
            for part in self._parts
            if isinstance(part.reward, Counting)
            for name, count in part.reward.counts.items()
        }

    def parts(
        self, images: Float[Tensor, " n *event"], prompts: Sequence[str], ask: Scorer = score
    ) -> dict[str, Float[Tensor, " n"]]:
        """Every part in units of its own, each asked once and checked by ``ask``.

        Raises:
            RewardError: "reward pick of Weighted" raised, or returned something unusable.
        """
        return {part.name: ask(part, images, prompts) for part in self._parts}

    def total(self, parts: Mapping[str, Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
        """Their weighted sum."""
        terms = [p.weight / p.scale * (parts[p.name] - p.mean) for p in self._parts]
        return torch.stack(terms).sum(0) + self._offset

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """The weighted sum.

        Raises:
            RewardError: as of ``parts``.
        """
        require_inputs(images, prompts)
        if images.requires_grad and torch.is_grad_enabled() and self.differentiable:
            return self.total(self.parts(images, prompts, differentiable_score))
        parts = self.parts(images.detach().clamp(0, 1), prompts)
        return sent(self.total(parts), images.device)


def statistics(
    rewards: Weighted | Mapping[str, tuple[Reward, float]],
    images: Float[Tensor, "n 3 h w"],
    prompts: Sequence[str],
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of every term, to be ``Weighted(terms, normalise=...)``.

    Args:
        rewards: a sum, or what one is made of.
        images: of the pretrained model, whose rewards the terms are to be measured by; a hundred
            tell a standard deviation to 7 % if rewards are normal.
        prompts: of each.

    Raises:
        RewardError: a term tells these pictures apart by rounding alone.
        ValueError: there are less than two pictures.
    """
    terms = rewards.terms if isinstance(rewards, Weighted) else rewards
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, got {len(images)}")
    measured: dict[str, tuple[float, float]] = {}
    for name, (reward, weight) in terms.items():
        values = score(Part(reward, name, weight), images, prompts)
        if bool(all_alike(values)):
            raise RewardError(
                f"reward {name} ({reward_name(reward)}) gives all {len(images)} images "
                f"{values[0].item():g}: they have no standard deviation to divide by; use others"
            )
        wide = values.double()
        measured[name] = wide.mean().item(), wide.std().item()
    return measured


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
