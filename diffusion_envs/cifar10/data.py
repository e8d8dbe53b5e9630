"""CIFAR-10 as tensors, from whichever of its published formats a folder holds.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import re
from pathlib import Path
from typing import Literal

import torch

from diffusion_envs.cifar10.formats import LabelledImages, sources

__all__ = ["CLASSES", "SYNONYMS", "LabelledImages", "class_of", "load"]

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


ACCEPTED = """\
train.parquet and test.parquet, or the hub's plain_text/train-00000-of-00001.parquet;
data_batch_1 to data_batch_5 and test_batch, or cifar-10-batches-py with them;
data_batch_1.bin to data_batch_5.bin and test_batch.bin, or cifar-10-batches-bin with them;
train/airplane/*.png to train/truck/*.png, and test/... likewise"""


def load(
    folder: str | Path, split: Literal["train", "test"] = "train", limit: int | None = None
) -> LabelledImages:
    """Read one split of CIFAR-10, in whichever format lies in a folder.

    The formats are the hub's parquet files (columns ``img`` and ``label``), the original Python
    batches, the original binary batches, and a folder of PNG or JPEG files for each class. Nothing
    in a file is executed: Python's batches are pickles, of which only plain data is read.

    Args:
        folder: where the files lie, or ``plain_text``, ``data``, ``cifar-10-batches-py`` or
            ``cifar-10-batches-bin`` with them.
        split: "train" or "test".
        limit: the first so many rows only.

    Returns:
        Pictures as bytes ``[n, 3, 32, 32]`` and their labels ``[n]``, in the order of the files,
        which the published ones have shuffled. Folders of pictures have no such order: the first
        file of every class comes first, then the second of every class, and so on, files sorted by
        name and classes by label, so that ``limit`` takes equally many of each class.

    Raises:
        FileNotFoundError: ``folder`` holds the split in no format, or only a part of its files.
        ValueError: it holds the split twice; a file is foreign or cut off; a picture is not RGB or
            not 32 x 32; a label is missing or not 0..9; ``split`` or ``limit`` is unusable.
    """
    folder = Path(folder)
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all rows, got {limit}")
    there = sources(folder, split, CLASSES)
    if not there:
        archives = sorted(path.name for path in folder.glob("cifar-10*.tar*"))
        remedy = f"unpack {archives[0]} first" if archives else f"it may be\n{ACCEPTED}"
        raise FileNotFoundError(
            f"folder must hold the {split} split of CIFAR-10, but {folder} does not: {remedy}"
        )
    if len(there) > 1:
        copies = "; ".join(f"{source.format} in {source.place}" for source in there)
        raise ValueError(
            f"folder must hold the {split} split of CIFAR-10 once, but {folder} has {copies}; name "
            "the folder that holds one of them only, or remove the others"
        )
    parts, rows = [], 0
    for part in there[0].parts:
        parts.append(part)
        rows += len(part.labels)
        if limit is not None and rows >= limit:
            break
    return LabelledImages(
        torch.cat([part.images for part in parts])[:limit],
        torch.cat([part.labels for part in parts])[:limit],
    )
