"""What a network takes, counted on tensors without numbers: nothing is computed or stored.

Counts are exact for the architecture: floating point operations (a multiplication and an addition
are two), parameters, and bytes that are kept for the gradient. They are no measurement.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.full_size import XL_UNET
from diffusion_envs.tiny.captions import write_tokenizer
from diffusion_envs.tiny.train_denoiser import scheduler

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers of attention, ours by default
SD15_UNET: dict[str, Any] = {
    "cross_attention_dim": 768,
    "sample_size": 64,
    "attention_head_dim": 8,
}
MIDDLE_UNET: dict[str, Any] = {  # between the embedded model and SD1.5: 6 M parameters
    "cross_attention_dim": 64,
    "sample_size": 16,
    "attention_head_dim": 8,
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
_LARGE_DECODER = (128, 256, 512, 512)
_SMALL_DECODER = (32, 64)


@dataclass(frozen=True)
class Counts:
    """Of one network at one size.

    Attributes:
        parameters: of the UNet.
        adapter: parameters of its LoRA.
        forward: floating point operations of a row, with the adapter.
        gradient: the same forward and backward, with gradients of the adapter alone.
        gradient_of_all: the same with gradients of all weights, without an adapter.
        decode: operations of a picture.
        kept: bytes that a row keeps for its gradient, adapter alone.
        kept_recomputed: the same where activations are computed again.
        event: numbers of a state.
        pixels: of a picture, three channels.
    """

    parameters: int
    adapter: int
    forward: int
    gradient: int
    gradient_of_all: int
    decode: int
    kept: int
    kept_recomputed: int
    event: int
    pixels: int


def _operations(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def _kept_bytes(call: Callable[[], Tensor], weights: nn.Module) -> int:
    """Bytes of tensors that the graph of a call holds, weights and twice the same apart."""
    own = {p.untyped_storage()._cdata for p in [*weights.parameters(), *weights.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


class _Fused(torch.autograd.Function):
    """Attention as fused kernels keep it: what goes in and out, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Shapes alone."""
        mixed = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mixed, query.new_empty(query.shape[:-1]))
        return mixed

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Never asked: what is kept for it is counted, on tensors without numbers."""
        raise NotImplementedError("nothing is differentiated where bytes are counted")  # a guard


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Within it attention keeps no weights, as on GPUs; on the meta device it would."""
    functional: Any = nn.functional
    usual = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, **_: _Fused.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _decoder(channels: tuple[int, ...]) -> AutoencoderKL:
    levels = len(channels)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": channels,
    }
    return AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4, norm_num_groups=32)


def _unet(name: str) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{"sd15": SD15_UNET, "sdxl": XL_UNET, "middle": MIDDLE_UNET}[name])


class _Network:
    """A UNet and its decoder without numbers, and what they are asked."""

    def __init__(self, name: str, precision: torch.dtype) -> None:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(precision)
        try:
            self.unet = _unet(name)
            self.decoder: Any = _decoder(_SMALL_DECODER if name == "middle" else _LARGE_DECODER)
        finally:
            torch.set_default_dtype(usual)
        settings: Any = self.unet.config
        side, width = settings["sample_size"], settings["cross_attention_dim"]
        self.states = torch.empty(1, 4, side, side, dtype=precision)
        self.words = torch.empty(1, 77, width, dtype=precision)
        self.more: dict[str, Any] = {}
        if name == "sdxl":
            pooled = torch.empty(1, 1280, dtype=precision)
            ids = torch.empty(1, 6, dtype=precision)
            self.more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        self.times = torch.empty(1)

    def call(self) -> Tensor:
        """One row."""
        asked = self.unet(self.states, self.times, encoder_hidden_states=self.words, **self.more)
        return asked.sample

    def attach(self, rank: int) -> None:
        """Freeze the weights and attach a LoRA."""
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))


def counted(name: str, *, rank: int, precision: torch.dtype = torch.bfloat16) -> Counts:
    """Counts of "sd15", "sdxl" or "middle" at its own size.

    Args:
        name: which network.
        rank: of the LoRA on the layers of attention.
        precision: of the activations.
    """
    with torch.device("meta"):
        network = _Network(name, precision)
        parameters = sum(p.numel() for p in network.unet.parameters())
        everything = _operations(lambda: network.call().sum().backward())
        network.attach(rank)
        with torch.no_grad():
            forward = _operations(network.call)
            decode = _operations(lambda: network.decoder.decode(network.states))
            pictures: Any = network.decoder.decode(network.states)
        gradient = _operations(lambda: network.call().sum().backward())
        with _fused_attention():
            kept = _kept_bytes(network.call, network.unet)
            network.unet.enable_gradient_checkpointing()
            network.unet.train()
            recomputed = _kept_bytes(network.call, network.unet)
    return Counts(
        parameters=parameters,
        adapter=sum(p.numel() for p in network.unet.parameters() if p.requires_grad),
        forward=forward,
        gradient=gradient,
        gradient_of_all=everything,
        decode=decode,
        kept=kept,
        kept_recomputed=recomputed,
        event=network.states.numel(),
        pixels=pictures.sample.numel(),
    )


def build_middle(folder: Path) -> None:
    """Write the middle model as a pipeline, with random weights."""
    settings = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    write_tokenizer(folder / "tokenizer")
    from transformers import CLIPTokenizer

    absent: Any = None  # diffusers takes it, its annotations do not
    schedule: Any = scheduler()  # diffusers annotates it as an enumeration
    pipe = StableDiffusionPipeline(
        unet=_unet("middle"),
        vae=_decoder(_SMALL_DECODER),
        text_encoder=CLIPTextModel(settings),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=schedule,
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
