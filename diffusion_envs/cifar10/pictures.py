"""CIFAR-10 as what samples should look like, for objectives that learn their reward from data."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from diffusion_envs.cifar10.data import LabelledImages, load


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder, in [-1, 1], drawn with replacement and mirrored at random.

    Attributes:
        folder: of CIFAR-10, in any of the layouts that ``cifar10.data.load`` reads.
        split: "train" or "test".
        mirrored: whether every other picture, at random, is mirrored.

    Raises:
        FileNotFoundError: there is no such folder; or, when pictures are drawn, no CIFAR-10 in it.
        ValueError: when pictures are drawn: what is in it is damaged (``cifar10.data.load``).
    """

    folder: Path
    split: Literal["train", "test"] = "train"
    mirrored: bool = True

    def __post_init__(self) -> None:
        path = Path(self.folder).expanduser().absolute()  # a resumed run may be elsewhere
        if not path.is_dir():
            raise FileNotFoundError(f"folder must hold CIFAR-10, but {path} is no folder")
        object.__setattr__(self, "folder", path)

    @cached_property
    def _loaded(self) -> LabelledImages:
        return load(self.folder, self.split)

    def draw(self, n: int, generator: Generator) -> Float[Tensor, "n 3 32 32"]:
        """So many pictures, float32."""
        images = self._loaded.images
        rows = torch.randint(len(images), (n,), generator=generator)
        drawn = images[rows].float() / 127.5 - 1
        if not self.mirrored:
            return drawn
        turned = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        return torch.where(turned, drawn.flip(-1), drawn)
