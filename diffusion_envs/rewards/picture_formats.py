"""Pictures as text, to be sent: PNG in base64 (8 bits), or the exact numbers in base64."""

import base64
import binascii
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Format = Literal["png", "float32"]
FORMATS: tuple[Format, ...] = ("png", "float32")
_FASTEST = 1  # of zlib's levels; decoded pictures hardly compress more at others


def quantised(images: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n h w 3"]:
    """Pictures in [0, 1] rounded to 8 bits, ties to even, on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous()


def png(pixels: UInt8[Tensor, "h w 3"]) -> bytes:
    """One picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG", compress_level=_FASTEST)
    return file.getvalue()


def encode(images: Float[Tensor, "n 3 h w"], form: Format) -> list[Any]:
    """Each picture, on the CPU with values in [0, 1], as JSON can hold it.

    Args:
        images: are clamped.
        form: "png" gives base64; "float32" an object with ``shape`` [3, h, w] and ``data``, base64
            of little-endian numbers in C order.
    """
    if form == "png":
        return [base64.b64encode(png(pixels)).decode() for pixels in quantised(images)]
    numbers = images.float().clamp(0, 1).cpu().numpy().astype("<f4")
    return [
        {"shape": list(each.shape), "data": base64.b64encode(each.tobytes()).decode()}
        for each in numbers
    ]


def decode(pictures: Sequence[Any], form: Format, *, limit: int) -> Float[Tensor, "n 3 h w"]:
    """What ``encode`` has made, again.

    Args:
        pictures: at least one, all of one size.
        form: how they are encoded.
        limit: bytes of all of them together in float32.

    Raises:
        ValueError: a picture is not encoded so, is of another size, or there are too many bytes.
    """
    images, held = list[Tensor](), 0
    for k, picture in enumerate(pictures):
        try:
            made, size = _opened(picture) if form == "png" else _numbers(picture)
            held += size
            if held > limit:
                raise ValueError(f"more than {limit} bytes in float32: send fewer at once")
            images.append(made())
        except (ValueError, TypeError, KeyError, OSError, SyntaxError) as error:
            what = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"picture {k} is no {form}: {what}") from error
        if images[k].shape != images[0].shape:
            raise ValueError(
                f"pictures must be of one size, but picture {k} is {list(images[k].shape)} and "
                f"the first {list(images[0].shape)}"
            )
    return torch.stack(images)


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"base64 must be a string, got {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from error


def _opened(picture: Any) -> tuple[Any, int]:
    """How to decode a PNG, and how many bytes of float32 it will be; its header alone is read."""
    try:
        image = Image.open(io.BytesIO(_bytes(picture)), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error

    def pixels() -> Tensor:
        values = torch.from_numpy(np.array(image.convert("RGB")))
        return values.permute(2, 0, 1).float() / 255

    return pixels, 12 * image.width * image.height


def _numbers(picture: Any) -> tuple[Any, int]:
    """The same of float32 numbers."""
    shape, data = picture["shape"], _bytes(picture["data"])
    whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
    if not whole or len(shape) != 3 or shape[0] != 3 or 4 * math.prod(shape) != len(data):
        raise ValueError(f"shape must be [3, h, w] of {len(data)} bytes, got {shape!r:.80}")

    def pixels() -> Tensor:
        return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(shape))

    return pixels, len(data)
