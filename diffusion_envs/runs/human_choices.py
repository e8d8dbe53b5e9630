"""Images that wait for people's choices: left in the folder of a run, by the samples' numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from diffusion_envs.preferences import MissingChoicesError
from diffusion_envs.runs.contact_sheet import grid

PLACE = "to_choose"  # in the run's folder


def leave(folder: Path, missing: MissingChoicesError) -> Path:
    """Put each image, each group side by side, and a template of the choices into ``to_choose``.

    What an earlier stop left there is taken away; other files in it are not touched.
    """
    assert missing.images is not None
    place = folder / PLACE
    place.mkdir(parents=True, exist_ok=True)
    for old in [*place.glob("sample-*.png"), *place.glob("group-*.png")]:
        old.unlink()
    pixels = (missing.images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    lines, first = [], 0
    for members in missing.groups:
        after = first + len(members)
        for sample, picture in zip(members, pixels[first:after], strict=True):
            Image.fromarray(picture).save(place / f"sample-{sample:06d}.png")
        sheet = grid(missing.images[first:after], [f"sample {sample}" for sample in members])
        sheet.save(place / f"group-{members[0]:06d}.png")
        lines.append(json.dumps({"order": list(members), "prompt": missing.prompts[first]}))
        first = after
    (place / "groups.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def leaving_images(
    updates: Iterator[dict[str, Any]], folder: Path, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """The same updates; where choices are missing, their images are left and the error says so.

    All processes raise the same error, after the main one has written the images of all.
    """
    try:
        yield from updates
    except MissingChoicesError as missing:
        if missing.images is None:
            raise
        place = folder / PLACE
        if accelerator.is_main_process:
            leave(folder, missing)
        accelerator.wait_for_everyone()  # the first to end takes the others with it
        raise MissingChoicesError(
            f"{missing}. The images are in {place}, named by their numbers",
            groups=missing.groups,
            images=missing.images,
            prompts=missing.prompts,
        ) from None
