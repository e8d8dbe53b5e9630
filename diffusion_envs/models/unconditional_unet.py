"""Unconditional UNets in pixel space as policies (DDPM; google/ddpm-cifar10-32 for one).

A state is a picture with values in [-1, 1], noised; there is no prompt and no decoder. All weights
train, or a LoRA adapter; what is exported is a whole pipeline in diffusers' layout either way,
since diffusers does not load LoRA files into these networks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ctrl.devices import as_like
from ctrl.noise import stream
from diffusion_envs.denoising import score_from_epsilon, score_from_v, score_from_x0
from diffusion_envs.models import adapters, exports, folders
from diffusion_envs.models.counting import META, arithmetic
from diffusion_envs.models.noise_table import trained_levels
from diffusion_envs.models.protocol import FROZEN
from diffusion_envs.models.trainable import Trainable
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.training import memory

EXPORTED = exports.PIPELINE  # the folder that an export makes
SUPPORTED = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
_TO_SCORE = {
    "epsilon": score_from_epsilon,
    "sample": score_from_x0,
    "v_prediction": score_from_v,
}


@dataclass
class UnconditionalUNet:
    """An unconditional UNet with what trains on it (``protocol.Model``).

    Attributes:
        network: a diffusers UNet2DModel.
        scheduler: of its folder; exported with it.
        table: noise levels by timestep.
        prediction_type: "epsilon", "sample" or "v_prediction", as in diffusers.
        event: shape of a picture, [channels, height, width].
        parameters: those that train, float32.
        adapter: makes it the pretrained network, and says which network is asked.
        batch: most rows that one call of the network gets when no gradient is asked for.
        precision: dtype of the network's arithmetic; scores come back in float32.
        device: of the network.
        calls: evaluations of the network so far, one a row.
    """

    network: Any
    scheduler: Any
    table: DDPMTable
    prediction_type: str
    event: tuple[int, ...]
    parameters: list[nn.Parameter]
    adapter: adapters.AdapterSwitch
    batch: int = 64
    precision: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calls: int = 0

    def __post_init__(self) -> None:
        if self.prediction_type not in _TO_SCORE:
            raise ValueError(
                f"prediction_type must be one of {sorted(_TO_SCORE)}, got {self.prediction_type!r}"
            )

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        lora_rank: int | None = None,
        lora_targets: Sequence[str] = adapters.ATTENTION,
        precision: str = "float32",
        batch: int = 64,
        gradient_checkpointing: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> "UnconditionalUNet":
        """Load a DDPM pipeline, all of whose weights train, or a fresh LoRA adapter.

        The scheduler in the folder brings the noise levels. Most of these schedulers clip predicted
        pictures to [-1, 1] at every step (``clip_sample``), with which a transition is not
        Gaussian: our samplers do not clip, so pictures differ from those of the plain pipeline as
        much as with ``"clip_sample": false``.

        Args:
            model: a folder in the layout of diffusers' DDPMPipeline (unet, scheduler), or a hub id.
            lora_rank: of the adapter; all weights train if left out, and a frozen copy of the
                pretrained ones is held as well.
            lora_targets: names of the layers that get an adapter, or how they end.
            precision: of the arithmetic: "float32", "bfloat16", or on CUDA "float16"; the weights
                are float32.
            batch: most rows that one call of the network gets when no gradient is asked for.
            gradient_checkpointing: recompute activations: less memory, more time.
            device: where the network goes.
            seed: of the adapter's initial weights.

        Raises:
            ValueError: an argument is out of range, or the model is of a kind that is not
                supported.
            FileNotFoundError: the model is not there, or its folder lacks parts.
        """
        device = torch.device(device)
        dtype = adapters.precision_of(precision, device)
        trainable = (
            Trainable(weights="all")
            if lora_rank is None
            else Trainable(rank=lora_rank, targets=lora_targets)
        )
        pipe = _load_pipeline(model, device)
        network = pipe.unet.requires_grad_(False).eval().to(device)
        attached = trainable.attach(network, seed=seed)
        side = network.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        made = cls(
            network=network,
            scheduler=pipe.scheduler,
            table=trained_levels(pipe.scheduler),
            prediction_type=pipe.scheduler.config.get("prediction_type", "epsilon"),
            event=(network.config.in_channels, height, width),
            parameters=attached.parameters,
            adapter=attached.switch,
            batch=batch,
            precision=dtype,
            device=device,
        )
        if gradient_checkpointing:
            made.recompute_activations()
        return made

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All that holds weights, by what it is."""
        frozen = self.adapter.pretrained
        return {"unet": self.network} | ({} if frozen is None else {FROZEN: frozen})

    def condition(self, prompts: Sequence[str]) -> Float[Tensor, "prompts 1"]:
        """Nothing: prompts only name rows, for rewards that read them."""
        return torch.zeros(len(prompts), 1, device=self.device)

    def features(self, condition: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
        """Zeros, one number a row."""
        return condition

    def __call__(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Int64[Tensor, " rows"] | Float[Tensor, " rows"],
        condition: Any,
    ) -> Float[Tensor, " rows *event"]:
        """Scores of noisy pictures, float32; timesteps may be fractional."""
        return self._in_chunks(self._score, states, timesteps)

    def prediction(
        self, states: Float[Tensor, " rows *event"], timesteps: Tensor, condition: Any
    ) -> Float[Tensor, " rows *event"]:
        """The network's own prediction; timesteps may be fractional."""
        return self._in_chunks(self._prediction, states, timesteps)

    def _in_chunks(
        self, ask: Callable[[Tensor, Tensor], Tensor], states: Tensor, timesteps: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled():
            return ask(states, timesteps)
        spent = self.calls

        def attempt() -> Tensor:
            self.calls = spent
            if len(states) <= self.batch:
                return ask(states, timesteps)
            parts = zip(states.split(self.batch), timesteps.split(self.batch), strict=True)
            return torch.cat([ask(*part) for part in parts])

        return memory.retried(attempt, self, "the network without a gradient", rows=len(states))

    def _prediction(self, states: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += len(states)
        return self._predict(self.adapter.asked(self.network), states, timesteps)

    def decode(self, states: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Pictures in [0, 1] of states in [-1, 1]; differentiable."""
        return (states.float() / 2 + 0.5).clamp(0, 1)

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the model is the pretrained one."""
        return self.adapter.off()

    def recompute_activations(self) -> None:
        """Keep no activations for the gradient but compute them again: less memory, more time."""
        adapters.recompute_activations(self.network, self.adapter)

    def export(self, folder: Path) -> Path:
        """Write ``folder/pipeline`` for ``DDPMPipeline.from_pretrained``, and load it back.

        Returns:
            The folder of the pipeline, with the weights merged where a LoRA adapter was trained.

        Raises:
            ExportError: what diffusers loads is not what was trained.
        """
        return self.export_merged(folder / EXPORTED)

    def export_merged(self, folder: Path) -> Path:
        """Write the pipeline into a folder of another name; as ``export``.

        Raises:
            ExportError: what diffusers loads is not what was trained.
        """
        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

        twin = exports.merged_twin(self.network)
        pipe = DDPMPipeline(unet=twin, scheduler=self.scheduler)
        return exports.export_pipeline(pipe, twin, folder, self._probe, self.network)

    def _probe(self, network: nn.Module) -> Tensor:
        """Predictions of a network like this one, at two random states."""
        states = torch.randn(2, *self.event, generator=stream(0, "probe")).to(self.device)
        middle = len(self.table.alphas_cumprod) // 2
        return self._predict(network, states, torch.tensor([1, middle], device=self.device))

    def _score(self, states: Tensor, timesteps: Tensor) -> Tensor:
        predicted = self.prediction(states, timesteps, None)
        log_alpha_bar = self._log_alpha_bar(timesteps).view(-1, *[1] * (states.ndim - 1))
        alpha = as_like((0.5 * log_alpha_bar).exp(), states)
        sigma = as_like((-torch.expm1(log_alpha_bar)).sqrt(), states)
        return _TO_SCORE[self.prediction_type](states, predicted, alpha, sigma)

    def _log_alpha_bar(self, timesteps: Tensor) -> Tensor:
        """float64; a sampler's timesteps are the inverse of the same function."""
        if timesteps.is_floating_point():
            return self.table.log_alpha_bar_at(timesteps.double())
        return self.table.alphas_cumprod.log().to(timesteps.device)[timesteps]

    def _predict(self, network: Any, states: Tensor, timesteps: Tensor) -> Tensor:
        with arithmetic(states.device, self.precision):
            return network(states, timesteps).sample.float()


def _load_pipeline(model: str | Path, device: torch.device) -> Any:
    """The pipeline of a folder or hub id, in float32; without weights for the meta device.

    Raises:
        ValueError: the network needs more than a noisy picture and a timestep, or predicts more
            than one picture.
        FileNotFoundError: the model is not there.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    folder = folders.local_folder(model, DDPMPipeline, SUPPORTED, {})
    inside = [part for part in ("unet", "scheduler") if (folder / part).is_dir()]
    if inside or not (folder / "config.json").is_file():  # older models lie in the folder itself
        folders.require_parts(folder, ("unet", "scheduler"))
    weights = "unet" if inside else "."
    folders.read_settings(folder / weights / "config.json")
    if device == META:
        pipe = _without_weights(folder, inside)
    else:
        pipe = DDPMPipeline.from_pretrained(
            folder,
            dtype=torch.float32,
            variant=folders.variant_of(folder, (weights,)),
            use_safetensors=True,
            local_files_only=True,
        )
    supported = (
        "supported are UNet2DModels that predict one picture from a noisy one and a timestep"
    )
    if not isinstance(pipe.unet, UNet2DModel):
        raise ValueError(f"model {model} has a {type(pipe.unet).__name__} as unet; {supported}")
    config: Any = pipe.unet.config
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"model {model} has {config.in_channels} input and {config.out_channels} output "
            f"channels (a learned variance?); {supported}"
        )
    for name in ("class_embed_type", "num_class_embeds"):
        if (value := config.get(name)) is not None:
            raise ValueError(f"model {model} has a UNet with {name} {value!r}; {supported}")
    if config.time_embedding_type == "fourier":
        raise ValueError(
            f"model {model} has time_embedding_type 'fourier', as score networks (NCSN++) have; "
            f"{supported}"
        )
    return pipe


def _without_weights(folder: Path, inside: Sequence[str]) -> Any:
    """The pipeline with a network that has shapes only."""
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    network, levels = (folder / "unet", folder / "scheduler") if inside else (folder, folder)
    settings = folders.read_settings(levels / "scheduler_config.json")
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    with META:
        unet: Any = UNet2DModel.from_config(folders.read_settings(network / "config.json"))
    return DDPMPipeline(unet=unet, scheduler=scheduler)
