"""Text-to-image pipelines: where their files are, what their settings say, and their networks.

Settings are read and checked first, then weights are loaded. A single file of weights (as people
share them) needs the settings of its model beside it: a folder in diffusers' layout, which needs no
weights, or what diffusers takes from the hub for models of that kind.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)

from diffusion_envs.models import folders
from diffusion_envs.models.available_memory import require_room
from diffusion_envs.models.counting import META
from diffusion_envs.models.latent_decoder import shrinking
from diffusion_envs.models.stable_diffusion import StableDiffusionFamily
from diffusion_envs.models.stable_diffusion_xl import StableDiffusionXLFamily
from diffusion_envs.models.text_to_image_family import Configs, Family

_LOADERS: list[tuple[Family, Any]] = [
    (StableDiffusionFamily(), StableDiffusionPipeline),
    (StableDiffusionXLFamily(), StableDiffusionXLPipeline),
]
SUPPORTED = tuple(name for family, _ in _LOADERS for name in family.classes)


@dataclass(frozen=True, eq=False)
class PipelineFiles:
    """A pipeline that is not loaded yet.

    Attributes:
        model: its name, for messages.
        family: what kind of pipeline it is.
        folder: in diffusers' layout; where weights are in a single file, it may have none.
        configs: settings of its parts.
        variant: of the weights in the folder.
        weights: single file of all weights; None where they are in the folder.
    """

    model: str
    family: Family
    folder: Path
    configs: Configs
    variant: str | None = None
    weights: Path | None = None

    @property
    def latent_channels(self) -> int:
        """Channels of a state."""
        return self.configs["unet"].get("in_channels", 4)

    def latent_sides(self, resolution: int | tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of a latent.

        Args:
            resolution: pixels a side, or height and width; the model's own if left out.

        Raises:
            ValueError: the decoder makes no picture of this size, or the model has none of its own.
        """
        factor = shrinking(self.configs["vae"])
        if resolution is None:
            own = self.configs["unet"].get("sample_size")
            if own is None:
                raise ValueError(
                    f"model {self.model} names no size (sample_size of its unet); set resolution"
                )
            height, width = (own, own) if isinstance(own, int) else own
            return height, width
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        if any(side < factor or side % factor for side in (height, width)):
            near = [max(factor, round(side / factor) * factor) for side in (height, width)]
            raise ValueError(
                f"resolution must be a positive multiple of {factor}, which is what the model's "
                f"decoder makes of a latent, got {resolution}; near it is {near[0]} x {near[1]}"
            )
        return height // factor, width // factor

    def picture(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels of a latent with these sides."""
        factor = shrinking(self.configs["vae"])
        return sides[0] * factor, sides[1] * factor

    def scheduler(self) -> Any:
        """The scheduler of the folder.

        Raises:
            ValueError: diffusers has none of its class.
        """
        import diffusers

        config = self.configs["scheduler"]
        mixin: Any = diffusers.SchedulerMixin  # pyright: ignore[reportPrivateImportUsage]  # documented
        kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if not isinstance(kind, type) or not issubclass(kind, mixin):
            raise ValueError(
                f"model {self.model} has a scheduler of class {config.get('_class_name')!r}, which "
                "diffusers does not have"
            )
        return kind.from_config(config)

    def load(
        self,
        precision: torch.dtype,
        device: torch.device | str,
        *,
        network: torch.dtype | None = None,
    ) -> Any:
        """The pipeline, everything frozen and in evaluation mode.

        Args:
            precision: of the weights.
            device: where the networks go; of the meta device no weights are read.
            network: dtype of the UNet's weights; ``precision`` if left out.
        """
        kind = next(loader for family, loader in _LOADERS if family is self.family)
        if torch.device(device) == META:
            return self._shapes(kind, precision, network or precision)
        self._require_room(precision, network or precision, torch.device(device).type)
        decoder = self.family.decoder_precision(self.configs["vae"], precision)
        if self.weights is None:
            dtypes = {"unet": network or precision, "vae": decoder, "default": precision}
            pipe = kind.from_pretrained(
                self.folder,
                variant=self.variant,
                use_safetensors=True,
                dtype=dtypes,
                local_files_only=True,
                **self.family.without,
            )
            for name in _networks(self.family, self.configs["index"]):
                if name.startswith("text_encoder"):  # diffusers refuses by itself, transformers not
                    folders.require_read(self.folder / name, getattr(pipe, name))
        else:
            pipe = kind.from_single_file(
                str(self.weights),
                config=str(self.folder),
                dtype=network or precision,
                local_files_only=True,
                **self.family.without,
            )
        return self._frozen(pipe, precision, device)

    def _require_room(self, precision: torch.dtype, network: torch.dtype, kind: str) -> None:
        """Refuse networks whose weights alone are larger than the device, before they are read."""
        if self.weights is not None:  # which may hold what is not loaded
            return
        sizes = [
            (network if name == "unet" else precision).itemsize
            * folders.least_numbers(self.folder / name)
            for name in _networks(self.family, self.configs["index"])
        ]
        remedy = "use a reduced precision (bfloat16), or a smaller model"
        require_room(sum(sizes), kind, f"model {self.model}", remedy)

    def _shapes(self, kind: Any, precision: torch.dtype, network: torch.dtype) -> Any:
        """The pipeline with networks that have shapes and no weights."""
        parts = dict[str, Any]()
        for name in self.family.parts(self.configs["index"]):
            if name == "scheduler":
                parts[name] = self.scheduler()
                continue
            library, made = self.configs["index"][name]
            made = getattr(importlib.import_module(library), made)
            if name.startswith("tokenizer"):
                parts[name] = made.from_pretrained(self.folder / name, local_files_only=True)
                continue
            settings = dict(self.configs[name])
            with META, _by_default(network if name == "unet" else precision):
                if library == "diffusers":
                    parts[name] = made.from_config(settings)
                else:
                    parts[name] = made(made.config_class.from_dict(settings))
        return self._frozen(kind(**parts, **self.family.without), precision, META)

    def _frozen(self, pipe: Any, precision: torch.dtype, device: torch.device | str) -> Any:
        """In evaluation mode, on a device."""
        decoder = self.family.decoder_precision(self.configs["vae"], precision)
        pipe.set_progress_bar_config(disable=True)
        for name in _networks(self.family, self.configs["index"]):
            part = getattr(pipe, name)
            part.requires_grad_(False).eval().to(device)
            dtype = decoder if name == "vae" else precision
            if name != "unet" and any(p.dtype != dtype for p in part.parameters()):
                part.to(dtype)  # which diffusers warns of, also where there is nothing to do
        return pipe


@contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    """Within this context new networks have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find(
    model: str | Path, *, config: str | Path | None = None, variant: str | None = None
) -> PipelineFiles:
    """The files of a model and its settings, checked; weights are not read.

    Args:
        model: "tiny", "words", a folder in diffusers' layout, a single ``.safetensors`` file, or a
            hub id.
        config: folder in diffusers' layout with the settings of a single file; what diffusers takes
            for its kind, from the hub, if left out.
        variant: of the weights in a folder; those that are there if left out.

    Raises:
        FileNotFoundError: ``model`` is a folder that lacks parts, or neither a folder nor to be had
            from the hub; the message says what is missing.
        ValueError: ``model`` is empty or of a class that is not supported, or its networks need
            other inputs than those of its class.
    """
    weights = folders.single_file(model)
    if weights is not None:
        folder = folders.settings_of_single_file(weights, config, SUPPORTED)
    elif config is not None:
        raise ValueError(
            f"config is for single files of weights; model {model} brings its own settings"
        )
    else:
        without = {name: None for family, _ in _LOADERS for name in family.without}
        folder = folders.local_folder(model, DiffusionPipeline, SUPPORTED, without, variant)
    folders.require_parts(folder, ())
    index = folders.read_settings(folder / "model_index.json")
    family = next(family for family, _ in _LOADERS if index["_class_name"] in family.classes)
    parts = family.parts(index)
    folders.require_parts(folder, parts)
    settings: dict[str, Mapping[str, Any]] = {"index": index}
    for name in parts:
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        if not name.startswith("tokenizer"):
            settings[name] = folders.read_settings(folder / name / file)
    family.check(str(model), settings)
    if weights is None:
        variant = folders.variant_of(folder, _networks(family, index), variant)
    return PipelineFiles(str(model), family, folder, settings, variant, weights)


def load_pipeline(
    model: str | Path,
    *,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """Find and load a pipeline, everything frozen and in evaluation mode.

    Raises:
        FileNotFoundError: the model is not there, or its folder lacks parts.
        ValueError: it is not supported.
    """
    return find(model).load(precision, device)


def _networks(family: Family, index: Mapping[str, Any]) -> list[str]:
    """Names of the parts that have weights."""
    return [name for name in family.parts(index) if not name.startswith(("tokenizer", "sched"))]
