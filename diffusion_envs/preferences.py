"""Who prefers which sample: a reward, a person's recorded choices, or any function.

A preference gives every sample a number; within a group of samples of one prompt the larger number
is preferred, and equal ones are a tie, of which nothing is learned.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require, sent
from ctrl.noise import stream
from diffusion_envs.rewards.rounding import ranks


class MissingChoicesError(LookupError):
    """Samples were made that nobody has compared yet.

    Args:
        message: what is missing, and what to do.
        groups: global indices of the samples, group by group.
        images: theirs, one after another.
        prompts: of each image.
    """

    def __init__(
        self,
        message: str,
        *,
        groups: Sequence[Sequence[int]] = (),
        images: Tensor | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.groups, self.images, self.prompts = groups, images, prompts


@runtime_checkable
class Preference(Protocol):
    """Compares the samples of each group."""

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        rewards: Float[Tensor, " paths"],
        samples: range,
        group: int,
    ) -> Float[Tensor, " paths"]:
        """A number for every sample; larger is preferred within its group of neighbours."""
        ...


def compare(
    preference: Preference,
    images: Tensor,
    prompts: Sequence[str],
    rewards: Float[Tensor, " paths"],
    samples: range,
    group: int,
) -> Float[Tensor, " paths"]:
    """What a preference answers, checked, on the rewards' device.

    Raises:
        ValueError: it did not answer one finite number for each sample.
        MissingChoicesError: it cannot answer yet.
    """
    answer = preference(images, prompts, rewards, samples, group)
    preferences = as_like(torch.as_tensor(answer), rewards)

    def refused() -> ValueError:
        name = getattr(preference, "__name__", type(preference).__name__)
        return ValueError(
            f"preference {name} must answer one finite number for each of {len(samples)} samples, "
            f"got {answer!r:.200}"
        )

    if preferences.shape != rewards.shape:
        raise refused()
    require(preferences.isfinite().all(), refused)
    return preferences


@dataclass(frozen=True)
class FromReward:
    """The sample of the larger reward is preferred; those that rounding tells apart are a tie."""

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        rewards: Float[Tensor, " paths"],
        samples: range,
        group: int,
    ) -> Float[Tensor, " paths"]:
        """Prefer the sample of larger reward: its rank in the group."""
        return ranks(rewards.view(-1, group)).flatten()


@dataclass(frozen=True)
class BradleyTerry:
    """The sample of the larger reward is preferred more often, as by people who are not sure.

    Of two samples one wins with probability sigmoid(difference / temperature), and whole orders
    have Plackett and Luce's probabilities: by Gumbel noise on the rewards. Only for such choices
    is the pretrained law, tilted by exp(reward / (temperature beta)), what preference optimisation
    aims at; where the larger reward always wins (``FromReward``), it aims at the largest alone.

    Attributes:
        temperature: reward that makes odds of e to 1.
        seed: of the noise; a sample's is its own in any batch.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        rewards: Float[Tensor, " paths"],
        samples: range,
        group: int,
    ) -> Float[Tensor, " paths"]:
        """Prefer by the rewards with noise added."""
        uniform = torch.stack(
            [
                torch.rand((), generator=stream(self.seed, "choice", i), dtype=torch.float64)
                for i in samples
            ]
        ).clamp(min=1e-300)
        noise = -(-uniform.log()).log()
        return sent(rewards.cpu().double() + self.temperature * noise, rewards.device)


@dataclass(frozen=True)
class Recorded:
    """Choices that people made, one line of JSON each: {"order": [best, ..., worst]}.

    The numbers are global indices of samples, the same in every run of one seed. A file may grow
    while a run waits: a run that meets samples without a choice stops with ``MissingChoicesError``
    before any weight moves, and goes on when it is resumed.

    Attributes:
        path: of the JSON-lines file.
    """

    path: str | Path

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        rewards: Float[Tensor, " paths"],
        samples: range,
        group: int,
    ) -> Float[Tensor, " paths"]:
        """Minus the place in the recorded order.

        Raises:
            MissingChoicesError: a group has no line.
            ValueError: a line is no choice, or orders other samples than a group's.
        """
        orders = self._orders()
        ranks = torch.zeros(len(samples), dtype=rewards.dtype)
        missing: list[list[int]] = []
        for first in range(0, len(samples), group):
            members = list(samples[first : first + group])
            order = orders.get(frozenset(members))
            if order is None:
                missing.append(members)
                continue
            for place, sample in enumerate(order):
                ranks[first + members.index(sample)] = -float(place)
        if missing:
            places = [samples.index(sample) for members in missing for sample in members]
            kind = "" if Path(self.path).is_file() else " (there is no such file yet)"
            raise MissingChoicesError(
                f"{self.path}{kind} has no choice for {len(missing)} groups of samples: "
                f"{missing[0]} ({prompts[places[0]]!r}) ... {missing[-1]}. Add a line for each, "
                f"such as {json.dumps({'order': missing[0]})}, best first, and resume",
                groups=missing,
                images=images[places],
                prompts=[prompts[k] for k in places],
            )
        return sent(ranks, rewards.device)

    def _orders(self) -> dict[frozenset[int], list[int]]:
        path = Path(self.path)
        if not path.is_file():
            return {}
        orders: dict[frozenset[int], list[int]] = {}
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                order = json.loads(line)["order"]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f'{path}, line {number}: must be {{"order": [best, ..., worst]}}, got {line!r}'
                ) from error
            if (
                not isinstance(order, list)
                or not all(isinstance(k, int) and not isinstance(k, bool) for k in order)
                or len(set(order)) != len(order)
                or len(order) < 2
            ):
                raise ValueError(
                    f"{path}, line {number}: order must be at least two different sample numbers, "
                    f"got {order!r}"
                )
            orders[frozenset(order)] = order  # the last word counts
        return orders
