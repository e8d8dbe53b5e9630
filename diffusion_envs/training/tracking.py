"""What a run leaves for the eye: metrics as JSON lines and TensorBoard events, and grids of pictures."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from ctrl.estimate import Estimate

_TILE = 96  # pixels a side of a small picture in a grid; larger pictures keep their size
_CAPTION = 14  # pixels of height


def grid(
    images: Float[Tensor, "n 3 h w"], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Pictures with values in [0, 1] side by side, each with its caption below.

    Small pictures are enlarged by whole factors without smoothing, so that pixels stay visible.

    Raises:
        ValueError: there is not one caption for each picture, or no picture.
    """
    if len(images) != len(captions) or not len(images):
        raise ValueError(
            f"captions must be one for each picture, got {len(captions)}, {len(images)}"
        )
    height, width = images.shape[-2:]
    factor = max(1, _TILE // width)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    tile = (width * factor + 4, height * factor + _CAPTION + 4)
    sheet = Image.new("RGB", (columns * tile[0], rows * tile[1]), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for k, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = (k % columns) * tile[0] + 2, (k // columns) * tile[1] + 2
        enlarged = np.repeat(np.repeat(picture, factor, 0), factor, 1)
        sheet.paste(Image.fromarray(enlarged), (left, top))
        letters = max(4, width * factor // 6)
        text = caption if len(caption) <= letters else "…" + caption[1 - letters :]
        draw.text((left, top + height * factor), text, fill="black")
    return sheet
