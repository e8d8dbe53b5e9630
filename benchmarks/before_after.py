"""Draw the pictures of a run before and after fine-tuning: the README's first picture.

    make demo
    python -m benchmarks.before_after runs/demo

The first pictures of the first and of the last grid in the run's folder, the same prompts and
held-out seeds, none left out.
"""

import io
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.figure import Figure
from PIL import Image

from diffusion_envs.runs import contact_sheet

DOCS = Path(__file__).parent.parent / "docs"


def drawn(run: Path, columns: int = 10) -> Image.Image:
    """Before above after, a column for each prompt and seed.

    Args:
        run: folder of a run.
        columns: pictures of each row.

    Raises:
        FileNotFoundError: the run has no two grids of pictures.
    """
    sheets = sorted((run / "samples").glob("step-*.png"))
    if len(sheets) < 2:
        raise FileNotFoundError(f"{run} has {len(sheets)} grids of pictures, not two")
    rows = [contact_sheet.tiles(sheet)[:columns] for sheet in (sheets[0], sheets[-1])]
    columns = len(rows[0])
    figure = Figure(figsize=(0.92 * columns + 0.5, 2.3), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for row, tiles in zip(axes, rows, strict=True):
        for place, tile in zip(row, tiles, strict=True):
            place.imshow(Image.open(io.BytesIO(tile.png)), interpolation="nearest")
            place.set(xticks=[], yticks=[])
    for place, tile in zip(axes[0], rows[0], strict=True):
        place.set_title(tile.caption.removeprefix("a photo of "), fontsize=9)
    axes[0, 0].set_ylabel("before", fontsize=9)
    axes[1, 0].set_ylabel("after", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return Image.open(file).convert("RGB").quantize(256)


def main(run: Annotated[Path, tyro.conf.Positional], output: Path = DOCS / "demo.png") -> None:
    """Draw them.

    Args:
        run: folder of a finished run.
        output: the picture.
    """
    drawn(run).save(output, format="PNG", optimize=True)
    print(output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
