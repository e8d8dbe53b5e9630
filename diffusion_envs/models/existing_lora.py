"""An existing LoRA that training starts from: read from disk, checked, in one layout.

Files come in the layouts of diffusers, peft and kohya's scripts; diffusers' own converters read
them. Whatever says how much an update counts (alphas, a rank-stabilised scale, patterns of either)
becomes one alpha a layer: update = alpha / rank * up down.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion_envs import digests
from diffusion_envs.models.adapters import LORA_FILE

_LISTED = 3  # names in an error message
_PEFT_FILE, _PEFT_CONFIG, _PEFT_PREFIX = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "base_model.model.",
)
_METADATA = "lora_adapter_metadata"  # what diffusers keeps of peft's configuration in a file
_TEXT = ("text_encoder", "lora_te")
_log = logging.getLogger(__name__)
_OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "lokr_", "hada_", "oft_", ".bias")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A layer's update, alpha / rank * up down.

    Attributes:
        down: [rank, in, ...].
        up: [out, rank, ...].
        alpha: effective, whatever the file's own scale is called.
    """

    down: Float[Tensor, "rank ..."]
    up: Float[Tensor, "out rank ..."]
    alpha: float

    @property
    def rank(self) -> int:
        """Of the update."""
        return len(self.down)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of a UNet on disk, of which only the names and shapes have been read.

    Attributes:
        path: of the file.
        ranks: that its layers have.
    """

    path: Path
    ranks: tuple[int, ...]

    @classmethod
    def at(cls, place: str | Path) -> "LoraFile":
        """The LoRA in a file or folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no LoRA of a UNet alone, or is damaged.
        """
        path = _file(Path(place).expanduser())
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"lora {path} is damaged or no safetensors file: {error}") from error
        _require_kind(path, list(shapes))
        downs = [shape for name, shape in shapes.items() if "lora_A" in name or "down." in name]
        ranks = sorted({shape[0] for shape in downs if shape})
        if not ranks:
            raise ValueError(
                f"lora {path} is no LoRA: none of its {len(shapes)} tensors is a lora_A or "
                f"lora_down; it has {_some(list(shapes))}"
            )
        return cls(path, tuple(ranks))

    def layers(self, network: Any) -> dict[str, LoraLayer]:
        """Its layers by the names that they have in a network of diffusers.

        Raises:
            ValueError: it is a LoRA of another model.
        """
        from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"lora {self.path} is damaged: {reason}") from error
        if metadata.get(digests.KEY) not in (None, digests.of_tensors(tensors)):
            _log.warning(  # not refused, as programs that change a file keep what stands in it
                "lora %s is not what a run exported: its %s is not that of its tensors",
                self.path,
                digests.KEY,
            )
        kept: Mapping[str, Any] | None = None
        if (written := metadata.get(_METADATA)) is not None:
            told = _settings(written, self.path)
            kept = {k.removeprefix("unet."): v for k, v in told.items()}
        if all(name.startswith(_PEFT_PREFIX) for name in tensors):
            tensors = {name.replace(_PEFT_PREFIX, "unet.", 1): t for name, t in tensors.items()}
            if (beside := self.path.with_name(_PEFT_CONFIG)).is_file():
                kept = _settings(beside.read_text(encoding="utf-8", errors="replace"), beside)
        try:
            converted: Any = StableDiffusionLoraLoaderMixin.lora_state_dict(
                tensors, unet_config=network.config
            )
            state, alphas = (convert_unet_state_dict_to_peft(part or {}) for part in converted)
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"diffusers does not understand lora {self.path}: {' '.join(str(error).split())}"
            ) from error
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            layer, _, half = name.removeprefix("unet.").partition(".lora_")
            halves.setdefault(layer, {})[half.partition(".")[0]] = tensor.float()
        _require_fit(self.path, halves, network)
        own = {
            k.removeprefix("unet.").partition(".lora_")[0].removesuffix(".alpha"): v
            for k, v in alphas.items()
        }
        return {
            name: LoraLayer(half["A"], half["B"], _alpha(name, len(half["A"]), own, kept))
            for name, half in halves.items()
        }


def _settings(text: str, path: Path) -> Mapping[str, Any]:
    """Settings of an adapter, which say how much it counts.

    Raises:
        ValueError: they are no JSON object, or their alphas no numbers.
    """
    try:
        told = json.loads(text)
        alphas = [told.get("lora_alpha", 1), *(told.get("alpha_pattern") or {}).values()]
        for alpha in alphas:
            float(alpha)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"lora {path} has settings that are damaged: {error}") from error
    return told


def _file(place: Path) -> Path:
    """The one file of a LoRA."""
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ValueError(
                f"lora must be a safetensors file, got {place}: files that are pickled can run "
                "programs; convert it, or ask its author for the other one"
            )
        return place
    if not place.is_dir():
        raise FileNotFoundError(
            f"lora must be a folder or a safetensors file of a LoRA, but {place} does not exist; "
            "download it first where it is on the hub (hf download USER/NAME)"
        )
    for name in (LORA_FILE, _PEFT_FILE):
        if (place / name).is_file():
            return place / name
    files = sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        held = f"several: {_some([file.name for file in files])}" if files else "none"
        raise FileNotFoundError(
            f"lora must be a folder with one safetensors file (or {LORA_FILE}), but {place} has "
            f"{held}; name the file"
        )
    return files[0]


def _require_kind(path: Path, names: list[str]) -> None:
    """Refuse files with more than LoRA layers of a UNet."""
    if text := [name for name in names if name.startswith(_TEXT)]:
        raise ValueError(
            f"lora {path} has {len(text)} tensors for the text encoder ({_some(text)}), which is "
            "neither trained nor changed here: start from a LoRA of the UNet alone, or save a "
            "pipeline with this one fused (pipe.fuse_lora()) and name that as the model"
        )
    if other := [name for name in names if any(part in name for part in _OTHER_KINDS)]:
        raise ValueError(
            f"lora {path} has more than plain LoRA layers (DoRA, LoKr, LoHa, OFT, biases): "
            f"{_some(other)}. Save a pipeline with it fused (pipe.fuse_lora()) and name that as "
            "the model"
        )


def _alpha(name: str, rank: int, own: Mapping[str, Any], kept: Mapping[str, Any] | None) -> float:
    """The effective alpha of a layer: by the file's alphas, or peft's configuration, or rank."""
    if name in own:
        return float(own[name])
    if not kept or "lora_alpha" not in kept:
        return float(rank)
    from peft.utils.other import get_pattern_key

    pattern = kept.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), name), kept["lora_alpha"]))
    return alpha * math.sqrt(rank) if kept.get("use_rslora") else alpha


def _require_fit(path: Path, halves: Mapping[str, Mapping[str, Tensor]], network: Any) -> None:
    """Refuse a LoRA whose layers are not this network's."""
    places = dict(network.named_modules())

    def fault(name: str) -> str | None:
        place, half = places.get(name), halves[name]
        if half.keys() != {"A", "B"}:
            return f"{name} (half of it is missing)"
        if not isinstance(place, nn.Linear | nn.Conv2d):
            return f"{name} (the model has no such layer)"
        has, own = [len(half["B"]), *half["A"].shape[1:]], list(place.weight.shape)
        if has != own or half["B"].shape[1] != len(half["A"]):
            return f"{name} (for weights {has}; the model's are {own})"
        return None

    if faults := [words for name in halves if (words := fault(name)) is not None]:
        raise ValueError(
            f"lora {path} is one of another model: {len(faults)} of its {len(halves)} layers do "
            f"not fit this one, such as {_some(faults)}. Name the model that it was trained on"
        )


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} others" if more > 0 else "")
