"""What the loop asks of a model family: scores, a frozen pretrained self, pictures, an export."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion_envs.noise_schedules import DDPMTable, FlowTable

Condition: TypeAlias = Any
"""What a model is conditioned on, a row each: a tensor, or a dataclass of tensors (or of None).

It is opaque to all but its model; ``condition[rows]`` picks rows of it, ``joined`` appends them.
"""


def joined(conditions: Sequence[Condition]) -> Condition:
    """The rows of conditions of one model, one after another.

    Raises:
        TypeError: they are neither tensors nor dataclasses of tensors.
    """
    first = conditions[0]
    if len(conditions) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(conditions))
    if isinstance(first, type) or not dataclasses.is_dataclass(first):
        raise TypeError(
            "a model's condition must be a tensor or a dataclass of tensors, got "
            f"{type(first).__name__}"
        )
    parts = {
        f.name: joined([getattr(each, f.name) for each in conditions])
        for f in dataclasses.fields(first)
    }
    return type(first)(**parts)


@runtime_checkable
class Model(Protocol):
    """A diffusion model with an adapter that trains: a function from noisy states to scores.

    Attributes:
        event: shape of a state, without the batch.
        parameters: those that train, float32; the policy that a fresh adapter makes is the
            pretrained model.
    """

    event: tuple[int, ...]
    parameters: list[nn.Parameter]

    @property
    def prediction_type(self) -> str:
        """What the network itself predicts, in diffusers' words.

        It is "epsilon", "sample", "v_prediction" or "flow_prediction".
        """
        ...

    @property
    def calls(self) -> int:
        """Evaluations of the network so far, one a row and guidance branch; can be set."""
        ...

    @calls.setter
    def calls(self, count: int) -> None: ...

    @property
    def table(self) -> DDPMTable | FlowTable:
        """Noise levels by timestep."""
        ...

    @property
    def precision(self) -> torch.dtype:
        """Dtype of the network's arithmetic."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is, and where states must be."""
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """What the model is conditioned on for each of the prompts.

        Raises:
            ValueError: a prompt cannot be encoded; it is named.
        """
        ...

    def features(self, condition: Condition) -> Float[Tensor, "rows width"]:
        """The condition as one vector a row, for a value network."""
        ...

    def __call__(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Int64[Tensor, " rows"] | Float[Tensor, " rows"],
        condition: Condition,
    ) -> Float[Tensor, " rows *event"]:
        """Scores of noisy states, float32: the action of the policy, 1/state.

        Timesteps are floats where the sampler's nodes are none of the table's entries.
        """
        ...

    def prediction(
        self, states: Float[Tensor, " rows *event"], timesteps: Tensor, condition: Condition
    ) -> Float[Tensor, " rows *event"]:
        """What the network itself predicts, for schedulers of diffusers.

        Its kind is ``prediction_type``; timesteps may be fractional.
        """
        ...

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off: the model is the pretrained one."""
        ...

    def decode(self, states: Float[Tensor, " rows *event"], /) -> Float[Tensor, " rows *picture"]:
        """Pictures in [0, 1] of states without noise; differentiable."""
        ...

    def export(self, folder: Path) -> Path:
        """Write the adapter into a folder in the format that plain diffusers loads; its path."""
        ...


@runtime_checkable
class PromptReader(Model, Protocol):
    """A model that tells from a prompt's text alone whether it can be encoded."""

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that cannot be encoded, before any of them is.

        Raises:
            ValueError: a prompt cannot be encoded, for example as it is too long; it is named.
        """
        ...


@runtime_checkable
class Denoiser(Model, Protocol):
    """A model that also tells the expected data, finite where no signal is left (alpha = 0)."""

    def denoised(
        self,
        states: Float[Tensor, " rows *event"],
        timesteps: Tensor,
        condition: Condition,
    ) -> Float[Tensor, " rows *event"]:
        """x0_hat of noisy states, float32: the action of samplers that start without signal."""
        ...


FROZEN = "pretrained copy"  # name of a network that is held only to be compared with


@runtime_checkable
class WithNetworks(Model, Protocol):
    """A model that tells which networks it holds, so that their memory can be told."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All that holds weights, by what it is; ``FROZEN`` for a copy of what trains."""
        ...
