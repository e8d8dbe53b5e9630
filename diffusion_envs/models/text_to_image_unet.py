"""Noise-predicting networks as policies: the score is the action.

A UNet predicts epsilon, x0 or v of a noised state; classifier-free guidance combines its
conditional and unconditional predictions; the result, as a score, is the mean of a policy. The
pretrained model is the same network with its adapter switched off, so no second copy is held.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrl.devices import as_like
from diffusion_envs.denoising import score_from_epsilon, score_from_v, score_from_x0
from diffusion_envs.noise_schedules import DDPMTable

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
        alphas_cumprod: of the model's schedule, one entry a timestep.
        prediction_type: "epsilon", "sample" or "v_prediction", as in diffusers.
        guidance: scale; 1 is none (and costs one network call instead of two).
        unconditional: embedding of the empty prompt, [tokens, width].
        batch: most rows that one call of the network gets when no gradient is asked for.
        precision: dtype of the network's arithmetic; scores come back in float32.
        calls: evaluations of the network so far, one per row and guidance branch.
    """

    unet: nn.Module
    alphas_cumprod: Float[Tensor, " timesteps"]
    prediction_type: str
    guidance: float
    unconditional: Float[Tensor, "tokens width"]
    batch: int = 64
    precision: torch.dtype = torch.float32
    calls: int = 0
    _adapter_off: bool = False

    def __post_init__(self) -> None:
        if self.prediction_type not in _TO_SCORE:
            raise ValueError(
                f"prediction_type must be one of {sorted(_TO_SCORE)}, got {self.prediction_type!r}"
            )

    def __call__(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Int64[Tensor, " rows"],
        context: Float[Tensor, "rows tokens width"],
    ) -> Float[Tensor, " rows *event"]:
        """Guided scores of noisy states, float32, on the states' device."""
        if torch.is_grad_enabled() or len(states) <= self.batch:
            return self._score(states, timesteps, context)
        chunks = (part.split(self.batch) for part in (states, timesteps, context))
        return torch.cat([self._score(*chunk) for chunk in zip(*chunks, strict=True)])

    def prediction(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        context: Float[Tensor, "rows tokens width"],
    ) -> Float[Tensor, " rows *event"]:
        """The network's own prediction, guided; timesteps may be fractional."""
        if self.guidance == 1:
            return self._predict(states, timesteps, context)
        empty = as_like(self.unconditional, context).expand_as(context)
        both = self._predict(
            torch.cat([states, states]),
            torch.cat([timesteps, timesteps]),
            torch.cat([empty, context]),
        )
        without, with_prompt = both.split(len(states))
        return without + self.guidance * (with_prompt - without)

    def _score(self, states: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        predicted = self.prediction(states, timesteps, context)
        alpha_bar = as_like(self.alphas_cumprod, states)[timesteps].view(
            -1, *[1] * (states.ndim - 1)
        )
        to_score = _TO_SCORE[self.prediction_type]
        return to_score(states, predicted, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def _predict(self, states: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        self.calls += len(states)
        reduced = self.precision != torch.float32
        with torch.autocast(states.device.type, self.precision, enabled=reduced):
            return self.unet(states, timesteps, encoder_hidden_states=context).sample.float()

    def recompute_activations(self) -> None:
        """Keep no activations for the gradient but compute them again: less memory, more time.

        A block is computed again with the adapter as it was. Under diffusers' own
        ``enable_gradient_checkpointing()`` the adapter is as it happens to be when the gradient
        comes by, so that torch refuses gradients that pass through the pretrained model.
        """

        def call(block: nn.Module, *inputs: Any) -> Any:
            off = self._adapter_off

            def as_now(*inputs: Any) -> Any:
                with self._switched(off):
                    return block(*inputs)

            return checkpoint(as_now, *inputs, use_reentrant=False)

        self.unet.enable_gradient_checkpointing(call)

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off: the score is the pretrained model's."""
        return self._switched(off=True)

    @contextmanager
    def _switched(self, off: bool) -> Iterator[None]:
        before = self._adapter_off
        self._switch(off)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, off: bool) -> None:
        if off == self._adapter_off:
            return
        if off:
            self.unet.disable_adapters()
        else:
            self.unet.enable_adapters()
        self._adapter_off = off


@dataclass
class TextToImageUNet:
    """A text-to-image UNet with its adapter, as the loop knows a model (``protocol.Model``).

    Attributes:
        score: the guided network.
        event: shape of a latent.
        table: noise levels by timestep.
        encode: prompts to their embeddings, [prompts, tokens, width].
        decode: latents to pictures in [0, 1]; differentiable.
        parameters: of the adapter, float32.
        device: of the network.
        write: writes the adapter into a folder, for plain diffusers.
    """

    score: GuidedScore
    event: tuple[int, ...]
    table: DDPMTable
    encode: Callable[[Sequence[str]], Tensor]
    decode: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    write: Callable[[Path], Path] | None = None

    @property
    def calls(self) -> int:
        """Evaluations of the network so far, one per row and guidance branch."""
        return self.score.calls

    @calls.setter
    def calls(self, count: int) -> None:
        self.score.calls = count

    @property
    def precision(self) -> torch.dtype:
        """Dtype of the network's arithmetic."""
        return self.score.precision

    @property
    def prediction_type(self) -> str:
        """What the network itself predicts, in diffusers' words."""
        return self.score.prediction_type

    def condition(self, prompts: Sequence[str]) -> Float[Tensor, "prompts tokens width"]:
        """Embeddings of the prompts."""
        return self.encode(prompts)

    def features(
        self, condition: Float[Tensor, "rows tokens width"]
    ) -> Float[Tensor, "rows width"]:
        """The mean embedding of a prompt's tokens."""
        return condition.mean(1)

    def __call__(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Int64[Tensor, " rows"],
        condition: Float[Tensor, "rows tokens width"],
    ) -> Float[Tensor, " rows *event"]:
        """Guided scores of noisy latents, float32."""
        return self.score(states, timesteps, condition)

    def prediction(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        condition: Float[Tensor, "rows tokens width"],
    ) -> Float[Tensor, " rows *event"]:
        """The network's own prediction, guided."""
        return self.score.prediction(states, timesteps, condition)

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off."""
        return self.score.pretrained()

    def export(self, folder: Path) -> Path:
        """Write the adapter for ``pipe.load_lora_weights``.

        Raises:
            ValueError: this model has nothing to write its adapter with.
        """
        if self.write is None:
            raise ValueError("write must be set to export the adapter")
        return self.write(folder)
