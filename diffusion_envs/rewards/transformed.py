"""A reward with a limit, a threshold or a memory; each is a reward again.

They wrap a reward from outside, so ``Weighted`` goes around them: of a sum inside, the log shows no
parts.
"""

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import sent
from diffusion_envs.prompt import described
from diffusion_envs.rewards.contract import (
    Counting,
    Reward,
    differentiable_score,
    require_inputs,
    reward_name,
    score,
)


@dataclass(frozen=True)
class _Wrapped:
    """What asks another reward; see there for errors.

    Attributes:
        reward: what is asked.
    """

    reward: Reward

    @property
    def __name__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For messages."""
        return f"{type(self).__name__}({reward_name(self.reward)})"

    @property
    def counts(self) -> Mapping[str, int]:
        """What the reward counts, if it does."""
        return _counts(self.reward)

    def _inner(self, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """The reward, checked, with its gradient where it has one and the images need it."""
        require_inputs(images, prompts)
        if (
            images.requires_grad
            and torch.is_grad_enabled()
            and getattr(self.reward, "differentiable", False)
        ):
            return differentiable_score(self.reward, images, prompts)
        values = score(self.reward, images.detach().clamp(0, 1), prompts)
        return sent(values, images.device)


@dataclass(frozen=True)
class Limited(_Wrapped):
    """A reward that counts no further than to a limit; beyond, its gradient is 0.

    Attributes:
        reward: what is limited.
        lower: least value, None for none.
        upper: largest value, None for none: enough of one reward, so that others are improved.
    """

    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        low = -math.inf if self.lower is None else self.lower
        high = math.inf if self.upper is None else self.upper
        if (self.lower is None and self.upper is None) or not low < high:
            raise ValueError(
                f"lower or upper must be set, and lower below upper, got {self.lower} and "
                f"{self.upper}"
            )

    @property
    def concurrent(self) -> bool:
        """Whether several threads may call the reward at once."""
        return getattr(self.reward, "concurrent", False)

    @property
    def differentiable(self) -> bool:
        """Whether the reward is."""
        return getattr(self.reward, "differentiable", False)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """The reward, at least ``lower`` and at most ``upper``."""
        return self._inner(images, prompts).clamp(self.lower, self.upper)


@dataclass(frozen=True)
class Threshold(_Wrapped):
    """1 where a reward is at least ``at``, else ``otherwise``; no gradient.

    Attributes:
        reward: what is compared.
        at: with what.
        otherwise: below it, less than 1.
    """

    at: float
    otherwise: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.at) or not -math.inf < self.otherwise < 1:
            raise ValueError(
                f"at must be finite and otherwise below 1, got {self.at} and {self.otherwise}"
            )

    @property
    def concurrent(self) -> bool:
        """Whether several threads may call the reward at once."""
        return getattr(self.reward, "concurrent", False)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """1 or ``otherwise``."""
        require_inputs(images, prompts)
        values = self._inner(images.detach(), prompts)
        return torch.where(values >= self.at, 1.0, self.otherwise)


@dataclass(frozen=True)
class Cached(_Wrapped):
    """A reward that is asked once for a picture and prompt; for what is not random.

    A picture is known by the SHA-256 of its shape, type and bytes, a prompt with its columns. Where
    a gradient is needed the reward is asked itself, and nothing is remembered. Counts
    ``cache_hits`` and ``cache_misses``.

    Attributes:
        reward: what is asked.
        size: pictures that are remembered, those asked for last.
    """

    size: int = 100_000
    _known: OrderedDict[bytes, float] = field(
        default_factory=OrderedDict, init=False, compare=False, repr=False
    )
    _counted: Counter[str] = field(default_factory=Counter, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be an integer of at least 1, got {self.size!r}")

    @property
    def differentiable(self) -> bool:
        """Whether the reward is."""
        return getattr(self.reward, "differentiable", False)

    @property
    def counts(self) -> Mapping[str, int]:
        """Pictures that were known and that were not, and what the reward counts."""
        own = {name: self._counted[name] for name in ("cache_hits", "cache_misses")}
        return {**_counts(self.reward), **own}

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """The reward of each picture, those that are not known asked together."""
        require_inputs(images, prompts)
        if images.requires_grad and torch.is_grad_enabled() and self.differentiable:
            return self._inner(images, prompts)
        host = images.detach().cpu()
        keys = [_key(*pair) for pair in zip(host, prompts, strict=True)]
        rows = {key: k for k, key in enumerate(keys) if key not in self._known}
        scores = {key: self._known[key] for key in keys if key in self._known}
        if rows:
            chosen = list(rows.values())
            values = self._inner(images.detach()[chosen], [prompts[k] for k in chosen])
            scores |= zip(rows, values.tolist(), strict=True)
        self._counted.update(cache_hits=len(keys) - len(rows), cache_misses=len(rows))
        for key in keys:
            self._known[key] = scores[key]
            self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return sent(torch.tensor([scores[key] for key in keys]), images.device)


def _counts(reward: Reward) -> Mapping[str, int]:
    return reward.counts if isinstance(reward, Counting) else {}


def _key(image: Tensor, prompt: str) -> bytes:
    shape = f"{image.dtype} {list(image.shape)} {described(prompt)}".encode()
    data = image.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(len(shape).to_bytes(8, "big") + shape + data).digest()
