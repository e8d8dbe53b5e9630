"""Text-to-image UNets as policies: the score is the action. Stable Diffusion 1.x, 2.x and XL.

A UNet predicts epsilon, x0 or v of a noised state; classifier-free guidance combines its
conditional and unconditional predictions; the result, as a score, is the mean of a policy. The
pretrained model is the same network with its adapter switched off, so no second copy is held.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ctrl.devices import as_like
from ctrl.noise import stream
from diffusion_envs.denoising import (
    score_from_epsilon,
    score_from_v,
    score_from_x0,
    tweedie_mean,
)
from diffusion_envs.models import adapters
from diffusion_envs.models.counting import arithmetic
from diffusion_envs.models.execution import Execution
from diffusion_envs.models.guidance_schedule import (
    GuidanceSchedule,
    require_guidance,
    require_something_trains,
)
from diffusion_envs.models.latent_decoder import decode
from diffusion_envs.models.noise_table import levels_and_prediction
from diffusion_envs.models.protocol import FROZEN, joined
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_family import require_lengths
from diffusion_envs.models.trainable import Reference, Trainable, Weights
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.training import memory
from diffusion_envs.training.sharded import Shards

_TO_SCORE = {
    "epsilon": score_from_epsilon,
    "sample": score_from_x0,
    "v_prediction": score_from_v,
}


@dataclass
class GuidedScore:
    """A text-conditional UNet, with classifier-free guidance, as a function from state to score.

    Attributes:
        unet: a diffusers UNet2DConditionModel with its adapter attached.
        table: noise levels by timestep.
        prediction_type: "epsilon", "sample" or "v_prediction", as in diffusers.
        guidance: scale, at least 1, which is none (and costs one network call instead of two):
            diffusers uses none below 1 either, so those scales are refused.
        unconditional: condition of the negative prompt, or of the empty one: a row.
        batch: most rows that one call of the network gets when no gradient is asked for.
        precision: dtype of the network's arithmetic; scores come back in float32.
        calls: evaluations of the network so far, one per row and guidance branch.
        scale_width: of the embedded guidance scale, for networks that were distilled with guidance
            and read its scale (latent consistency models); they are called once, without a second
            branch.
        schedule: what training adds to the scale, at each noise level; None if nothing.
        adapter: switches the network's adapter, and the schedule, off and on.
    """

    unet: Any
    table: DDPMTable
    prediction_type: str
    guidance: float
    unconditional: TextCondition
    batch: int = 64
    precision: torch.dtype = torch.float32
    calls: int = 0
    scale_width: int | None = None
    schedule: GuidanceSchedule | None = None
    adapter: adapters.AdapterSwitch = field(default_factory=adapters.AdapterSwitch)

    def __post_init__(self) -> None:
        require_guidance(self.guidance)
        if self.prediction_type not in _TO_SCORE:
            raise ValueError(
                f"prediction_type must be one of {sorted(_TO_SCORE)}, got {self.prediction_type!r}"
            )

    def __call__(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Int64[Tensor, " rows"] | Float[Tensor, " rows"],
        context: TextCondition,
    ) -> Float[Tensor, " rows *event"]:
        """Guided scores of noisy states, float32, on the states' device.

        Timesteps may be fractional.
        """
        return self._in_chunks(self._score, states, timesteps, context)

    def denoised(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        context: TextCondition,
    ) -> Float[Tensor, " rows *event"]:
        """Expected data of noisy states, guided, float32: finite where no signal is left.

        Of a network that predicts epsilon it is not.
        """
        return self._in_chunks(self._denoised, states, timesteps, context)

    def _in_chunks(
        self,
        ask: Callable[[Tensor, Tensor, TextCondition], Tensor],
        states: Tensor,
        timesteps: Tensor,
        context: TextCondition,
    ) -> Tensor:
        if torch.is_grad_enabled():
            return ask(states, timesteps, context)
        spent = self.calls

        def attempt() -> Tensor:
            self.calls = spent
            if len(states) <= self.batch:
                return ask(states, timesteps, context)
            chunks = [slice(k, k + self.batch) for k in range(0, len(states), self.batch)]
            return torch.cat([ask(states[c], timesteps[c], context[c]) for c in chunks])

        return memory.retried(attempt, self, "the network without a gradient", rows=len(states))

    def prediction(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        context: TextCondition,
    ) -> Float[Tensor, " rows *event"]:
        """The network's own prediction, guided; timesteps may be fractional."""
        return self._in_chunks(self._prediction, states, timesteps, context)

    def _prediction(self, states: Tensor, timesteps: Tensor, context: TextCondition) -> Tensor:
        schedule = None if self.adapter.is_off else self.schedule
        unguided = self.guidance == 1 and schedule is None
        if unguided or self.scale_width is not None:
            return self._predict(states, timesteps, context)
        scale: Tensor | float = self.guidance
        if schedule is not None:
            scale = (scale + schedule(timesteps)).view(-1, *[1] * (states.ndim - 1))
        empty = self.unconditional.like(context.tokens).expanded(len(context))
        both = self._predict(
            torch.cat([states, states]),
            torch.cat([timesteps, timesteps]),
            joined([empty, context]),
        )
        without, with_prompt = both.split(len(states))
        return without + scale * (with_prompt - without)

    def _score(self, states: Tensor, timesteps: Tensor, context: TextCondition) -> Tensor:
        predicted = self.prediction(states, timesteps, context)
        alpha_bar = self._alpha_bar(states, timesteps)
        to_score = _TO_SCORE[self.prediction_type]
        return to_score(states, predicted, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def _denoised(self, states: Tensor, timesteps: Tensor, context: TextCondition) -> Tensor:
        predicted = self.prediction(states, timesteps, context)
        if self.prediction_type == "sample":
            return predicted
        alpha_bar = self._alpha_bar(states, timesteps)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "v_prediction":  # finite where alpha is 0
            return alpha * states - sigma * predicted
        return tweedie_mean(
            states, score_from_epsilon(states, predicted, alpha, sigma), alpha, sigma
        )

    def _alpha_bar(self, states: Tensor, timesteps: Tensor) -> Tensor:
        """alpha^2 of each row, as wide as the states."""
        if timesteps.is_floating_point():
            levels = as_like(self.table.log_alpha_bar_at(timesteps.double().cpu()).exp(), states)
        else:
            levels = as_like(self.table.alphas_cumprod, states)[timesteps]
        return levels.view(-1, *[1] * (states.ndim - 1))

    def _predict(self, states: Tensor, timesteps: Tensor, context: TextCondition) -> Tensor:
        self.calls += len(states)
        more = dict[str, Any]()
        if self.scale_width is not None:
            embedded = guidance_embedding(self.guidance, self.scale_width)
            more["timestep_cond"] = as_like(embedded, states).expand(len(states), -1)
        if context.pooled is not None:
            more["added_cond_kwargs"] = {
                "text_embeds": context.pooled,
                "time_ids": context.time_ids,
            }
        with arithmetic(states.device, self.precision):
            network = self.adapter.asked(self.unet)
            predicted = network(states, timesteps, encoder_hidden_states=context.tokens, **more)
        return predicted.sample.float()

    def with_guidance(self, guidance: float) -> "GuidedScore":
        """The same network and adapter at another guidance, with its own count of calls.

        Raises:
            ValueError: the scale is not finite, or below 1.
        """
        return replace(self, guidance=guidance, calls=0)

    def recompute_activations(self) -> None:
        """Keep no activations for the gradient but compute them again: less memory, more time."""
        adapters.recompute_activations(self.unet, self.adapter)

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off: the score is the pretrained model's."""
        return self.adapter.off()


def guidance_embedding(guidance: float, width: int) -> Float[Tensor, " width"]:
    """Sines and cosines of the scale, as networks distilled with guidance read it.

    As diffusers' ``get_guidance_scale_embedding(guidance - 1)`` computes it (Meng et al. 2023,
    arXiv 2210.03142): float32, of 1000 (guidance - 1).
    """
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance - 1) * rates
    return torch.cat([angles.sin(), angles.cos(), angles.new_zeros(width % 2)])


@dataclass
class TextToImageUNet:
    """A text-to-image UNet with its adapter, as the loop knows a model (``protocol.Model``).

    Attributes:
        score: the guided network.
        event: shape of a latent.
        table: noise levels by timestep.
        encode: prompts to what the network is conditioned on, a row each.
        decode: latents to pictures in [0, 1]; differentiable.
        parameters: of the adapter, float32.
        device: of the network.
        write: writes the adapter into a folder, for plain diffusers.
        merge: writes the pipeline with what was trained in its weights into a folder.
        pipe: what was loaded; None where the network did not come from a pipeline.
        check: raises ValueError if one of the prompts cannot be encoded.
        shards: what of the networks is sharded among processes.
    """

    score: GuidedScore
    event: tuple[int, ...]
    table: DDPMTable
    encode: Callable[[Sequence[str]], TextCondition]
    decode: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    write: Callable[[Path], Path] | None = None
    merge: Callable[[Path], Path] | None = None
    pipe: Any = None
    check: Callable[[Sequence[str]], None] | None = None
    shards: Shards = field(default_factory=Shards)

    @classmethod
    def load(
        cls,
        model: str | Path = "tiny",
        *,
        config: str | Path | None = None,
        guidance: float = 3.0,
        negative_prompt: str | None = None,
        variant: str | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        lora_rank_stabilised: bool = False,
        lora: str | Path | None = None,
        trains: Weights = "lora",
        reference: Reference = "copy",
        sharded: bool = False,
        guidance_knots: int = 0,
        precision: str = "float32",
        resolution: int | tuple[int, int] | None = None,
        batch: int = 64,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        decode_slices: bool = False,
        decode_tiles: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> "TextToImageUNet":
        """Load a Stable Diffusion pipeline (1.x, 2.x, XL) with what trains on it (``Trainable``).

        The noise levels are those of the scheduler in the folder, whatever its class
        (``noise_table``). What can be refused is, before any weights are read.

        Args:
            model: "tiny", "words", a folder in diffusers' layout, a single ``.safetensors`` file,
                or a hub id.
            config: folder in diffusers' layout with the settings of a single file; what diffusers
                has for its kind, from the hub, if left out.
            guidance: classifier-free guidance scale, at least 1, which is none. Networks that read
                the scale (latent consistency models) are told it instead.
            negative_prompt: what guidance leads away from; the empty prompt if left out. As in
                diffusers it has no effect at guidance 1.
            variant: of the weights, such as "fp16"; those that are there if left out.
            lora_rank: of the adapter; 8 if left out; 0 for none, where the guidance scale trains
                alone.
            lora_alpha: the adapter's update is scaled by alpha / rank; the rank if left out.
            lora_targets: names of the layers that get one, or how they end; those of attention if
                left out.
            lora_rank_stabilised: scale by alpha / sqrt(rank) instead.
            lora: folder or file of an existing LoRA, with which the adapter starts.
            trains: "lora", or "all" for all weights of the UNet.
            reference: where the frozen pretrained UNet is if all weights train: "copy" or
                "offloaded".
            sharded: divide the UNet, where all its weights train, and its frozen copy among the
                processes.
            guidance_knots: timesteps between which the guidance scale trains
                (``guidance_schedule``); 0: it does not.
            precision: of the network: "float32", "bfloat16", or on CUDA "float16".
            resolution: pixels a side, or height and width; the model's own if left out.
            batch: most rows that one call of the network gets when no gradient is asked for, and
                latents that are decoded at once.
            gradient_checkpointing: recompute activations: less memory, more time.
            compile: compile the UNet with torch.compile: minutes at first, faster calls then.
            channels_last: keep weights of convolutions with the channels last.
            decode_slices: decode one picture at a time: less memory.
            decode_tiles: decode pictures that are larger than the autoencoder's own in tiles: less
                memory, other pictures.
            device: where the networks go.
            seed: of the adapter's initial weights.

        Raises:
            ValueError: an argument is out of range, or does not fit the model; or the model is of a
                kind that is not supported.
            FileNotFoundError: the model is not there, or its folder lacks parts.
        """
        from diffusion_envs.models import text_to_image_pipeline

        require_guidance(guidance)
        trainable = Trainable(
            rank=lora_rank,
            alpha=lora_alpha,
            targets=lora_targets,
            rank_stabilised=lora_rank_stabilised,
            start=lora,
            weights=trains,
            reference=reference,
            sharded=sharded,
        )
        require_something_trains(not trainable.nothing, guidance_knots, sharded)
        trainable.require_start()
        execution = Execution(compile, channels_last, decode_slices, decode_tiles)
        execution.require_fit(reference, sharded)
        device = torch.device(device)
        dtype = adapters.precision_of(precision, device)
        files = text_to_image_pipeline.find(model, config=config, variant=variant)
        family, sides = files.family, files.latent_sides(resolution)
        event, picture = (files.latent_channels, *sides), files.picture(sides)
        table, predicts = levels_and_prediction(str(model), files.scheduler())
        pipe = files.load(dtype, device, network=torch.float32 if trains == "all" else dtype)
        unet = pipe.unet
        execution.arrange(pipe)
        attached = trainable.attach(unet, seed=seed)
        parameters = [*attached.parameters]

        def require(prompts: Sequence[str]) -> None:
            require_lengths(pipe, family.tokenizers(pipe), prompts)

        def encode(prompts: Sequence[str]) -> TextCondition:
            require(prompts)
            return family.encode(pipe, prompts, picture)

        require([negative_prompt or ""])
        width = unet.config.time_cond_proj_dim
        schedule = None
        if guidance_knots:
            if width is not None:
                raise ValueError(
                    "guidance_knots must be 0 for a network that reads the guidance scale, got "
                    f"{guidance_knots}"
                )
            schedule = GuidanceSchedule(len(table.alphas_cumprod), guidance_knots).to(device)
            parameters += schedule.parameters()
        score = GuidedScore(
            unet=unet,
            table=table,
            prediction_type=predicts,
            guidance=guidance,
            unconditional=family.unconditional(pipe, negative_prompt, picture),
            batch=batch,
            precision=dtype,
            scale_width=width,
            schedule=schedule,
            adapter=attached.switch,
        )
        if gradient_checkpointing:
            score.recompute_activations()
        execution.compiled(unet, attached.switch)

        def probe(network: nn.Module) -> Tensor:
            """Predictions of a network with this one's guidance, at two random states."""
            noise = stream(0, "probe")
            states = torch.randn(2, *event, generator=noise).to(device)
            words = encode(["one", "two"])
            timesteps = torch.tensor([1, len(table.alphas_cumprod) // 2], device=device)
            return replace(score, unet=network).prediction(states, timesteps, words)

        def write(folder: Path) -> Path:
            written = None if schedule is None else schedule.write(folder, guidance)
            if attached.parameters:
                return attached.write(folder, probe, pipe)
            assert written is not None  # something trains
            return written

        return cls(
            score=score,
            event=event,
            table=table,
            encode=encode,
            decode=partial(decode, pipe.vae, batch=batch),
            parameters=parameters,
            device=device,
            write=write,
            merge=lambda folder: attached.merge(folder, probe, pipe),
            pipe=pipe,
            check=require,
            shards=attached.shards,
        )

    def with_guidance(self, guidance: float) -> "TextToImageUNet":
        """The same network, adapter and switch at another guidance, with its own count of calls.

        What trains, trains here too; what is exported is the same.

        Raises:
            ValueError: the scale is not finite, or below 1.
        """
        return replace(self, score=self.score.with_guidance(guidance))

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All that holds weights, by what it is."""
        unet, frozen = self.score.unet, self.score.adapter.pretrained
        parts = {} if self.pipe is None else self.pipe.components
        others = {
            name: part
            for name, part in parts.items()
            if isinstance(part, nn.Module) and part is not unet
        }
        copied = {} if frozen is None else {FROZEN: frozen}
        return {"unet": unet, **copied, **others}

    @property
    def calls(self) -> int:
        """Evaluations of the network so far, one per row and guidance branch."""
        return self.score.calls

    @calls.setter
    def calls(self, count: int) -> None:
        self.score.calls = count

    @property
    def batch(self) -> int:
        """Most rows that one call of the network gets when no gradient is asked for."""
        return self.score.batch

    @batch.setter
    def batch(self, rows: int) -> None:
        self.score.batch = rows

    @property
    def precision(self) -> torch.dtype:
        """Dtype of the network's arithmetic."""
        return self.score.precision

    @property
    def prediction_type(self) -> str:
        """What the network itself predicts, in diffusers' words."""
        return self.score.prediction_type

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that cannot be encoded, before any of them is.

        Raises:
            ValueError: a prompt is longer than a text encoder reads; it is named.
        """
        if self.check is not None:
            self.check(prompts)

    def condition(self, prompts: Sequence[str]) -> TextCondition:
        """What the network is conditioned on for each of the prompts.

        Raises:
            ValueError: a prompt is longer than a text encoder reads; it is named.
        """
        return self.encode(prompts)

    def features(self, condition: TextCondition) -> Float[Tensor, "rows width"]:
        """The mean embedding of a prompt's tokens."""
        return condition.tokens.mean(1)

    def __call__(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Int64[Tensor, " rows"] | Float[Tensor, " rows"],
        condition: TextCondition,
    ) -> Float[Tensor, " rows *event"]:
        """Guided scores of noisy latents, float32; timesteps may be fractional."""
        return self.score(states, timesteps, condition)

    def denoised(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        condition: TextCondition,
    ) -> Float[Tensor, " rows *event"]:
        """Expected latents of noisy ones, guided, float32: for samplers that start as noise."""
        return self.score.denoised(states, timesteps, condition)

    def prediction(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        condition: TextCondition,
    ) -> Float[Tensor, " rows *event"]:
        """The network's own prediction, guided."""
        return self.score.prediction(states, timesteps, condition)

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off."""
        return self.score.pretrained()

    def export(self, folder: Path) -> Path:
        """Write the adapter for ``pipe.load_lora_weights``; plain diffusers has read it back.

        Raises:
            ExportError: what diffusers loads is not the trained adapter.
            ValueError: this model has nothing to write its adapter with.
        """
        if self.write is None:
            raise ValueError("write must be set to export the adapter")
        return self.write(folder)

    def export_merged(self, folder: Path) -> Path:
        """Write the pipeline with what was trained in its weights; plain diffusers reads it first.

        Raises:
            ExportError: what diffusers loads is not what was trained.
            ValueError: nothing of the network was trained, or it came from no pipeline.
        """
        if self.merge is None:
            raise ValueError("merge must be set to export a whole model")
        return self.merge(folder)
