"""How pictures are prepared for a network: resized, cropped or padded, normalised; differentiable.

Resizing is bicubic with a = -0.5 and antialiased, as pillow does it: when a picture shrinks, the
kernel grows with it. Pillow works on 8-bit pictures: it rounds and saturates after the horizontal
pass and again after the vertical one. ``quantise`` does the same with a straight-through gradient.
Without it everything is computed in float, which is smoother in the pixels. Measured on uniform
noise, that is 0.3 to 0.4 in 255 away from pillow on average (two roundings), and 2.3 at most from
512 to 224 pixels a side. Single pixels differ by more where the horizontal pass leaves [0, 255],
because pillow cuts there what float arithmetic keeps: by up to 16 in 255 where noise is enlarged,
30 where black-and-white noise is. With ``quantise``, fewer than 0.4 % of the values differ from
pillow's, each by one level (pillow's kernel is in fixed point). From version 13 on pillow takes the
vertical pass first where the height shrinks much more than the width, which only "stretch" does.

Public packages agree on the kernel but not on odd sizes (``Preprocessing.rounding``).

Sources  torchvision.transforms.functional: resize, center_crop (crop at round((h - size) / 2), ties
to even); transformers.image_transforms: get_resize_output_image_size, center_crop (crop at
(h - size) // 2); open_clip.transform: ResizeMaxSize (sizes rounded, smaller half of the padding
first).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ctrl.devices import sent

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Fit = Literal["crop", "pad", "stretch"]
Rounding = Literal["torchvision", "transformers", "open_clip"]


def _rounded(images: Tensor) -> Tensor:
    """To the nearest of 256 levels, ties to even, with the gradient of the identity."""
    levels = 255 * images
    return (levels + (levels.round() - levels).detach()) / 255  # exact: the sum is the integer


@dataclass(frozen=True)
class Preprocessing:
    """Pictures of any size in [0, 1] -> normalised pictures of the network's size.

    Attributes:
        size: pixels a side of the network's input.
        fit: "crop": the shortest side becomes ``size``, then the centre is cut out; "pad": the
            longest side becomes ``size``, then zeros (before normalising: black) fill the rest;
            "stretch": both sides become ``size``.
        mean: subtracted from each channel.
        std: each channel is divided by it, afterwards.
        rounding: whose rule of odd sizes. "torchvision": the other side is cut to an integer, the
            crop starts at half the difference, ties to even; "transformers": the crop starts at
            half the difference, cut to an integer; "open_clip": the other side is rounded, ties to
            even, and the crop is torchvision's.
        quantise: round to 8 bits before (a stored picture) and after each pass of resizing
            (pillow), with the gradient of the identity.
        saturate: cut what resizing takes out of [0, 1], as pillow does; torchvision does not where
            it resizes a float tensor.
    """

    size: int
    fit: Fit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rounding: Rounding
    quantise: bool = False
    saturate: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be a positive number of pixels, got {self.size!r}")
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit must be one of {get_args(Fit)}, got {self.fit!r}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding must be one of {get_args(Rounding)}, got {self.rounding!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ValueError(
                "mean and std must have one number for each of three channels, std above 0, got "
                f"{self.mean} and {self.std}"
            )

    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 size size"]:
        """Prepared pictures, in float32 (float64 where they come in it).

        Values outside [0, 1] are cut first; they get no gradient.
        """
        if images.dtype != torch.float64:
            images = images.float()
        images = images.clamp(0, 1)
        if self.quantise:
            images = _rounded(images)
        images = self._fitted(self._resized(images))
        statistics = torch.tensor([self.mean, self.std], dtype=images.dtype)
        mean, std = sent(statistics, images.device)[:, :, None, None]
        return (images - mean) / std

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, before cropping or padding."""
        if self.fit == "stretch":
            return self.size, self.size
        if self.rounding == "open_clip":
            side = max(height, width) if self.fit == "pad" else min(height, width)
            scale = self.size / float(side)
            return max(1, round(height * scale)), max(1, round(width * scale))
        short, long = sorted((height, width))
        other = self.size * long // short if self.fit == "crop" else self.size * short // long
        other = max(1, other)
        return (
            (self.size, other) if (height <= width) == (self.fit == "crop") else (other, self.size)
        )

    def _resized(self, images: Tensor) -> Tensor:
        height, width = self.resized(*images.shape[-2:])
        passes = (
            [(images.shape[-2], width), (height, width)] if self.quantise else [(height, width)]
        )
        for size in passes:  # pillow's order: along each row first
            if size == tuple(images.shape[-2:]):
                continue
            images = functional.interpolate(images, size, mode="bicubic", antialias=True)
            if self.saturate:
                images = images.clamp(0, 1)
            if self.quantise:
                images = _rounded(images)
        return images

    def _fitted(self, images: Tensor) -> Tensor:
        excess_h, excess_w = (side - self.size for side in images.shape[-2:])
        if self.fit == "pad":
            top, left = -excess_h // 2, -excess_w // 2
            return functional.pad(images, (left, -excess_w - left, top, -excess_h - top))
        if self.rounding == "transformers":
            top, left = excess_h // 2, excess_w // 2
        else:
            top, left = round(excess_h / 2), round(excess_w / 2)
        return images[..., top : top + self.size, left : left + self.size]
