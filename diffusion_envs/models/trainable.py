"""What trains of a network, and what its pretrained self is: a LoRA adapter, or all weights.

``Trainable`` names it, before anything is loaded. ``Trainable.attach`` puts it on a network, and
says which parameters train, how they are switched off, and which network is asked then.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from diffusion_envs.models import adapters, exports
from diffusion_envs.models.existing_lora import LoraFile, LoraLayer
from diffusion_envs.training.sharded import Shards, processes

Weights = Literal["lora", "all"]
Reference = Literal["copy", "offloaded"]
LEARNING_RATE_OF_ALL = 1e-5  # of all weights: that of adapters destroys them in two updates
_START = "start"  # name of the frozen adapter with which training began
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
        sharded: divide all weights, where they train, and their frozen copy among the processes
            (``training.sharded``); of one process nothing is divided.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: Sequence[str] | None = None
    rank_stabilised: bool = False
    start: str | Path | None = None
    weights: Weights = "lora"
    reference: Reference = "copy"
    sharded: bool = False

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
        if self.start is not None and self.rank_stabilised:
            raise ValueError(
                "lora_rank_stabilised must be left out where training starts from a LoRA, whose "
                "own scale holds"
            )
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
        if self.weights == "lora" and self.sharded:
            raise ValueError(
                "sharded must be left out where a LoRA trains: its network is frozen, and what "
                "trains is small; or use trains='all'"
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
            return self._attach_all(network)
        if self.start is not None:
            return self._attach_existing(network, LoraFile.at(self.start), seed)
        parameters = list[nn.Parameter]()
        if self.rank != 0:
            parameters = adapters.attach_lora(
                network,
                rank=RANK if self.rank is None else self.rank,
                alpha=self.alpha,
                rank_stabilised=self.rank_stabilised,
                targets=adapters.ATTENTION if self.targets is None else self.targets,
                seed=seed,
            )
        return Attached(self, network, parameters, adapters.lora_switch(network))

    def require_start(self) -> None:
        """Look at the LoRA that it starts from, before anything large is loaded.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no LoRA of a UNet, or the options contradict it.
        """
        if self.start is None:
            return
        file = LoraFile.at(self.start)
        if self.rank is not None and file.ranks != (self.rank,):
            ranks = " and ".join(map(str, file.ranks))
            raise ValueError(
                f"lora_rank must be left out, or be that of the LoRA that it starts from: {ranks}, "
                f"got {self.rank}"
            )

    def _attach_all(self, network: Any) -> "Attached":
        where = network.device
        if where.type != "meta":
            network.cpu()  # a second one never lies on the device for a copy
        frozen = copy.deepcopy(network)
        network.to(where).requires_grad_(True)
        offloaded = self.reference == "offloaded"
        if self.sharded and processes() > 1:
            shards = Shards.of(network, frozen.to(where), where, offloaded=offloaded)
            switch = adapters.AdapterSwitch(pretrained=frozen)
            return Attached(self, network, list(network.parameters()), switch, shards)
        if not offloaded:
            switch = adapters.AdapterSwitch(pretrained=frozen.to(where))
        else:
            places = Offloaded(frozen, where)
            switch = adapters.AdapterSwitch(places.send_back, places.bring_in, pretrained=frozen)
        return Attached(self, network, list(network.parameters()), switch)

    def _attach_existing(self, network: Any, file: LoraFile, seed: int) -> "Attached":
        """Two adapters with the file's numbers: one trains, the other is the reference."""
        from peft import LoraConfig

        self.require_start()
        layers = file.layers(network)
        self._require_same(layers, network)
        ranks = {name: layer.rank for name, layer in layers.items()}
        alphas = {name: layer.alpha for name, layer in layers.items()}
        for adapter in (_START, adapters.TRAINED):
            config = LoraConfig(
                r=max(ranks.values()),
                lora_alpha=max(alphas.values()),  # pyright: ignore[reportArgumentType]  # floats too
                target_modules=list(layers),
                rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
                alpha_pattern={f"^{name}": alpha for name, alpha in alphas.items()},
            )
            adapters.inject(network, config, adapter, seed=seed)
            for name, layer in layers.items():
                place = network.get_submodule(name)
                place.lora_A[adapter].weight.data.copy_(layer.down)
                place.lora_B[adapter].weight.data.copy_(layer.up)
        adapters.use(network, adapters.TRAINED)
        parameters = adapters.trainable_parameters(network)
        return Attached(self, network, parameters, adapters.lora_switch(network, _START))

    def _require_same(self, layers: Mapping[str, LoraLayer], network: Any) -> None:
        """Refuse options that contradict the LoRA that it starts from."""
        scales = sorted({layer.alpha for layer in layers.values()})
        if self.alpha is not None and scales != [self.alpha]:
            raise ValueError(
                "lora_alpha must be left out, or be that of the LoRA that it starts from: "
                f"{' and '.join(f'{alpha:g}' for alpha in scales)}, got {self.alpha:g}"
            )
        if self.targets is not None:
            asked = adapters.layers_named(network, self.targets)
            if differ := sorted(asked.symmetric_difference(layers)):
                raise ValueError(
                    "lora_targets must be left out, or name the layers of the LoRA that it starts "
                    f"from; {len(differ)} differ, such as {differ[0]}"
                )


class Offloaded:
    """A frozen network whose weights are on the CPU until it is asked.

    Weights are exchanged, not changed: a graph that passed through the network keeps those that it
    was made with, so gradients stay right after it was sent back.

    Args:
        network: on the CPU.
        device: where it is asked.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._device = device
        self._places = [
            (module, name, parameter.data.pin_memory() if pinned else parameter.data)
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._buffers = [
            (module, name, buffer)
            for module in network.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.send_back()

    def bring_in(self) -> None:
        """Copy the weights to the device."""
        for module, name, tensor in self._places:
            copied = tensor.to(self._device, non_blocking=True, copy=True)
            setattr(module, name, nn.Parameter(copied, requires_grad=False))
        for module, name, buffer in self._buffers:
            setattr(module, name, buffer.to(self._device))

    def send_back(self) -> None:
        """Forget the copies."""
        for module, name, tensor in self._places:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        for module, name, buffer in self._buffers:
            setattr(module, name, buffer)


@dataclass
class Attached:
    """A network with what trains on it.

    Attributes:
        trainable: what was asked for.
        network: that trains, of diffusers.
        parameters: those that train, float32; none where nothing of the network does.
        switch: makes the network the pretrained one, and says which network to ask.
        shards: what of it is sharded among processes.
    """

    trainable: Trainable
    network: Any
    parameters: list[nn.Parameter]
    switch: adapters.AdapterSwitch = field(default_factory=adapters.AdapterSwitch)
    shards: Shards = field(default_factory=Shards)

    def write(self, folder: Path, probe: adapters.Probe, pipe: Any = None) -> Path:
        """Write what was trained, for plain diffusers, which reads it first.

        Args:
            folder: gets the adapter's files, or where all weights train the folder ``pipeline``.
            probe: outputs of a network like this one, at some inputs.
            pipe: that the network belongs to.

        Raises:
            ExportError: what diffusers loads is not what was trained.
        """
        if self.trainable.weights == "all":
            plain = self.shards.plain(self.network)
            return exports.export_pipeline(pipe, plain, folder / exports.PIPELINE, probe)
        return exports.export_lora(self.network, folder, probe)

    def merge(self, folder: Path, probe: adapters.Probe, pipe: Any) -> Path:
        """Write the pipeline with what was trained in its weights; plain diffusers reads it first.

        Args:
            folder: gets the pipeline.
            probe: outputs of a network like this one, at some inputs.
            pipe: that the network belongs to.

        Raises:
            ExportError: what diffusers loads is not what was trained.
            ValueError: nothing of the network was trained.
        """
        if not self.parameters:
            raise ValueError(
                "nothing of the network was trained (lora_rank 0): the model is as it was"
            )
        merged = trained = self.shards.plain(self.network)
        if self.trainable.weights == "lora":
            merged = exports.merged_twin(self.network)
        return exports.export_pipeline(pipe, merged, folder, probe, trained)
