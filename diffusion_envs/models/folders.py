"""Where a model's files are: a folder in diffusers' layout, from the disk or from the hub."""

import json
import os
import re
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

TINY = "tiny"
WORDS = "words"
SHIPPED = {TINY: "diffusion_envs.tiny", WORDS: "diffusion_envs.words"}  # names, and their packages
_NAMES = ", ".join(map(repr, SHIPPED))
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?"
    r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def shipped_folder(name: str) -> Path:
    """Where an embedded Stable Diffusion lies, by name: a folder in diffusers' own layout."""
    return Path(str(resources.files(SHIPPED[name]))) / "weights" / "model"


def tiny_folder() -> Path:
    """Where the embedded default model lies."""
    return shipped_folder(TINY)


def from_anywhere(model: str | Path, *shipped: str) -> str:
    """A model's name that means the same in another directory: folders become absolute.

    Args:
        model: a folder, a hub id, or the name of a shipped model.
        shipped: those names, which are no folder's.
    """
    folder = Path(model).expanduser()
    if str(model).strip() not in ("", *shipped) and folder.is_dir():
        return str(folder.absolute())
    return str(model)


def local_folder(
    model: str | Path, pipeline: Any, supported: Collection[str], without: Mapping[str, None]
) -> Path:
    """The folder of a model, downloaded first where it is on the hub.

    Args:
        model: "tiny", "words", a folder in diffusers' layout, or an id on the Hugging Face hub.
        pipeline: class of diffusers that downloads.
        supported: names of the classes that ``model_index.json`` may name.
        without: parts that are not needed, each None.

    Raises:
        FileNotFoundError: ``model`` is neither a folder nor to be had from the hub, or it is a
            folder that lacks ``model_index.json``.
        ValueError: ``model`` is empty, or of a class that is not supported.
    """
    if not str(model).strip():
        raise ValueError(f"model must be {_NAMES}, a folder or a hub id, got an empty name")
    shipped = str(model) in SHIPPED
    source = shipped_folder(str(model)) if shipped else Path(model).expanduser()
    if source.is_dir():
        if (source / "model_index.json").is_file():
            index = json.loads((source / "model_index.json").read_text())
            _check_class(source, index, supported)
        return source
    if source.exists():
        raise FileNotFoundError(
            f"model must be a folder in diffusers' layout, but {source} is a file"
        )
    name = str(model)
    if os.sep + os.sep in name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model folder {model} does not exist")
    return _downloaded(name, pipeline, supported, without)


def _downloaded(
    model: str, pipeline: Any, supported: Collection[str], without: Mapping[str, None]
) -> Path:
    try:
        index = pipeline.load_config(model)
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_to_be_had(model, error) from error
    _check_class(model, index, supported)
    try:
        return Path(pipeline.download(model, use_safetensors=True, **without))
    except (OSError, ValueError, RuntimeError) as error:
        try:  # files of half precision only
            return Path(pipeline.download(model, use_safetensors=True, variant="fp16", **without))
        except (OSError, ValueError, RuntimeError):
            raise _not_to_be_had(model, error) from error


def _not_to_be_had(model: str, error: Exception) -> FileNotFoundError:
    reason = str(error).strip().splitlines()
    return FileNotFoundError(
        f"model {model!r} is neither {_NAMES} nor a local folder, and it could not be loaded "
        f"from the hub: {reason[0] if reason else type(error).__name__}. Without a network, "
        "download the repository where there is one and pass its folder"
    )


def _check_class(model: str | Path, index: Mapping[str, Any], supported: Collection[str]) -> None:
    if (kind := index.get("_class_name")) not in supported:
        raise ValueError(
            f"model {model} is a {kind}, which is not supported; supported are models of the "
            f"class {' or '.join(sorted(supported))}"
        )


def require_parts(folder: Path, parts: Collection[str]) -> None:
    """Refuse a folder that lacks parts of a pipeline.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    missing = [name for name in parts if not (folder / name).is_dir()]
    if not (folder / "model_index.json").is_file():
        missing.insert(0, "model_index.json")
    if missing:
        raise FileNotFoundError(
            f"model {folder} is not a pipeline of this kind in diffusers' layout: it lacks "
            f"{', '.join(missing)}"
        )


def variant_of(folder: Path, parts: Collection[str], asked: str | None = None) -> str | None:
    """Which variant of the weights to load: None, the plain one, wherever every part has it.

    A part that has only files such as ``model.fp16.safetensors`` makes it "fp16". diffusers reads
    the plain weights of parts that lack the variant.

    Args:
        folder: of the pipeline.
        parts: that have weights.
        asked: the variant that is wanted; None for whichever is there.

    Raises:
        FileNotFoundError: a part has no weights, or parts have no variant in common, or none has
            the one that is asked for.
    """
    common: set[str] | None = None
    seen: set[str] = set()
    for part in parts:
        matches = [_WEIGHTS.fullmatch(file.name) for file in sorted((folder / part).iterdir())]
        variants = {match["variant"] for match in matches if match}
        if not variants:
            raise FileNotFoundError(
                f"model {folder} has no weights in {part}: diffusers reads "
                "diffusion_pytorch_model.safetensors or model.safetensors"
            )
        seen |= {variant for variant in variants if variant is not None}
        if None not in variants:
            common = variants if common is None else common & variants
    if asked is not None:
        if asked in seen and (common is None or asked in common):
            return asked
        there = f"there are {', '.join(sorted(seen))}" if seen else "there are plain ones only"
        raise FileNotFoundError(
            f"model {folder} has no weights of variant {asked!r} in {', '.join(parts)}: {there}"
        )
    if common is None:
        return None
    if not common:
        raise FileNotFoundError(
            f"model {folder} has weights of different variants in {', '.join(parts)}; download "
            "one variant of all of them"
        )
    return "fp16" if "fp16" in common else min(common)
