"""What trains on a pretrained network: LoRA or all weights; switched off, exported, proved.

A LoRA adapter is a product of two small float32 matrices beside each target layer, the second of
them zero at the start, so that a fresh adapter is the pretrained model. An export is a file in
diffusers' format. It is called done only after plain diffusers has loaded it onto the pretrained
weights and every number of the adapter has come back, in a network with the same outputs.
"""

import difflib
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers reads
Probe = Callable[[nn.Module], Tensor]  # outputs of a network at some input
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LISTED = 3  # names in an error message


class ExportError(ValueError):
    """What was written for diffusers is not what was trained; nothing is left behind."""


def require_precision(name: str) -> None:
    """Refuse what is no precision.

    Raises:
        ValueError: it is none of ``PRECISIONS``.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {name!r}")


def require_rank(rank: object) -> None:
    """Refuse what is no rank of an adapter.

    Raises:
        ValueError: it is no integer of at least 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora_rank must be an integer of at least 1, got {rank!r}")


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name.

    Raises:
        ValueError: there is none, or it is float16 on a CPU, where it is 7 to 230 times slower.
    """
    require_precision(name)
    if name == "float16" and device.type == "cpu":
        raise ValueError("precision float16 is not for CPUs; use float32 or bfloat16")
    return PRECISIONS[name]


# -- switching off -------------------------------------------------------------------------------


def _nothing() -> None:
    """What trains lies in another network than what is pretrained: nothing to switch."""


@dataclass
class AdapterSwitch:
    """Whether what trains is in use, or the pretrained model.

    Attributes:
        enable: puts the adapter to use.
        disable: takes it out of use.
        is_off: whether it is out of use now.
        pretrained: the network that is asked while it is off; the same one if left out.
    """

    enable: Callable[[], None] = _nothing
    disable: Callable[[], None] = _nothing
    is_off: bool = False
    pretrained: nn.Module | None = None

    def asked(self, network: Any) -> Any:
        """Which network to ask now: this one, or the pretrained one."""
        return network if self.pretrained is None or not self.is_off else self.pretrained

    @contextmanager
    def switched(self, off: bool) -> Iterator[None]:
        """Within this context the adapter is off, or on; after it, as it was."""
        before = self.is_off
        self._switch(off)
        try:
            yield
        finally:
            self._switch(before)

    def off(self) -> AbstractContextManager[None]:
        """Within this context the model is the pretrained one."""
        return self.switched(off=True)

    def _switch(self, off: bool) -> None:
        if off == self.is_off:
            return
        if off:
            self.disable()
        else:
            self.enable()
        self.is_off = off


def lora_switch(network: nn.Module) -> AdapterSwitch:
    """The switch of a network's LoRA layers."""
    return AdapterSwitch(partial(_enable, network, True), partial(_enable, network, False))


def _enable(network: nn.Module, enabled: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


def recompute_activations(network: Any, switch: AdapterSwitch) -> None:
    """Keep no activations for the gradient but compute them again: less memory, more time.

    A block is computed again with the adapter as it was. Under diffusers' own
    ``enable_gradient_checkpointing()`` the adapter is as it happens to be when the gradient comes
    by, so that torch refuses gradients that pass through the pretrained model.
    """

    def call(block: nn.Module, *inputs: Any) -> Any:
        off = switch.is_off

        def as_now(*inputs: Any) -> Any:
            with switch.switched(off):
                return block(*inputs)

        return checkpoint(as_now, *inputs, use_reentrant=False)

    for part in (network, switch.pretrained):
        if part is not None:
            part.enable_gradient_checkpointing(call)


# -- attaching -----------------------------------------------------------------------------------


def attach_lora(
    network: nn.Module, *, rank: int, targets: Sequence[str], seed: int
) -> list[nn.Parameter]:
    """Add a trainable LoRA adapter, in float32, that starts as the identity.

    Args:
        network: a UNet of diffusers, frozen; changed in place.
        rank: of the update of every target layer; its scale is 1.
        targets: names of linear layers and convolutions: whole ones ("mid_block.resnets.0.conv1")
            or how they end ("to_q", "to_out.0", "ff.net.2", "conv1").
        seed: of the initial weights.

    Returns:
        The trainable parameters.

    Raises:
        ValueError: ``rank`` is not positive, or a target is no layer that can have an adapter;
            every such target is named, with names like it.
    """
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft import LoraConfig, inject_adapter_in_model

    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora_rank must be an integer of at least 1, got {rank!r}")
    names = _check_targets(network, targets)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=names)
    devices = [p.device for p in network.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices):  # peft draws from the global stream
        torch.manual_seed(seed)
        if isinstance(network, PeftAdapterMixin):  # keeps a record of its adapters
            network.add_adapter(config)
        else:
            inject_adapter_in_model(config, network)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _check_targets(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The targets, each of them the name of a layer, or how one ends."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora_targets must be a list of names of layers, got {targets!r}")
    layers = [
        name for name, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)
    ]
    unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in layers)]
    if not unknown:
        return list(dict.fromkeys(targets))
    known = sorted({_short(name) for name in layers})
    blocks = {name for name, _ in network.named_modules()}

    def refusal(target: str) -> str:
        near = difflib.get_close_matches(target, known + layers, n=_LISTED, cutoff=0.5)
        if any(n == target or n.endswith(f".{target}") for n in blocks):
            inside = sorted({_short(n) for n in layers if f".{target}." in f".{n}"})
            what = "is neither a linear layer nor a convolution"
            near = [name for name in inside if name not in targets][: 2 * _LISTED]
        else:
            what = "is no layer of the model"
        return f"{target!r} {what}" + (f" (did you mean {', '.join(near)}?)" if near else "")

    raise ValueError(
        f"lora_targets must name linear layers or convolutions: "
        f"{'; '.join(refusal(target) for target in unknown)}. There are: {', '.join(known)}"
    )


def _short(name: str) -> str:
    """How a layer's name ends: its last word, and the word before where that is a number."""
    words = name.split(".")
    start = len(words) - 1
    while start > 0 and words[start].isdigit():
        start -= 1
    return ".".join(words[start:])


# -- exporting -----------------------------------------------------------------------------------


def export_lora(
    unet: Any, folder: Path, probe: Callable[[nn.Module], Tensor], *, prefix: str = "unet"
) -> Path:
    """Write the adapter for ``pipe.load_lora_weights(folder)``; plain diffusers reads it first.

    All layers have keys of one format, ``unet.<layer>.lora_A.weight``: diffusers tells the format
    of a file by one key.

    Args:
        unet: a UNet2DConditionModel with the adapter.
        folder: gets ``pytorch_lora_weights.safetensors``, readable as the umask says.
        probe: outputs of a network at some input.
        prefix: of the keys: which part of the pipeline the adapter belongs to.

    Returns:
        The file.

    Raises:
        ExportError: what diffusers loads is not what was trained; what is missing is named.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    layers = get_peft_model_state_dict(unet)
    tensors = {f"{prefix}.{name}": t.detach().cpu().contiguous() for name, t in layers.items()}
    path = folder / LORA_FILE
    unproved = folder / f".unproved-{LORA_FILE}"
    # safetensors' own save_file makes files that only their owner can read
    unproved.write_bytes(save(tensors, metadata={"format": "pt"}))
    try:
        prove_lora(unet, unproved, probe)
        unproved.replace(path)
    finally:
        unproved.unlink(missing_ok=True)
    return path


def prove_lora(unet: Any, path: Path, probe: Callable[[nn.Module], Tensor]) -> None:
    """Let plain diffusers load ``path`` onto the pretrained network; compare with the trained one.

    The pretrained network shares the weights that do not train, so no second copy is held.

    Raises:
        ExportError: numbers of the adapter are missing or other ones, or outputs differ.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    fresh = _pretrained_twin(unet)
    layers, alphas, *_ = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(
        layers, alphas, fresh, adapter_name="exported"
    )
    trained = get_peft_model_state_dict(unet)
    loaded: dict[str, Tensor] = {}
    if getattr(fresh, "peft_config", None):
        loaded = get_peft_model_state_dict(fresh, adapter_name="exported")

    def same(name: str) -> bool:
        if name not in loaded or loaded[name].shape != trained[name].shape:
            return False
        return torch.equal(loaded[name], trained[name].to(loaded[name]))

    if lost := [name for name in trained if not same(name)]:
        numbers = sum(tensor.numel() for tensor in trained.values())
        raise ExportError(
            f"the exported adapter is not the trained one: diffusers loads other values for "
            f"{sum(trained[name].numel() for name in lost)} of its {numbers} numbers, those of "
            f"{_some(lost)}. Nothing was exported; the checkpoint is intact"
        )
    compare_outputs(unet, fresh, probe)


def compare_outputs(
    trained: nn.Module, loaded: nn.Module, probe: Callable[[nn.Module], Tensor]
) -> None:
    """Compare outputs of two networks that should be one.

    Raises:
        ExportError: they differ by more than rounding, relative to the outputs' size.
    """
    with torch.no_grad():
        theirs, ours = probe(loaded).double(), probe(trained).double()
    reduced = any(p.dtype != torch.float32 for p in loaded.parameters())
    # float32 networks whose LoRA is merged, or added in another order, agree to 1e-5 or so
    bound = 0.05 if reduced else 1e-3
    gap, size = (theirs - ours).norm().item(), ours.norm().item()
    if not gap <= bound * size:
        raise ExportError(
            f"the exported model's outputs are not those of the trained one: they differ by "
            f"{gap:.2g} where {bound:g} of {size:.2g} is rounding. Nothing was exported; the "
            "checkpoint is intact"
        )


def _pretrained_twin(network: Any) -> Any:
    """The same network without its adapter; the weights are shared, not copied."""
    with torch.device("meta"):
        twin = type(network).from_config(network.config)
    weights = {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    twin.load_state_dict(weights, assign=True)
    return twin.requires_grad_(False).eval()


def merged_twin(network: Any) -> Any:
    """The same network without LoRA layers: their updates are added to the weights."""
    from peft.tuners.lora import LoraLayer

    twin = _pretrained_twin(network)
    weights = dict(twin.named_parameters())
    layers: list[tuple[str, Any]] = [
        (name, part) for name, part in network.named_modules() if isinstance(part, LoraLayer)
    ]
    with torch.no_grad():
        for name, layer in layers:
            weight = weights[f"{name}.weight"] + layer.get_delta_weight("default")
            twin.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return twin


def publish(unproved: Path, folder: Path) -> Path:
    """Put a written folder in its place, readable as the umask says, instead of an older one."""
    marker = unproved / ".mode"
    marker.touch()
    mode = stat.S_IMODE(marker.stat().st_mode)
    marker.unlink()
    for file in unproved.rglob("*"):
        if file.is_file():
            file.chmod(mode)
    if folder.exists():
        shutil.rmtree(folder)
    return unproved.rename(folder)


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} others" if more > 0 else "")
