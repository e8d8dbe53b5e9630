"""Colour as a reward: how much one channel exceeds the others; differentiable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration

_CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True)
class Colour:
    """Mean of one channel minus the mean of the other two, in [-1, 1]."""

    channel: str = "red"
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.channel not in _CHANNELS:
            raise ValueError(f"channel must be one of {_CHANNELS}, got {self.channel!r}")

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return Declaration(
            scale="shares of full brightness, -1 to 1; grey is 0",
            licence="no weights",
            version=self.channel,
            source="this library",
            preprocessing="none",
        )

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """One number for each picture."""
        require_inputs(images, prompts)
        means = images.mean((2, 3))
        chosen = means[:, _CHANNELS.index(self.channel)]
        return 1.5 * chosen - 0.5 * means.sum(1)
