"""LoRA adapters on a pretrained network: attached, switched off, recomputed.

A LoRA adapter is a product of two small float32 matrices beside each target layer, the second of
them zero at the start, so that a fresh adapter is the pretrained model.
"""

import difflib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_envs.models.counting import same_arithmetic

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRAINED = "default"  # name of the adapter that trains
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers reads
Probe = Callable[[nn.Module], Tensor]  # outputs of a network at some input
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LISTED = 3  # names in an error message


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
    pretrained: Any = None

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


def lora_switch(network: nn.Module, start: str | None = None) -> AdapterSwitch:
    """The switch of a network's LoRA layers.

    Args:
        network: with the adapter ``TRAINED``.
        start: a frozen adapter that is in use while that one is off; none if left out.
    """
    if start is None:
        return AdapterSwitch(partial(_enable, network, True), partial(_enable, network, False))
    return AdapterSwitch(partial(use, network, TRAINED), partial(use, network, start))


def _enable(network: nn.Module, enabled: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


def use(network: nn.Module, name: str) -> None:
    """Put the adapter of this name to use; only the one that trains wants gradients."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(name, inference_mode=name != TRAINED)


def recompute_activations(network: Any, switch: AdapterSwitch) -> None:
    """Keep no activations for the gradient but compute them again: less memory, more time.

    A block is computed again with the adapter as it was. Under diffusers' own
    ``enable_gradient_checkpointing()`` the adapter is as it happens to be when the gradient comes
    by, so that torch refuses gradients that pass through the pretrained model.
    """

    def call(block: nn.Module, *inputs: Any) -> Any:
        off, arithmetic = switch.is_off, same_arithmetic()

        def as_now(*inputs: Any) -> Any:
            with switch.switched(off), arithmetic():
                return block(*inputs)

        return checkpoint(as_now, *inputs, use_reentrant=False)

    for part in (network, switch.pretrained):
        if part is not None:
            part.enable_gradient_checkpointing(call)


# -- attaching -----------------------------------------------------------------------------------


def attach_lora(
    network: nn.Module,
    *,
    rank: int,
    targets: Sequence[str],
    seed: int,
    alpha: float | None = None,
    rank_stabilised: bool = False,
) -> list[nn.Parameter]:
    """Add a trainable LoRA adapter, in float32, that starts as the identity.

    Args:
        network: a UNet of diffusers, frozen; changed in place.
        rank: of the update of every target layer.
        targets: names of linear layers and convolutions: whole ones ("mid_block.resnets.0.conv1")
            or how they end ("to_q", "to_out.0", "ff.net.2", "conv1").
        seed: of the initial weights.
        alpha: the update is scaled by alpha / rank; ``rank`` if left out.
        rank_stabilised: scale by alpha / sqrt(rank) instead.

    Returns:
        The trainable parameters.

    Raises:
        ValueError: ``rank`` is not positive, or a target is no layer that can have an adapter;
            every such target is named, with names like it.
    """
    from peft import LoraConfig

    require_rank(rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType]  # floats too
        use_rslora=rank_stabilised,
        init_lora_weights=True,
        target_modules=_check_targets(network, targets),
    )
    inject(network, config, TRAINED, seed=seed)
    return trainable_parameters(network)


def inject(network: nn.Module, config: Any, name: str, *, seed: int) -> None:
    """Add an adapter of peft's, in float32, and put it to use."""
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft import inject_adapter_in_model

    devices = [p.device for p in network.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        torch.manual_seed(seed)  # peft draws from the global stream
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second one is meant
        if isinstance(network, PeftAdapterMixin):  # keeps a record of its adapters
            network.add_adapter(config, adapter_name=name)
        else:
            inject_adapter_in_model(config, network, adapter_name=name)
    for layer, parameter in network.named_parameters():
        if ".lora_" in layer:
            parameter.data = parameter.data.float()


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Those that want a gradient."""
    return [p for p in network.parameters() if p.requires_grad]


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


def layers_named(network: nn.Module, targets: Sequence[str]) -> set[str]:
    """Whole names of the layers that the targets name.

    Raises:
        ValueError: a target is no layer that can have an adapter.
    """
    targets = _check_targets(network, targets)
    return {
        name
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
        and any(name == target or name.endswith(f".{target}") for target in targets)
    }


def _short(name: str) -> str:
    """How a layer's name ends: its last word, and the word before where that is a number."""
    words = name.split(".")
    start = len(words) - 1
    while start > 0 and words[start].isdigit():
        start -= 1
    return ".".join(words[start:])
