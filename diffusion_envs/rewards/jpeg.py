"""JPEG size as a reward: no network, no download, not differentiable.

Pictures are rounded to 8 bits, ties to even, and stored by pillow with its default subsampling of
colour. What counts is the compressed picture alone, the bytes after the start-of-scan segment: the
623 bytes of tables before it are the same for every picture, and at 32 x 32 more than half of the
file. One picture, quality and libjpeg give the same size every time; another libjpeg may not.

Source  DDPO (Black et al. 2023, arXiv 2305.13301), quality 95, kilobytes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration


def _compressed_bytes(image: Image.Image, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    file = buffer.getvalue()
    scan = file.rindex(b"\xff\xda")  # start of scan; compressed data escape every 0xff, so the last
    return len(file) - scan - 2 - int.from_bytes(file[scan + 2 : scan + 4], "big")


def kilobytes(images: Float[Tensor, "n 3 h w"], quality: int) -> Float[Tensor, " n"]:
    """Compressed size of each picture without the file's header, in 1000 bytes."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = [_compressed_bytes(Image.fromarray(picture), quality) for picture in pixels]
    return torch.tensor(sizes, dtype=torch.float32) / 1000


def _check_quality(quality: int) -> None:
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
        raise ValueError(f"quality must be an integer from 1 to 95, got {quality!r}")


def _declared(scale: str, quality: int) -> Declaration:
    return Declaration(
        scale=f"{scale}; grows with the number of pixels",
        licence="no weights",
        version=f"JPEG quality {quality}, by pillow's libjpeg, without the file's header",
        source="DDPO, arXiv 2305.13301",
        preprocessing="8 bits, ties to even; not resized",
    )


@dataclass(frozen=True)
class JpegCompressibility:
    """Minus the JPEG size in kilobytes: smooth pictures earn more."""

    quality: int = 95
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return _declared("minus kilobytes of 1000 bytes, below 0", self.quality)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Kilobytes, negative."""
        require_inputs(images, prompts)
        return -kilobytes(images, self.quality)


@dataclass(frozen=True)
class JpegIncompressibility:
    """The JPEG size in kilobytes: detailed pictures earn more."""

    quality: int = 95
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return _declared("kilobytes of 1000 bytes, above 0", self.quality)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Kilobytes."""
        require_inputs(images, prompts)
        return kilobytes(images, self.quality)
