"""CIFAR-10 from its parquet files, as tensors.

The files are those of the hub's ``cifar10`` data set (``plain_text``): a column ``img`` with the
encoded picture and a column ``label`` with 0..9. Source: A. Krizhevsky, "Learning Multiple Layers
of Features from Tiny Images", 2009.
"""

import io
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


SYNONYMS = {"airplane": ("airplane", "plane"), "automobile": ("automobile", "car")}


def class_of(prompt: str) -> int | None:
    """The one class that a prompt names (singular, plural or synonym), or None.

    None also where it names two: then it has no one class.
    """
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    named = {
        label
        for label, name in enumerate(CLASSES)
        for noun in SYNONYMS.get(name, (name,))
        if noun in words or noun + "s" in words
    }
    return named.pop() if len(named) == 1 else None


class LabelledImages(NamedTuple):
    """Pictures with their classes."""

    images: UInt8[Tensor, "n 3 32 32"]
    labels: Int64[Tensor, " n"]


def load(
    folder: str | Path, split: Literal["train", "test"] = "train", limit: int | None = None
) -> LabelledImages:
    """Decode one split of CIFAR-10.

    Args:
        folder: where ``train.parquet`` and ``test.parquet`` lie.
        split: which of the two.
        limit: the first so many rows only; the files' row order is already shuffled.

    Returns:
        Pictures as bytes ``[n, 3, 32, 32]`` and their labels ``[n]``, in the file's row order.

    Raises:
        FileNotFoundError: the split's file is not in ``folder``.
        ValueError: the file does not have the expected columns or picture size.
    """
    import pyarrow.parquet as parquet

    path = Path(folder) / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"folder must hold {split}.parquet of CIFAR-10 (hub layout), but {path} does not exist"
        )
    table = parquet.read_table(path)
    if missing := {"img", "label"} - set(table.column_names):
        raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {table.column_names}")
    table = table.slice(0, limit)
    pictures = [
        np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        for row in table["img"].to_pylist()
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    if images.shape[1:] != (3, 32, 32):
        raise ValueError(f"{path} must hold 32 x 32 pictures, got {list(images.shape[2:])}")
    return LabelledImages(images, torch.tensor(table["label"].to_pylist(), dtype=torch.int64))
