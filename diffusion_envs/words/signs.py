"""Pictures of signs with a word of one to three capital letters, and their captions.

A sign is a plate on a flat background. Each letter is centred in a cell of its own, as on a sign
with letters to hang up, so words of one length have their letters at the same places. Font, colours
and place vary; letters are always clearly darker than their plate. (If they could be lighter, too,
the mean picture of a word would not show it, and a denoiser learns to read captions much later.)
"""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 3  # letters a word
SIDE = 32  # pixels of a picture
FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold")  # matplotlib brings them
PROMPTS = Path(__file__).parent / "prompts"  # training.txt and held_out.txt, for fine-tuning
_FINE = 4  # subpixels a pixel, each way
_CELL = 9  # pixels from one letter to the next
_HEIGHT = 12  # pixels of a capital letter
_WIDEST = 8.5  # pixels of a letter; wider ones are drawn narrower
_CONTRAST = 0.6  # least difference in brightness between letters and plate
_LUMA = (0.299, 0.587, 0.114)


def caption(word: str) -> str:
    """What a picture of this word is called."""
    return f'a sign that says "{word}"'


def held_out(word: str) -> bool:
    """Whether no picture of this word is trained on: one in five of two or three letters."""
    return len(word) > 1 and zlib.crc32(word.encode()) % 5 == 0


@cache
def all_words(length: int) -> tuple[str, ...]:
    """Every string of this many letters, in order."""
    if not length:
        return ("",)
    return tuple(word + letter for word in all_words(length - 1) for letter in LETTERS)


@cache
def training_words(length: int) -> tuple[str, ...]:
    """Those that may be trained on."""
    return tuple(word for word in all_words(length) if not held_out(word))


def draw_words(n: int, generator: Generator) -> list[str]:
    """Random words to train on: 1 in 10 of one letter, 2 in 10 of two, the others of three."""
    lengths, places = torch.randint(2**30, (2, n), generator=generator).tolist()
    words = []
    for length, place in zip(lengths, places, strict=True):
        among = training_words((1, 2, 2, 3, 3, 3, 3, 3, 3, 3)[length % 10])
        words.append(among[place % len(among)])
    return words


def signs(words: list[str], generator: Generator) -> Float[Tensor, "n 3 32 32"]:
    """One picture of each word, in [0, 1], with random font, colours and place."""
    n = len(words)
    font = torch.randint(len(FONTS), (n,), generator=generator)
    shift = torch.randint(-_FINE, _FINE + 1, (n, 2), generator=generator)  # up to a pixel
    shift[:, 0] *= 2  # up to two pixels up or down
    margin = torch.randint(_FINE, 3 * _FINE + 1, (n, 2), generator=generator)
    letters = torch.zeros(n, SIDE * _FINE, SIDE * _FINE)
    plates = torch.zeros_like(letters)
    for k, word in enumerate(words):
        middle_row, middle_column = (SIDE * _FINE // 2 + shift[k]).tolist()
        first = middle_column - (len(word) - 1) * _CELL * _FINE // 2
        for place, letter in enumerate(word):
            glyph, above = _glyph(letter, int(font[k]))
            top = middle_row - _HEIGHT * _FINE // 2 - above
            left = first + place * _CELL * _FINE - glyph.shape[1] // 2
            letters[k, top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
        half_height = _HEIGHT * _FINE // 2 + int(margin[k, 0])
        half_width = LONGEST * _CELL * _FINE // 2 + int(margin[k, 1]) // 2
        plates[
            k,
            middle_row - half_height : middle_row + half_height,
            max(0, middle_column - half_width) : middle_column + half_width,
        ] = 1
    background, plate, ink = _colours(n, generator)
    board = _shrunk(plates)
    picture = background + board * (plate - background)
    return picture + _shrunk(letters) * (ink - picture)


def _shrunk(fine: Float[Tensor, "n fine fine"]) -> Float[Tensor, "n 1 side side"]:
    return functional.avg_pool2d(fine[:, None], _FINE)


def _colours(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of background, plate and letters ``[n, 3, 1, 1]``; the letters are clearly darker.

    Drawn until plate and letters differ enough in brightness.
    """
    background, plate, ink = torch.rand(3, n, 3, generator=generator)
    luma = torch.tensor(_LUMA)
    while (close := ((plate - ink) @ luma).abs() < _CONTRAST).any():
        again = torch.rand(2, n, 3, generator=generator)
        plate = torch.where(close[:, None], again[0], plate)
        ink = torch.where(close[:, None], again[1], ink)
    inverse = ((plate - ink) @ luma < 0)[:, None]
    plate, ink = torch.where(inverse, ink, plate), torch.where(inverse, plate, ink)
    return background[..., None, None], plate[..., None, None], ink[..., None, None]


@cache
def _glyph(letter: str, font: int) -> tuple[Tensor, int]:
    """Ink of a letter in subpixels, 0 or 1, and how far it reaches above an H (round ones do)."""
    size = 4 * _HEIGHT * _FINE  # far larger, then shrunk to the wanted height
    canvas = Image.new("L", (2 * size, 2 * size))
    drawn = ImageFont.truetype(_font_file(FONTS[font]), size)
    ImageDraw.Draw(canvas).text((size // 2, 3 * size // 2), letter, 255, drawn, anchor="ls")
    height_of_h = -drawn.getbbox("H", anchor="ls")[1]
    box = canvas.getbbox()
    assert box is not None
    scale = _HEIGHT * _FINE / height_of_h
    width = min(round((box[2] - box[0]) * scale), round(_WIDEST * _FINE))
    height = round((box[3] - box[1]) * scale)  # Q and some J hang below the baseline
    above = round((3 * size // 2 - height_of_h - box[1]) * scale)
    ink = canvas.crop(box).resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(ink) >= 128).float(), above


def _font_file(name: str) -> str:
    from matplotlib import get_data_path  # heavy

    return str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")
