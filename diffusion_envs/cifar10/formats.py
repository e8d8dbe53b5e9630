"""The formats in which CIFAR-10 is distributed: which of them a folder holds, and its pictures.

The hub's parquet files, the original Python batches, the original binary batches, and a folder of
pictures for each class. Nothing in a file is executed (``plain_pickle``).

Sources     https://www.cs.toronto.edu/~kriz/cifar.html for the two kinds of batches; the hub's
            data set ``uoft-cs/cifar10`` for the parquet files.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from diffusion_envs.cifar10.plain_pickle import read_plain

ROW = 3 * 32 * 32  # bytes of a picture: the red, the green, then the blue plane
AGAIN = "download it again"


class LabelledImages(NamedTuple):
    """Pictures with their classes."""

    images: UInt8[Tensor, "n 3 32 32"]
    labels: Int64[Tensor, " n"]


class Source(NamedTuple):
    """What a folder holds of one split, and how it is read."""

    format: str
    place: Path  # what to point at, or remove, where a folder holds two
    parts: Iterator[LabelledImages]  # its files one after the other, read when asked for


def sources(folder: Path, split: str, classes: Sequence[str]) -> list[Source]:
    """Every copy of a split that lies in a folder or in the usual folders inside it.

    Args:
        folder: where to look.
        split: "train" or "test".
        classes: names of the classes in the order of their labels, for folders of pictures.
    """
    named = _batches(split)
    kinds: list[tuple[str, Sequence[str], Callable[[Path], Iterator[LabelledImages] | None]]] = [
        ("parquet", ("", "plain_text", "data"), lambda place: _parquet(place, split)),
        (
            "Python batches",
            ("", "cifar-10-batches-py"),
            lambda place: _read_batches(place, named, "", _python_batch),
        ),
        (
            "binary batches",
            ("", "cifar-10-batches-bin"),
            lambda place: _read_batches(place, named, ".bin", _binary_batch),
        ),
        ("folders of pictures", ("",), lambda place: _image_folder(place / split, classes)),
    ]
    places = [(kind, folder / inside, find) for kind, insides, find in kinds for inside in insides]
    read = [(kind, place, find(place)) for kind, place, find in places]
    return [Source(kind, place, parts) for kind, place, parts in read if parts is not None]


def checked(
    images: UInt8[np.ndarray, "n row"] | UInt8[np.ndarray, "n 3 32 32"],
    labels: Sequence[object],
    path: Path,
    first: int = 0,
) -> LabelledImages:
    """Pictures and labels of one file, from row ``first`` on, as tensors.

    Raises:
        ValueError: there are none, their numbers differ, or a label is not 0..9.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(
            f"{path} must hold as many labels as pictures and at least one, got {len(images)} "
            f"pictures and {len(labels)} labels; {AGAIN}"
        )
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label <= 9:
            raise ValueError(
                f"{path} must have a label 0..9 in every row, but row {first + row} has {label}; "
                "take a labelled copy of CIFAR-10"
            )
    pictures = torch.from_numpy(np.ascontiguousarray(images).copy()).view(-1, 3, 32, 32)
    return LabelledImages(pictures, torch.tensor(labels, dtype=torch.int64))


# -- batches ---------------------------------------------------------------------------------------


def _batches(split: str) -> list[str]:
    return [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]


def _read_batches(
    place: Path, names: list[str], suffix: str, read: Callable[[Path], LabelledImages]
) -> Iterator[LabelledImages] | None:
    """Batches in the order of their numbers, or None where there is none.

    Raises:
        FileNotFoundError: some are missing (when the first is read).
        ValueError: they do not have equally many rows.
    """
    paths = [place / (name + suffix) for name in names]
    if not any(path.is_file() for path in paths):
        return None
    return _equal_batches(place, paths, read)


def _equal_batches(
    place: Path, paths: list[Path], read: Callable[[Path], LabelledImages]
) -> Iterator[LabelledImages]:
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{place} must hold all of the split's batches, but lacks {', '.join(missing)}; unpack "
            "the archive again"
        )
    rows = 0
    for path in paths:
        batch = read(path)
        rows = rows or len(batch.labels)
        if len(batch.labels) != rows:
            raise ValueError(
                f"{path} has {len(batch.labels)} rows, but {paths[0].name} has {rows}; one of the "
                f"two is cut off: {AGAIN}"
            )
        yield batch


def _python_batch(path: Path) -> LabelledImages:
    content = read_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary, got {type(content).__name__}; {AGAIN}")
    batch = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    if "fine_labels" in batch:
        raise ValueError(f"{path} is of CIFAR-100; take CIFAR-10's")
    if missing := [name for name in ("data", "labels") if name not in batch]:
        raise ValueError(f"{path} lacks {' and '.join(missing)}; it has {sorted(map(str, batch))}")
    data, labels = batch["data"], batch["labels"]
    right = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2
    if not right or data.shape[1] != ROW:
        shape = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data)
        raise ValueError(f"{path} must have data as bytes [rows, {ROW}], got {shape}; {AGAIN}")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(labels, list):
        raise ValueError(f"{path} must have a list of labels, got {type(labels).__name__}; {AGAIN}")
    return checked(data, labels, path)


def _binary_batch(path: Path) -> LabelledImages:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(content) or len(content) % (ROW + 1):
        why = "CIFAR-100's rows have 3074" if len(content) % (ROW + 2) == 0 else "it is cut off"
        why = "it is empty" if not len(content) else why
        raise ValueError(
            f"{path} must have {ROW + 1} bytes a row (a label and a picture), but has "
            f"{len(content)} bytes in all: {why}; download CIFAR-10's again"
        )
    rows = content.reshape(-1, ROW + 1)
    return checked(rows[:, 1:], rows[:, 0].tolist(), path)


# -- parquet ---------------------------------------------------------------------------------------


def _parquet(place: Path, split: str) -> Iterator[LabelledImages] | None:
    """One file ``train.parquet``, or the hub's numbered ones; None where there is neither."""
    single = place / f"{split}.parquet"
    numbered = sorted(place.glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
    if single.is_file() and numbered:
        raise ValueError(
            f"{place} holds both {single.name} and {numbered[0].name}; keep the one that is meant"
        )
    if not single.is_file() and not numbered:
        return None
    return _parquet_parts([single] if single.is_file() else numbered, split)


def _parquet_parts(paths: list[Path], split: str) -> Iterator[LabelledImages]:
    if match := re.fullmatch(rf"{split}-(\d+)-of-(\d+)", paths[0].stem):
        digits, total = len(match[1]), match[2]
        expected = [f"{split}-{str(k).zfill(digits)}-of-{total}.parquet" for k in range(int(total))]
        names = [path.name for path in paths]
        if missing := [name for name in expected if name not in names]:
            raise FileNotFoundError(f"{paths[0].parent} lacks {', '.join(missing)}; {AGAIN}")
        if extra := [name for name in names if name not in expected]:
            raise ValueError(
                f"{paths[0].parent} holds parts of two copies: {names[0]} and {extra[0]}; keep one"
            )
    for path in paths:
        yield from _parquet_file(path)


def _parquet_file(path: Path) -> Iterator[LabelledImages]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if missing := {"img", "label"} - set(columns):
            raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {columns}")
        _require_kind(file.schema_arrow, path)
        if not file.metadata.num_rows:
            raise ValueError(f"{path} has no rows; {AGAIN}")
        first = 0
        for batch in file.iter_batches(1000, columns=["img", "label"]):
            rows = [row["bytes"] if row else None for row in batch["img"].to_pylist()]
            pictures = [_decode(row, f"{path}, row {first + k}") for k, row in enumerate(rows)]
            yield checked(np.stack(pictures), batch["label"].to_pylist(), path, first)
            first += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}); {AGAIN}") from error


def _require_kind(schema, path: Path) -> None:  # pyarrow has no types
    import pyarrow

    img = schema.field("img").type
    if not pyarrow.types.is_struct(img) or img.get_field_index("bytes") < 0:
        raise ValueError(
            f"{path} must have the hub's pictures as its column img (a struct with"
            f" bytes), got {img}"
        )


def _decode(content: bytes | Path | None, where: str) -> UInt8[np.ndarray, "3 32 32"]:
    """One RGB picture of 32 x 32, as planes.

    Raises:
        ValueError: it is no picture, is cut off, is not RGB or has another size.
    """
    if content is None:
        raise ValueError(f"{where} has no picture; take a copy that holds the pictures' bytes")
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            if picture.mode != "RGB" or picture.size != (32, 32):
                width, height = picture.size
                raise ValueError(
                    f"{where} must be an RGB picture of 32 x 32, got {picture.mode} of {width} x "
                    f"{height}; convert it first"
                )
            return np.asarray(picture).transpose(2, 0, 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is not a whole picture ({error}); {AGAIN}") from error


# -- folders of pictures ---------------------------------------------------------------------------


def _image_folder(place: Path, classes: Sequence[str]) -> Iterator[LabelledImages] | None:
    """Pictures in one folder a class; None where there is no folder.

    The first file of every class comes first, then the second of every class, and so on: files are
    sorted by name within a class, classes by label.
    """
    if not place.is_dir():
        return None
    return _image_parts(place, classes)


def _image_parts(place: Path, classes: Sequence[str]) -> Iterator[LabelledImages]:
    inside = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    if strange := [path.name for path in inside if path.name not in classes or not path.is_dir()]:
        raise ValueError(
            f"{place} must hold one folder for each of {', '.join(classes)} and nothing else, but "
            f"holds {', '.join(strange[:3])}; rename or remove it"
        )
    ranked: list[tuple[int, int, Path]] = []
    for label, name in enumerate(classes):
        files = sorted((place / name).iterdir()) if (place / name).is_dir() else []
        files = [path for path in files if not path.name.startswith(".")]
        if not files:
            raise ValueError(f"{place} has no pictures of the class {name}; complete the folder")
        foreign = [path for path in files if path.suffix.lower() not in (".png", ".jpg", ".jpeg")]
        if foreign:
            raise ValueError(f"{foreign[0]} is no .png or .jpg; remove it")
        ranked += [(rank, label, path) for rank, path in enumerate(files)]
    ranked.sort()
    for first in range(0, len(ranked), 1000):
        rows = ranked[first : first + 1000]
        images = np.stack([_decode(path, str(path)) for _, _, path in rows])
        yield checked(images, [label for _, label, _ in rows], place)
