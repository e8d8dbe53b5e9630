"""What is written of a trained network for other programs, and the proof that they read it.

An adapter is written twice: in diffusers' layout, and in that of kohya's scripts, which
AUTOMATIC1111, Forge, ComfyUI, SD.Next and InvokeAI load. All weights, and an adapter merged into
them, are a pipeline folder. An export is called done only after plain diffusers has loaded it and
every number has come back, in a network with the same outputs.
"""

import json
import logging
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusion_envs import digests
from diffusion_envs.models.adapters import LORA_FILE, TRAINED, Probe
from diffusion_envs.whole_files import naming, synchronise

KOHYA_FILE = "lora_kohya.safetensors"  # diffusers takes no name but its own from a folder
PIPELINE = "pipeline"  # the folder of a whole model
_LISTED = 3  # names in an error message
_log = logging.getLogger(__name__)


class ExportError(ValueError):
    """What was written for other programs is not what was trained; nothing is left behind."""


# -- an adapter ----------------------------------------------------------------------------------


def export_lora(unet: Any, folder: Path, probe: Probe, *, prefix: str = "unet") -> Path:
    """Write the adapter for ``pipe.load_lora_weights(folder)``; plain diffusers reads it first.

    All layers have keys of one format, ``unet.<layer>.lora_A.weight``: diffusers tells the format
    of a file by one key. The scale (alpha / rank) is multiplied into ``lora_B``, so that every
    version of every program agrees about it; the file in kohya's layout beside it has the numbers
    as they were trained, and alphas.

    Args:
        unet: a UNet2DConditionModel with the adapter.
        folder: gets ``pytorch_lora_weights.safetensors`` and ``lora_kohya.safetensors``, readable
            as the umask says. The second one is left out, with a warning, where that layout has no
            name for a layer.
        probe: outputs of a network at some input.
        prefix: of the keys: which part of the pipeline the adapter belongs to.

    Returns:
        The file in diffusers' layout.

    Raises:
        ExportError: what diffusers loads is not what was trained; what is missing is named.
    """
    tensors = {f"{prefix}.{name}": tensor for name, tensor in _scaled(unet).items()}
    path = _proved(folder / LORA_FILE, tensors, {}, lambda file: prove_lora(unet, file, probe))
    kohya = folder / KOHYA_FILE
    kohya.unlink(missing_ok=True)  # of an earlier export
    try:
        _proved(kohya, *kohya_layout(unet), lambda file: prove_lora(unet, file, probe, kohya=True))
    except ExportError as error:
        _log.warning("no adapter in kohya's layout was written: %s", error)
    return path


def _proved(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    prove: Callable[[Path], None],
) -> Path:
    """Write a safetensors file under another name, prove it, and put it in its place."""
    from safetensors.torch import save

    unproved = path.with_name(f".unproved-{path.name}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {"format": "pt", digests.KEY: digests.of_tensors(plain), **metadata}
    try:
        with naming(path):
            # safetensors' own save_file makes files that only their owner can read
            unproved.write_bytes(_in_order(save(plain, metadata=told)))
            synchronise(unproved)
        prove(unproved)
        unproved.replace(path)
    finally:
        unproved.unlink(missing_ok=True)
    return path


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: equal models make equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def prove_lora(unet: Any, path: Path, probe: Probe, *, kohya: bool = False) -> None:
    """Let plain diffusers load ``path`` onto the pretrained network; compare with the trained one.

    The pretrained network shares the weights that do not train, so no second copy is held.

    Raises:
        ExportError: numbers of the adapter are missing or other ones, or outputs differ.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    fresh = pretrained_twin(unet)
    try:
        layers, alphas, *_ = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path.parent), weight_name=path.name, local_files_only=True, unet_config=unet.config
        )
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(
            layers, alphas, fresh, adapter_name="exported"
        )
    except (ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"diffusers does not read the exported adapter: {reason}") from error
    trained = get_peft_model_state_dict(unet, adapter_name=TRAINED) if kohya else _scaled(unet)
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


def _lora_layers(network: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in network.named_modules() if isinstance(part, LoraLayer)}


def _scaled(unet: Any) -> dict[str, Tensor]:
    """The adapter's factors, with its scale multiplied into the second one."""
    tensors = dict[str, Tensor]()
    for name, layer in _lora_layers(unet).items():
        down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
        tensors[f"{name}.lora_A.weight"] = down.detach()
        tensors[f"{name}.lora_B.weight"] = up.detach() * layer.scaling[TRAINED]
    return tensors


# -- kohya's layout ------------------------------------------------------------------------------


def kohya_layout(unet: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The adapter as kohya's scripts write it, and the metadata that programs show.

    Layers of Stable Diffusion 1.x and 2.x have diffusers' names, those of SDXL the names of the
    original network, because those scripts train the one in diffusers' classes, the other in its
    own.

    Raises:
        ExportError: a layer has no name in this layout.
    """
    original = unet.config.get("addition_embed_type") == "text_time"
    tensors, ranks, alphas = dict[str, Tensor](), set[int](), set[float]()
    for name, layer in _lora_layers(unet).items():
        rank = layer.r[TRAINED]
        alpha = layer.scaling[TRAINED] * rank
        named = original_name(name, unet.config.layers_per_block) if original else name
        key = f"lora_unet_{named.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = layer.lora_A[TRAINED].weight
        tensors[f"{key}.lora_up.weight"] = layer.lora_B[TRAINED].weight
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        ranks.add(rank)
        alphas.add(alpha)
    width = unet.config.cross_attention_dim
    version = "sdxl_base_v1-0" if original else {768: "sd_v1", 1024: "sd_v2"}.get(width)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    return tensors, metadata | ({} if version is None else {"ss_base_model_version": version})


_OUTSIDE = {  # blocks
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(
    r"(?P<side>down_blocks\.(?P<down>\d+)|mid_block|up_blocks\.(?P<up>\d+))\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


def original_name(name: str, layers: int) -> str:
    """What a layer of diffusers' SDXL is called in the original network.

    Args:
        name: in diffusers.
        layers: of a block (``layers_per_block``).

    Raises:
        ExportError: the original network has no such layer.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    place = _PLACE.fullmatch(name)
    if place is None:
        raise ExportError(f"layer {name} has no name in the original network")
    kind, index, rest = place["kind"], int(place["index"]), place["rest"]
    if kind == "resnets":
        rest = _IN_RESNET[rest]
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2}.get(kind, 0)
    if place["down"] is not None:
        block = 1 + int(place["down"]) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{block + layers}.0.op"
        return f"input_blocks.{block + index}.{inner}.{rest}"
    if place["up"] is not None:
        block = int(place["up"]) * (layers + 1)
        return f"output_blocks.{block + (layers if kind == 'upsamplers' else index)}.{inner}.{rest}"
    return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"


# -- whole networks ------------------------------------------------------------------------------


def export_pipeline(
    pipe: Any, network: nn.Module, folder: Path, probe: Probe, trained: nn.Module | None = None
) -> Path:
    """Write a pipeline with this network in its place; plain diffusers reads it first.

    Args:
        pipe: that the network belongs to; its other parts are written as they are.
        network: all of its weights; no adapter.
        folder: gets it, instead of an older one.
        probe: outputs of a network at some input.
        trained: whose outputs it must have; ``network`` if left out.

    Returns:
        The folder.

    Raises:
        ExportError: what diffusers loads is not what was trained.
    """
    unproved = folder.parent / f".unproved-{folder.name}"
    shutil.rmtree(unproved, ignore_errors=True)  # of a process that was killed
    own = pipe.unet
    try:
        pipe.register_modules(unet=network)
        with naming(folder):
            try:
                pipe.save_pretrained(unproved)
            except SafetensorError as error:
                raise OSError(str(error)) from error
        pipe.register_modules(unet=own)
        loaded: Any = type(pipe).from_pretrained(
            unproved, local_files_only=True, use_safetensors=True
        )
        theirs = loaded.unet.state_dict()
        lost = [
            name
            for name, tensor in network.state_dict().items()
            if not torch.equal(theirs[name], tensor.to(theirs[name]))
        ]
        if lost:
            raise ExportError(
                f"diffusers loads other values than were trained for {_some(lost)}; nothing was "
                "exported; the checkpoint is intact"
            )
        where = next(network.parameters()).device
        compare_outputs(trained or network, loaded.unet.eval().to(where), probe)
        return publish(unproved, folder)
    finally:
        pipe.register_modules(unet=own)
        shutil.rmtree(unproved, ignore_errors=True)


def compare_outputs(trained: nn.Module, loaded: nn.Module, probe: Probe) -> None:
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


def pretrained_twin(network: Any) -> Any:
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
    twin = pretrained_twin(network)
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, layer in _lora_layers(network).items():
            weight = weights[f"{name}.weight"] + layer.get_delta_weight(TRAINED)
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
