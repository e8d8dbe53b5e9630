"""JPEG size as a reward: no network, no download, not differentiable.

Pictures are rounded to 8 bits. The size is that of the compressed picture without its header, which is the
file size of a one-pixel picture: at 32 x 32 the header is more than half of the file and would
make the reward's range look small. Sizes depend on the libjpeg that pillow was built with.

Source  DDPO (Black et al. 2023, arXiv 2305.13301), quality 95, kilobytes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def _file_size(image: Image.Image, quality: int) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


@cache
def _header(quality: int) -> int:
    return _file_size(Image.new("RGB", (1, 1)), quality)


def kilobytes(images: Float[Tensor, "n 3 h w"], quality: int) -> Float[Tensor, " n"]:
    """JPEG size of each picture beyond the header, 1000 bytes."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = [_file_size(Image.fromarray(p), quality) - _header(quality) for p in pixels]
    return torch.tensor(sizes, dtype=torch.float32) / 1000


def _check_quality(quality: int) -> None:
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
        raise ValueError(f"quality must be an integer from 1 to 95, got {quality!r}")


@dataclass(frozen=True)
class JpegCompressibility:
    """Minus the JPEG size in kilobytes: smooth pictures earn more."""

    quality: int = 95

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Kilobytes, negative."""
        return -kilobytes(images, self.quality)


@dataclass(frozen=True)
class JpegIncompressibility:
    """The JPEG size in kilobytes: detailed pictures earn more."""

    quality: int = 95

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Kilobytes."""
        return kilobytes(images, self.quality)
