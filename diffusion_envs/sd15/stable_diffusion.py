"""Which Stable Diffusion model, and how it is used: all that its weights do not say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion_envs.models.adapters import require_precision
from diffusion_envs.models.execution import Execution
from diffusion_envs.models.folders import SHIPPED, from_anywhere
from diffusion_envs.models.guidance_schedule import require_guidance, require_something_trains
from diffusion_envs.models.latent_decoder import require_resolution
from diffusion_envs.models.protocol import Model
from diffusion_envs.models.trainable import Reference, Trainable, Weights
from diffusion_envs.ranges import require_numbers


@dataclass(frozen=True)
class StableDiffusion:
    """Which Stable Diffusion model, and how it is used.

    Attributes:
        model: "tiny", "words", a folder in diffusers' layout, a single .safetensors file, or a hub
            id.
        config: folder in diffusers' layout with the settings of a single file; from the hub if left
            out.
        guidance: classifier-free guidance scale; 1 is none.
        negative_prompt: what guidance leads away from; the empty prompt if left out.
        variant: of the weights, such as fp16; those that are there if left out.
        lora_rank: of the adapter; 8 if left out; 0 for none, where the guidance scale trains alone.
        lora_alpha: the adapter's update is scaled by alpha / rank; the rank if left out.
        lora_targets: names of the layers that get one; those of attention if left out.
        lora_rank_stabilised: scale by alpha / sqrt(rank) instead.
        lora: folder or file of an existing LoRA to start from, whose rank, alpha and targets hold.
        trains: lora for an adapter, all for all weights of the UNet.
        reference: where the frozen pretrained UNet is if all weights train: copy (beside the one
            that trains) or offloaded (to the CPU's memory until it is asked for).
        sharded: divide the UNet, where all its weights train, and its frozen copy among the
            processes; of one process nothing is divided.
        guidance_knots: timesteps between which the guidance scale trains; 0: it does not.
        precision: of the network: float32, bfloat16 or (CUDA only) float16.
        resolution: pixels a side, or height and width; the model's own if left out.
        gradient_checkpointing: recompute activations: less memory, more time.
        compile: compile the UNet with torch.compile: minutes at first, faster calls then.
        channels_last: keep weights of convolutions with the channels last.
        decode_slices: decode one picture at a time: less memory.
        decode_tiles: decode pictures larger than the autoencoder's own in tiles: less memory, other
            pictures.
        device: cpu or cuda; what there is if left out.
    """

    model: str | Path = "tiny"
    config: str | Path | None = None
    guidance: float = 3.0
    negative_prompt: str | None = None
    variant: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: Sequence[str] | None = None
    lora_rank_stabilised: bool = False
    lora: str | Path | None = None
    trains: Weights = "lora"
    reference: Reference = "copy"
    sharded: bool = False
    guidance_knots: int = 0
    precision: str = "float32"
    resolution: int | tuple[int, int] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    decode_slices: bool = False
    decode_tiles: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        require_numbers(self)
        require_precision(self.precision)
        require_guidance(self.guidance)
        require_resolution(self.resolution)
        if not isinstance(self.negative_prompt, str | None):
            raise TypeError(f"negative_prompt must be a string, got {self.negative_prompt!r}")
        require_something_trains(not self._trainable().nothing, self.guidance_knots, self.sharded)
        Execution(self.compile, self.channels_last).require_fit(self.reference, self.sharded)
        if not isinstance(self.resolution, int | None):
            object.__setattr__(self, "resolution", tuple(self.resolution))  # lists of stored runs
        object.__setattr__(self, "model", from_anywhere(self.model, *SHIPPED))
        if self.config is not None:
            object.__setattr__(self, "config", from_anywhere(self.config))
        if self.lora_targets is not None:
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if self.lora is not None:
            object.__setattr__(self, "lora", str(Path(self.lora).expanduser().absolute()))

    def _trainable(self) -> Trainable:
        return Trainable(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
            rank_stabilised=self.lora_rank_stabilised,
            start=self.lora,
            weights=self.trains,
            reference=self.reference,
            sharded=self.sharded,
        )

    @property
    def label(self) -> str:
        """Name for reports."""
        return str(self.model)

    def load(self, *, device: torch.device, batch: int, seed: int) -> Model:
        """The pipeline with a fresh adapter.

        Args:
            device: where the networks go; ``self.device`` is what was asked for.
            batch: most rows that one call of the network gets when no gradient is asked for.
            seed: of the adapter's initial weights.

        Raises:
            ValueError: an argument does not fit the model.
            FileNotFoundError: the model is not there.
        """
        # diffusers and transformers are heavy
        from diffusion_envs.models.text_to_image_unet import TextToImageUNet

        return TextToImageUNet.load(
            self.model,
            config=self.config,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            variant=self.variant,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_targets=self.lora_targets,
            lora_rank_stabilised=self.lora_rank_stabilised,
            lora=self.lora,
            trains=self.trains,
            reference=self.reference,
            sharded=self.sharded,
            guidance_knots=self.guidance_knots,
            precision=self.precision,
            resolution=self.resolution,
            batch=batch,
            gradient_checkpointing=self.gradient_checkpointing,
            compile=self.compile,
            channels_last=self.channels_last,
            decode_slices=self.decode_slices,
            decode_tiles=self.decode_tiles,
            device=device,
            seed=seed,
        )
