"""Of a report: pictures of the first and of the last grid, seed by seed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_envs.runs import contact_sheet
from diffusion_envs.runs.report_words import figure, folded, image

_PAIRS = 12  # of pictures, that are not folded away


def pictures(folder: Path, summary: Mapping[str, Any] | None) -> str:
    """The first and the last grid, seed by seed."""
    title = "<h2>Before and after</h2>"
    grids = {int(path.stem[5:]): path for path in sorted(folder.glob("step-*.png"))}
    exported = (summary or {}).get("update")
    if exported in grids:  # a run that was stopped has pictures of later models
        grids = {update: path for update, path in grids.items() if update <= exported}
    if not grids:
        return f"{title}<p>No pictures yet.</p>"
    updates = list(dict.fromkeys((min(grids), max(grids))))
    tiles = [contact_sheet.tiles(grids[update]) for update in updates]
    named = ["before" if not update else f"after {update} updates" for update in updates]
    if any(not sheet for sheet in tiles):  # written by an earlier version
        figures = [
            figure(image(grids[update].read_bytes(), "png", f"Grid of pictures, {words}"), words)
            for update, words in zip(updates, named, strict=True)
        ]
        return f'{title}<div class="cards pair">{"".join(figures)}</div>'
    pairs = []
    for sheets in zip(*tiles, strict=False):
        caption = sheets[0].caption
        shown = "".join(
            image(tile.png, "png", f"Generated picture {words}: {caption}")
            for tile, words in zip(sheets, named, strict=True)
        )
        pairs.append(figure(f"<div>{shown}</div>", caption))
    words = " on the left, ".join(named) + (" on the right" if len(named) > 1 else "")
    rest = pairs[_PAIRS:]
    more = folded(f"{len(rest)} more", f'<div class="pairs">{"".join(rest)}</div>') if rest else ""
    return (
        f'{title}<p class="muted">The same prompts and seeds: {words}.</p>'
        f'<div class="pairs">{"".join(pairs[:_PAIRS])}</div>{more}'
    )
