"""Pictures side by side with their captions below; a sheet knows its captions, whatever fonts do.

The captions are drawn into the sheet by the fonts that there are (``caption_fonts``), and stand in
it as text too, from which the report takes them.
"""

import io
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion_envs.runs import caption_fonts

_SMALL, _LARGE = 112, 256  # pixels a side: smaller pictures are enlarged, larger ones reduced
_GAP = 6  # pixels around a picture
_LINE = 15  # pixels a line of caption
_CAPTION_LINES = 2
_LETTERS = 200  # of a caption that are looked at: no two lines hold more
_KEY = "ctrl"  # of the text in the file


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet, as PNG, and its caption."""

    png: bytes
    caption: str


def grid(
    images: Float[Tensor, "n 3 h w"], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Pictures with values in [0, 1] side by side, each with its caption below.

    Small pictures are enlarged by whole factors without smoothing, so that pixels stay visible;
    large ones are reduced to 256 pixels.

    Raises:
        ValueError: there is not one caption for each picture, no picture, or no column.
    """
    if len(images) != len(captions) or not len(images):
        raise ValueError(
            f"captions must be one for each of at least one picture, got {len(captions)} for "
            f"{len(images)}"
        )
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    tiles = [_resized(picture) for picture in pixels]
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    cell = (width + _GAP, height + _CAPTION_LINES * _LINE + _GAP)
    sheet = Image.new(
        "RGB", (columns * cell[0] + _GAP, math.ceil(len(tiles) / columns) * cell[1] + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for k, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = _corner(k, columns, (width, height))
        sheet.paste(tile, (left, top))
        for row, line in enumerate(_wrapped(caption, width)):
            corner = left, top + height + row * _LINE
            caption_fonts.draw(draw, corner, line, fill="#333")
    told = {"captions": [str(c) for c in captions], "columns": columns, "tile": [width, height]}
    sheet.info[_KEY] = json.dumps(told)
    return sheet


def _resized(picture: np.ndarray) -> Image.Image:
    tile = Image.fromarray(picture)
    if max(tile.size) > _LARGE:
        shrink = _LARGE / max(tile.size)
        return tile.resize(
            [max(1, round(side * shrink)) for side in tile.size], Image.Resampling.LANCZOS
        )
    factor = max(1, _SMALL // max(tile.size))
    return tile.resize([side * factor for side in tile.size], Image.Resampling.NEAREST)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines no wider than a picture; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in caption_fonts.drawable(text[:_LETTERS]).split():
        longer = f"{lines[-1]} {word}".strip()
        if caption_fonts.width(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _CAPTION_LINES:
        lines = [*lines[: _CAPTION_LINES - 1], " ".join(lines[_CAPTION_LINES - 1 :])]
    return [_cut(line, width) for line in lines]


def _cut(line: str, width: int) -> str:
    if caption_fonts.width(line) <= width:
        return line
    # as many letters as fit; asking for each number of them takes a second for a long prompt
    fit = bisect_right(
        range(1, len(line)), width, key=lambda n: caption_fonts.width(line[:n] + "…")
    )
    return line[:fit] + "…"


def save(sheet: Image.Image, path: Path) -> None:
    """Write a sheet of ``grid`` as PNG, with its captions and where its pictures are as text."""
    told = PngInfo()
    told.add_itxt(_KEY, sheet.info[_KEY])
    sheet.save(path, format="PNG", pnginfo=told)


def tiles(path: Path) -> list[Tile]:
    """The pictures of a sheet with their captions; none of a file that does not tell them."""
    with Image.open(path) as sheet:
        sheet.load()  # text may stand behind the pixels
        if _KEY not in sheet.info:
            return []
        told = json.loads(sheet.info[_KEY])
        width, height = told["tile"]
        made = []
        for k, caption in enumerate(told["captions"]):
            left, top = _corner(k, told["columns"], (width, height))
            data = io.BytesIO()
            sheet.crop((left, top, left + width, top + height)).save(data, format="PNG")
            made.append(Tile(data.getvalue(), caption))
    return made


def _corner(k: int, columns: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Left upper corner of a picture."""
    width, height = tile[0] + _GAP, tile[1] + _CAPTION_LINES * _LINE + _GAP
    return k % columns * width + _GAP, k // columns * height + _GAP
