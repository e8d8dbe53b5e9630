"""Of a report: pictures of the first and of the last grid, seed by seed, in a bounded size."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_envs.runs import contact_sheet
from diffusion_envs.runs.report_words import figure, folded, image

_PAIRS = 12  # of pictures, that are not folded away
_BYTES = 2 * 2**20  # of all pictures of a page; in it they take a third more
_QUALITIES = (92, 80, 65, 50)  # of JPEG, where PNG takes more than that
_log = logging.getLogger(__name__)


def pictures(folder: Path, summary: Mapping[str, Any] | None) -> str:
    """The first and the last grid, seed by seed."""
    title = "<h2>Before and after</h2>"
    grids = {int(path.stem[5:]): path for path in sorted(folder.glob("step-*.png"))}
    exported = (summary or {}).get("update")
    if exported in grids:  # a run that was stopped has pictures of later models
        grids = {update: path for update, path in grids.items() if update <= exported}
    if not grids:
        return f"{title}<p>No pictures yet.</p>"
    read = {update: _tiles(grids[update]) for update in dict.fromkeys((min(grids), max(grids)))}
    updates = [update for update, sheet in read.items() if sheet is not None]
    tiles = [sheet for sheet in read.values() if sheet is not None]
    if not updates:
        return f"{title}<p>The pictures are damaged.</p>"
    named = ["before" if not update else f"after {update} updates" for update in updates]
    if any(not sheet for sheet in tiles):  # written by an earlier version
        kind, sheets = within([grids[update].read_bytes() for update in updates], _BYTES)
        figures = [
            figure(image(sheet, kind, f"Grid of pictures, {words}"), words)
            for sheet, words in zip(sheets, named, strict=False)
        ]
        return f'{title}<div class="cards pair">{"".join(figures)}</div>'
    seeds = list(zip(*tiles, strict=False))
    kind, shown = within([tile.png for sheets in seeds for tile in sheets], _BYTES)
    pairs = []
    for first, sheets in zip(range(0, len(shown), len(named)), seeds, strict=False):
        caption = sheets[0].caption
        inside = "".join(
            image(data, kind, f"Generated picture {words}: {caption}")
            for data, words in zip(shown[first : first + len(named)], named, strict=False)
        )
        pairs.append(figure(f"<div>{inside}</div>", caption))
    words = " on the left, ".join(named) + (" on the right" if len(named) > 1 else "")
    rest = pairs[_PAIRS:]
    more = folded(f"{len(rest)} more", f'<div class="pairs">{"".join(rest)}</div>') if rest else ""
    return (
        f'{title}<p class="muted">The same prompts and seeds: {words}.</p>'
        f'<div class="pairs">{"".join(pairs[:_PAIRS])}</div>{more}'
    )


def _tiles(path: Path) -> list[contact_sheet.Tile] | None:
    """The pictures of a sheet; None of a damaged one, which is told and left out."""
    try:
        return contact_sheet.tiles(path)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged and left out of the report: %s", path, error)
        return None


def within(pngs: Sequence[bytes], most: int) -> tuple[str, list[bytes]]:
    """Pictures in at most so many bytes together: as they are, or as JPEG, or the first of them.

    Args:
        pngs: files of PNG.
        most: bytes of all.

    Returns:
        The kind of all files, and the files.
    """
    if sum(map(len, pngs)) <= most:
        return "png", list(pngs)
    made = list[bytes]()
    for quality in _QUALITIES:
        made = [_jpeg(png, quality) for png in pngs]
        if sum(map(len, made)) <= most:
            return "jpeg", made
    while sum(map(len, made)) > most:
        made.pop()
    return "jpeg", made


def _jpeg(png: bytes, quality: int) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").save(file, format="JPEG", quality=quality)
    return file.getvalue()
