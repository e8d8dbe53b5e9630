"""Captions in any script: each stretch of text in a font that has its glyphs, never empty boxes.

Fonts are tried in this order: Pillow's own (letters without accents), DejaVu Sans, which matplotlib
brings along (Latin, Greek, Cyrillic, Arabic, Hebrew, many symbols), and the system's. A character
that none of them has is drawn as its letters without marks where there are such (e for é), or else
as its code point (U+732B).
"""

import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SIZE = 13  # pixels; DejaVu and most system fonts are wider than Pillow's own and drawn smaller
_NOT_A_CHARACTER = "\U0010ffff"  # which every font draws as it draws what it lacks
_Font = ImageFont.FreeTypeFont


def drawable(text: str) -> str:
    """The text without characters that nobody sees, and with a stand-in for what no font has."""
    kept = (c for c in unicodedata.normalize("NFC", text) if not _is_invisible(c))
    return "".join(_stand_in(character) for character in kept)


def stretches(text: str) -> list[tuple[str, _Font]]:
    """Drawable text in stretches of one font each."""
    parts: list[tuple[str, _Font]] = []
    for character in drawable(text):
        font = _font_for(character) or _own()
        if parts and (parts[-1][1] is font or character == " "):
            parts[-1] = (parts[-1][0] + character, parts[-1][1])
        else:
            parts.append((character, font))
    return parts


def width(text: str) -> float:
    """Pixels from the beginning to the end of the text."""
    return sum((font.getlength(part) for part, font in stretches(text)), 0.0)


def draw(canvas: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, fill: str) -> None:
    """Draw one line from its left upper corner; all fonts share a baseline."""
    left, baseline = float(corner[0]), corner[1] + _own().getmetrics()[0]
    for part, font in stretches(text):
        canvas.text((left, baseline), part, font=font, fill=fill, anchor="ls")
        left += font.getlength(part)


def has_glyph(font: _Font, character: str) -> bool:
    """Whether the font draws something of its own for a character."""
    if unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs"):
        return False  # control characters, unassigned or private ones, half a surrogate pair
    if character.isspace():
        return True
    try:
        drawn, missing = (_ink(font, text) for text in (character, _NOT_A_CHARACTER))
    except OSError:  # a damaged font
        return False
    return any(drawn) and drawn != missing


def _ink(font: _Font, text: str) -> bytes:
    canvas = Image.new("L", (5 * _SIZE, 3 * _SIZE))
    ImageDraw.Draw(canvas).text((2 * _SIZE, 2 * _SIZE), text, font=font, fill=255, anchor="ls")
    return canvas.tobytes()


def _is_invisible(character: str) -> bool:
    """Joiners, marks of direction, and selectors of a variant."""
    selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return selector or unicodedata.category(character) == "Cf"


@cache
def _stand_in(character: str) -> str:
    if _font_for(character) is not None:
        return character
    letters = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
    if letters and all(_font_for(letter) is not None for letter in letters):
        return "".join(letters)
    return f"U+{ord(character):04X}"


@cache
def _font_for(character: str) -> _Font | None:
    """The first font that has a character."""
    for path in (None, *_paths()):
        font = _own() if path is None else _load(path)
        if font is not None and has_glyph(font, character):
            return font
    return None


@cache
def _own() -> _Font:
    font = ImageFont.load_default(size=_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # with a size, it is one
    return font


@cache
def _load(path: str) -> _Font | None:
    try:
        return ImageFont.truetype(path, _SIZE - 1)
    except (OSError, ValueError):  # no font, or bitmaps of other sizes only (colour emoji)
        return None


@cache
def _paths() -> tuple[str, ...]:
    return (*_dejavu(), *_in_order(_system()))


def _dejavu() -> list[str]:
    try:
        from matplotlib import get_data_path
    except ImportError:
        return []
    return [str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")]


def _system() -> list[str]:
    try:
        from matplotlib import font_manager
    except ImportError:
        return []
    return font_manager.findSystemFonts()


def _in_order(paths: Iterable[str]) -> list[str]:
    """Upright and regular ones first."""
    styles = ("bold", "black", "light", "thin", "italic", "oblique", "condensed", "mono", "serif")

    def rank(path: str) -> tuple[int, str]:
        name = Path(path).stem.lower().replace("sansserif", "")
        return sum(style in name for style in styles), path

    # macOS's font of last resort draws a box for every character
    return sorted((p for p in paths if "lastresort" not in p.lower()), key=rank)
