"""What trains of a network, and what its pretrained self is: a LoRA adapter, or all weights.

``Trainable`` names it, before anything is loaded. ``Trainable.attach`` puts it on a network, and
says which parameters train, how they are switched off, and which network is asked then.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from diffusion_envs.models import adapters

Weights = Literal["lora", "all"]
Reference = Literal["copy", "offloaded"]
RANK = 8  # of an adapter, where none is named


@dataclass(frozen=True)
class Trainable:
    """What trains of a network.

    Attributes:
        rank: of the adapter; 0 for none; 8 if left out, or that of the LoRA it starts from.
        alpha: the adapter's update is scaled by alpha / rank; the rank, for a scale of 1, if left
            out.
        targets: names of the layers that get an adapter, or how they end; those of attention if
            left out.
        rank_stabilised: scale by alpha / sqrt(rank) instead (peft's ``use_rslora``).
        start: folder or file of an existing LoRA that the adapter starts from.
        weights: "lora", or "all" for the network's own weights.
        reference: where the frozen pretrained network is if all weights train: "copy" beside the
            one that trains, or "offloaded" to the CPU's memory until it is asked for.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: Sequence[str] | None = None
    rank_stabilised: bool = False
    start: str | Path | None = None
    weights: Weights = "lora"
    reference: Reference = "copy"

    def __post_init__(self) -> None:
        for name, value, kinds in (
            ("trains", self.weights, get_args(Weights)),
            ("reference", self.reference, get_args(Reference)),
        ):
            if value not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {value!r}")
        if self.rank is not None and (self.rank != 0 or isinstance(self.rank, bool)):
            adapters.require_rank(self.rank)
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(
                f"lora_alpha must be a positive finite number, got {self.alpha}; leave it out for "
                "a scale of 1"
            )
        self._require_one_kind()

    def _require_one_kind(self) -> None:
        """Refuse options of an adapter where there is none, and of a copy where there is none."""
        named = {
            "lora_rank": self.rank not in (None, 0),
            "lora_alpha": self.alpha is not None,
            "lora_targets": self.targets is not None,
            "lora_rank_stabilised": self.rank_stabilised,
            "lora": self.start is not None,
        }
        if self.weights == "all" and (
            wrong := [name for name, is_named in named.items() if is_named]
        ):
            raise ValueError(
                f"{', '.join(wrong)} must be left out where all weights train, which have no "
                "adapter; or leave out trains='all'"
            )
        if self.weights == "lora" and self.reference != "copy":
            raise ValueError(
                f"reference must be left out where a LoRA trains, got {self.reference!r}: the "
                "pretrained network is the same one without its adapter, and is not copied"
            )
        del named["lora_rank"], named["lora_targets"]
        if self.rank == 0 and (wrong := [name for name, is_named in named.items() if is_named]):
            raise ValueError(
                f"{', '.join(wrong)} must be left out where lora_rank is 0: no adapter"
            )

    @property
    def nothing(self) -> bool:
        """Whether the network stays as it is."""
        return self.rank == 0 and self.weights == "lora"

    def attach(self, network: Any, *, seed: int) -> "Attached":
        """Put it on a frozen network of diffusers, in place.

        Args:
            network: on its device; in float32 where all weights train.
            seed: of an adapter's initial weights.

        Raises:
            ValueError: the options do not fit the network.
        """
        if self.weights == "all":
            frozen = copy.deepcopy(network)
            parameters = list(network.requires_grad_(True).parameters())
            return Attached(self, network, parameters, adapters.AdapterSwitch(pretrained=frozen))
        parameters = list[nn.Parameter]()
        if self.rank != 0:
            parameters = adapters.attach_lora(
                network,
                rank=RANK if self.rank is None else self.rank,
                targets=adapters.ATTENTION if self.targets is None else self.targets,
                seed=seed,
            )
        return Attached(self, network, parameters, adapters.lora_switch(network))


@dataclass
class Attached:
    """A network with what trains on it.

    Attributes:
        trainable: what was asked for.
        network: that trains, of diffusers.
        parameters: those that train, float32; none where nothing of the network does.
        switch: makes the network the pretrained one, and says which network to ask.
    """

    trainable: Trainable
    network: Any
    parameters: list[nn.Parameter]
    switch: adapters.AdapterSwitch = field(default_factory=adapters.AdapterSwitch)

    def write(self, folder: Path, probe: adapters.Probe) -> Path:
        """Write the adapter for ``pipe.load_lora_weights(folder)``; plain diffusers reads it first.

        Args:
            folder: gets the files.
            probe: outputs of a network like this one, at some inputs.

        Raises:
            ExportError: what diffusers loads is not what was trained.
        """
        return adapters.export_lora(self.network, folder, probe)
