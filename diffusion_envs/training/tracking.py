"""What a run leaves for the eye: metrics as JSON lines and TensorBoard events, and grids of pictures."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

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


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {name} must be finite, got {value}")
    return value


class Tracker:
    """Writes ``metrics.jsonl``, ``tensorboard/`` and ``samples/`` of a run.

    On resuming, lines of updates that will be done again are dropped first, so that the log of a resumed run
    is that of an uninterrupted one.

    Args:
        folder: of the run.
        first_update: updates already done.
        wandb: log to Weights & Biases too.
        enabled: False on all processes but the main one: then nothing is written.
    """

    def __init__(
        self, folder: Path, *, first_update: int = 0, wandb: bool = False, enabled: bool = True
    ) -> None:
        self.folder, self.enabled = folder, enabled
        self._wandb: Any = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        _keep_lines_until(self._path, first_update)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_update + 1)
        (folder / "samples").mkdir(exist_ok=True)
        if wandb:
            try:
                import wandb as service  # pyright: ignore[reportMissingImports]  # an extra
            except ImportError as error:
                raise ValueError(
                    "wandb is not installed: pip install ctrl-diffusion[wandb]"
                ) from error
            self._wandb = service.init(project="ctrl", name=folder.name, dir=str(folder))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.enabled:
            return
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def log(self, numbers: Mapping[str, Any]) -> None:
        """One line of an update.

        Raises:
            ValueError: a number is not finite.
        """
        if not self.enabled:
            return
        plain = {name: _plain(name, value) for name, value in numbers.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        flat = {n: v.mean if isinstance(v, Estimate) else v for n, v in numbers.items()}
        for name, value in flat.items():
            self._board.add_scalar(name, value, numbers["update"])
        if self._wandb is not None:
            self._wandb.log(flat, step=numbers["update"])

    def pictures(
        self, update: int, images: Float[Tensor, "n 3 h w"], captions: Sequence[str]
    ) -> None:
        """A grid of pictures, the same prompts and seeds each time."""
        if self.enabled:
            grid(images, captions).save(self.folder / "samples" / f"step-{update:06d}.png")


def _keep_lines_until(path: Path, update: int) -> None:
    """Drop lines of later updates, and a last line that a crash cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
