"""A few random pictures in the hub's layout of CIFAR-10."""

import io
from pathlib import Path

import numpy as np
import pyarrow as arrow
from PIL import Image
from pyarrow import parquet


def write_pictures(folder: Path, count: int, split: str = "train") -> Path:
    """So many pictures with labels; the folder."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    labels = [k % 10 for k in range(count)]
    table = arrow.table({"img": rows, "label": arrow.array(labels, arrow.int64())})
    parquet.write_table(table, folder / f"{split}.parquet")
    return folder
