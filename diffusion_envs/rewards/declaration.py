"""What a reward declares about itself: scale, licence, version, source and preprocessing."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from diffusion_envs.rewards.preprocessing import Preprocessing


@dataclass(frozen=True)
class Declaration:
    """What a reader of a score has to know to compare it with another.

    Attributes:
        scale: unit and usual range, in words.
        licence: SPDX identifier of the weights' licence, or what is known of it.
        version: which publication of weights and formula, such as "HPSv2.1".
        source: paper or repository.
        preprocessing: how pictures are prepared.
    """

    scale: str
    licence: str
    version: str
    source: str
    preprocessing: Preprocessing | str


@runtime_checkable
class Declaring(Protocol):
    """A reward that declares its scale, licence, version, source and preprocessing."""

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        ...
