"""Where a model's files are: a folder in diffusers' layout, from the disk or from the hub.

Also single files of weights, as people share them, and why models of other classes are refused.
"""

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

TINY = "tiny"
WORDS = "words"
SHIPPED = {TINY: "diffusion_envs.tiny", WORDS: "diffusion_envs.words"}  # names, and their packages
_NAMES = ", ".join(map(repr, SHIPPED))
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?"
    r"(?:-\d+-of-\d+)?\.safetensors"
)
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".npy", ".npz")
_LIBRARIES = (None, "diffusers", "transformers")  # of a pipeline's parts
_CHECKER = ("safety_checker", "stable_diffusion")  # a part, and where diffusers has it; not loaded


def shipped_folder(name: str) -> Path:
    """Where an embedded Stable Diffusion lies, by name: a folder in diffusers' own layout."""
    return Path(str(resources.files(SHIPPED[name]))) / "weights" / "model"


def tiny_folder() -> Path:
    """Where the embedded default model lies."""
    return shipped_folder(TINY)


def from_anywhere(model: str | Path, *shipped: str) -> str:
    """A model's name that means the same in another directory: folders and files become absolute.

    Args:
        model: a folder, a file, a hub id, or the name of a shipped model.
        shipped: those names, which are no folder's.

    Raises:
        TypeError: ``model`` is neither text nor a path.
    """
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model must be the name of one, a folder, a file or a hub id, got "
            f"{type(model).__name__}: one in memory is saved first (save_pretrained), and named by "
            "its folder"
        )
    folder = Path(model).expanduser()
    if str(model).strip() not in ("", *shipped) and folder.exists():
        return str(folder.absolute())
    return str(model)


def local_folder(
    model: str | Path,
    pipeline: Any,
    supported: Collection[str],
    without: Mapping[str, None],
    variant: str | None = None,
) -> Path:
    """The folder of a model, downloaded first where it is on the hub.

    Args:
        model: "tiny", "words", a folder in diffusers' layout, or an id on the Hugging Face hub.
        pipeline: class of diffusers that downloads.
        supported: names of the classes that ``model_index.json`` may name.
        without: parts that are not needed, each None.
        variant: of the weights to download; "fp16" where there are no plain ones if left out.

    Raises:
        FileNotFoundError: ``model`` is neither a folder nor to be had from the hub, it is a
            folder that lacks ``model_index.json``, or a shipped model that is not installed.
        ValueError: ``model`` is empty, or of a class that is not supported.
    """
    if not str(model).strip():
        raise ValueError(f"model must be {_NAMES}, a folder or a hub id, got an empty name")
    shipped = str(model) in SHIPPED
    source = shipped_folder(str(model)) if shipped else Path(model).expanduser()
    if shipped and not source.is_dir():
        raise FileNotFoundError(
            f"model {str(model)!r} is not part of this installation ({source}); "
            'pip install "ctrl-diffusion[models]" brings it, and in a clone "./packages/models"'
        )
    if source.is_dir():
        if (source / "model_index.json").is_file():
            index = read_settings(source / "model_index.json")
            _check_class(source, index, supported)
            _check_libraries(source, index)
        return source
    if source.exists():
        raise FileNotFoundError(
            f"model must be a folder in diffusers' layout, but {source} is a file"
        )
    name = str(model)
    if source.suffix.lower() in (".safetensors", *PICKLES):
        raise FileNotFoundError(f"model {model} does not exist: there is no {source.absolute()}")
    if os.sep + os.sep in name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model folder {model} does not exist")
    return _downloaded(name, pipeline, supported, without, variant)


def _downloaded(
    model: str,
    pipeline: Any,
    supported: Collection[str],
    without: Mapping[str, None],
    variant: str | None,
) -> Path:
    try:
        index = pipeline.load_config(model)
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_to_be_had(model, error) from error
    _check_class(model, index, supported)
    _check_libraries(model, index)
    asked = {} if variant is None else {"variant": variant}
    try:
        return Path(pipeline.download(model, use_safetensors=True, **asked, **without))
    except (OSError, ValueError, RuntimeError) as error:
        if variant is not None:
            raise _not_to_be_had(model, error) from error
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
        reason = next((why for words, why in _REFUSED if any(w in str(kind) for w in words)), "")
        raise ValueError(
            f"model {model} is a {kind}, which is not supported{reason and ': '}{reason}; "
            f"supported are models of the class {' or '.join(sorted(supported))}"
        )


def _check_libraries(model: str | Path, index: Mapping[str, Any]) -> None:
    """Refuse an index by which diffusers would import other modules than its own.

    Raises:
        ValueError: naming the part and the module.
    """
    for part, named in index.items():
        library = named[0] if isinstance(named, list) and named else None
        if library not in _LIBRARIES and (part, library) != _CHECKER:
            raise ValueError(
                f"model {model} has a part {part!r} of the module {library!r}, which would be "
                "imported and run; supported are parts of diffusers and transformers"
            )


# words in the name of a class, and why it is refused; the first that fits
_REFUSED = (
    (
        ("Inpaint",),
        "an inpainting model reads a mask and a masked picture beside the latents; fine-tune the "
        "text-to-image model that it was made from",
    ),
    (
        ("ControlNet", "Adapter"),
        "it reads a control picture beside the prompt; fine-tune the text-to-image model under it, "
        "and put the adapter to use with the control afterwards",
    ),
    (
        ("StableDiffusionXLImg2Img",),
        "it is how the refiner of Stable Diffusion XL is stored, which goes on from another "
        "model's latents; fine-tune the base model, stabilityai/stable-diffusion-xl-base-1.0 for "
        "one",
    ),
    (
        ("Img2Img", "Pix2Pix", "Depth2Img", "Upscale", "Variation", "UnCLIP"),
        "it reads a picture beside the prompt; fine-tune a text-to-image model",
    ),
    (
        ("StableDiffusion3", "Flux", "AuraFlow", "Sana", "QwenImage", "Lumina", "Chroma"),
        "it is a transformer trained by flow matching, not a UNet trained with a table of betas",
    ),
)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file: data, and nothing that names code.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds no JSON object, or asks for code of the model's own.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is not there: a folder in diffusers' layout has the settings of each part"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(settings).__name__}")
    if (asked := _code_in(settings)) is not None:
        raise ValueError(
            f"{path} asks for code of the model's own by {asked}, and none is run; supported are "
            "models of diffusers and transformers as they are: take the setting out"
        )
    return settings


def _code_in(settings: Any) -> str | None:
    """A setting by which a library would fetch or import code, if there is one."""
    if isinstance(settings, list):
        return next((asked for value in settings if (asked := _code_in(value))), None)
    if not isinstance(settings, dict):
        return None
    for name, value in settings.items():
        kernel = name.endswith("attn_implementation") and "/" in json.dumps(value)  # of the hub
        if (name == "auto_map" and value) or kernel:
            return f"{name}: {json.dumps(value):.80}"
        if (asked := _code_in(value)) is not None:
            return asked
    return None


# -- single files ----------------------------------------------------------------------------------


def single_file(model: str | Path) -> Path | None:
    """The file, if a model is named by one of weights; None of a folder or a name.

    Raises:
        ValueError: it is a pickle, which can run code as it is read.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        return None
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"model {model} is a pickle, which can run code as it is read, and is not loaded; save "
            "its tensors as .safetensors"
        )
    return path if path.suffix == ".safetensors" else None


def settings_of_single_file(
    weights: Path, config: str | Path | None, supported: Collection[str]
) -> Path:
    """The folder with the settings of a single file's model.

    Args:
        weights: the file.
        config: folder in diffusers' layout; looked up on the hub by the file's kind if left out.
        supported: names of the classes that ``model_index.json`` may name.

    Raises:
        ValueError: the file is of a kind that is not supported.
        FileNotFoundError: ``config`` is no such folder, or the hub has no answer.
    """
    kind = kind_of_single_file(weights)
    if config is not None:
        folder = Path(config).expanduser()
        index = read_settings(folder / "model_index.json")
        _check_class(folder, index, supported)
        _check_libraries(folder, index)
        return folder
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
    from huggingface_hub import snapshot_download

    name = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "**/*.txt"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"model {weights} holds weights without settings; those of its kind are taken from "
            f"{name!r} on the hub, which failed: {reason}. Without a network, name a folder in "
            "diffusers' layout with the settings of the model (no weights are needed): config"
        ) from error


_SINGLE_FILES = ("v1", "v2", "xl_base")


def kind_of_single_file(weights: Path) -> str:
    """Which kind of model it is, in diffusers' words: "v1", "v2" or "xl_base".

    Raises:
        ValueError: it is of another kind, or no file of tensors.
    """
    import torch
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
        with torch.device("meta"):
            kind = infer_diffusers_model_type({n: torch.empty(s) for n, s in shapes.items()})
    except (OSError, SafetensorError, TypeError, RuntimeError) as error:  # sides beyond 2^63
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {weights} is no file of tensors: {reason}") from error
    unet = any(name.startswith("model.diffusion_model.input_blocks.") for name in names)
    if kind in _SINGLE_FILES and unet:
        return kind
    reasons = {
        "xl_refiner": "the refiner of Stable Diffusion XL, which goes on from another model's "
        "latents: fine-tune the base model",
        "inpainting": "an inpainting model, which reads a mask and a masked picture",
        "inpainting_v2": "an inpainting model, which reads a mask and a masked picture",
        "xl_inpaint": "an inpainting model, which reads a mask and a masked picture",
    }
    # diffusers takes what it does not know for "v1"
    what = reasons.get(kind, "not known" if kind == "v1" else f"of the kind {kind!r}")
    raise ValueError(
        f"model {weights} is {what}, which is not supported; supported are single files of Stable "
        "Diffusion 1.x, 2.x and XL (base), with UNet, decoder and text encoders"
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
        adapter = (folder / "pytorch_lora_weights.safetensors").is_file()
        hint = "; it has a LoRA: name the model that it is for, and this folder as lora"
        raise FileNotFoundError(
            f"model {folder} is not a pipeline of this kind in diffusers' layout: it lacks "
            f"{', '.join(missing)}{hint if adapter else ''}"
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
        ValueError: a part's weights are pickles, or its index names files outside of it.
    """
    common: set[str] | None = None
    seen: set[str] = set()
    for part in parts:
        files = sorted((folder / part).iterdir())
        matches = [_WEIGHTS.fullmatch(file.name) for file in files]
        variants = {match["variant"] for match in matches if match}
        if not variants:
            _refuse_pickles(files)
            raise FileNotFoundError(
                f"model {folder} has no weights in {part}: diffusers reads "
                "diffusion_pytorch_model.safetensors or model.safetensors"
            )
        for file in files:
            if file.name.endswith(".index.json"):
                _require_files_beside(file)
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


def least_numbers(part: Path) -> int:
    """How many numbers the weights of a part have; of the smallest variant if there are several."""
    from safetensors import safe_open

    by_variant = dict[str | None, int]()
    for file in part.iterdir():
        match = _WEIGHTS.fullmatch(file.name)
        if match is None or file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as content:
            shapes = [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118  # not a dict
        numbers = sum(map(math.prod, shapes))
        by_variant[match["variant"]] = by_variant.get(match["variant"], 0) + numbers
    return min(by_variant.values(), default=0)


def require_read(part: Path, model: nn.Module) -> None:
    """Refuse a text encoder whose weights are not those of its files.

    Where names of weights have changed between versions, transformers leaves what it misses at
    random, with a warning (5.0 and files of 5.23, say). Every vector of the model (biases, scales
    of norms) is compared with the files; the prefix ``text_model.`` may be there or not.

    Raises:
        ValueError: a vector is not in the files, or has other numbers.
    """
    from safetensors import safe_open

    vectors = {_plain(name): value for name, value in model.state_dict().items() if value.ndim == 1}
    read = dict.fromkeys(vectors, False)
    for file in part.iterdir():
        if _WEIGHTS.fullmatch(file.name) is None:
            continue
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118  # not a dict
                if (name := _plain(key)) in read and not read[name]:
                    value = vectors[name]
                    theirs = content.get_tensor(key).to(value.dtype)
                    read[name] = torch.equal(theirs, value.cpu())
    if missing := [name for name, same in read.items() if not same]:
        raise ValueError(
            f"{part} was not read as it is: {len(missing)} of {len(read)} vectors of the network "
            f"({missing[0]}, ...) are not those of the files, perhaps as transformers "
            f"{metadata.version('transformers')} knows them by other names; install the version "
            "that saved them, or a newer one, or save the folder anew"
        )


def _plain(name: str) -> str:
    """A weight's name without the prefix that some versions of transformers give it."""
    return name.removeprefix("text_model.")


def _refuse_pickles(files: Collection[Path]) -> None:
    """Refuse weights that only a pickle holds.

    Raises:
        ValueError: there is one.
    """
    if pickles := [file for file in files if file.suffix.lower() in PICKLES]:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code as it is read, and is not loaded; save "
            "its tensors as .safetensors (pipe.save_pretrained, on a machine that may run it)"
        )


def _require_files_beside(index: Path) -> None:
    """Refuse an index of shards that names anything but files of tensors beside it.

    Raises:
        ValueError: naming what it names.
    """
    named = read_settings(index).get("weight_map")
    for shard in set(named.values()) if isinstance(named, dict) else {None}:
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise ValueError(
                f"{index} must name files of tensors beside it (.safetensors), but it names "
                f"{shard!r:.200}"
            )
