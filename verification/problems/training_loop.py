"""What must hold in a training loop, whatever is trained: on the loop that users run.

The network is the smallest one: a linear prediction of the noise with a low-rank adapter, so that
the loop's gradients can be written out by hand. Its weights, like all networks of the loop, are
float32, and so are tolerances: what is compared is off by 1e-7 when right, more where terms add up.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.models.adapters import AdapterSwitch
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_unet import GuidedScore, TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.claim import Setting

EVENT, STEPS, SAMPLES = (4, 2, 2), 4, 6
PROMPTS = ["one", "two", "three"]
TABLE = torch.linspace(0.97, 0.08, 20, dtype=torch.float64)
ETA, KL_WEIGHT = 0.45, 2.3


class Network(nn.Module):
    """Noise prediction W x + U context + V timestep, plus B A x where the adapter is on."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        dim = 16

        def drawn(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.base, self.context = drawn(dim, dim, scale=0.2), drawn(dim, 3, scale=0.4)
        self.time = drawn(dim, scale=0.03)
        self.a, self.b = drawn(2, dim, scale=0.3), drawn(dim, 2, scale=0.3)
        self.adapted = True

    def disable_adapters(self) -> None:
        """Switch the adapter off: the pretrained network."""
        self.adapted = False

    def enable_adapters(self) -> None:
        """Switch the adapter on again."""
        self.adapted = True

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        """Predict the noise, in the form of a diffusers UNet."""
        flat = x.flatten(1)
        predicted = flat @ self.base.T + encoder_hidden_states.mean(1) @ self.context.T
        predicted = predicted + timesteps[:, None] * self.time
        if self.adapted:
            predicted = predicted + flat @ self.a.T @ self.b.T
        return SimpleNamespace(sample=predicted.view_as(x))


class Process(Accelerator):
    """One of several processes that do not communicate."""

    def __init__(self, index: int = 0, processes: int = 1) -> None:
        self._index, self._processes = index, processes

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]  # as below
        """Where it computes."""
        return torch.device("cpu")

    @property
    def num_processes(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # accelerate types it as NoReturn
        """Number of processes that this one is told of."""
        return self._processes

    @property
    def process_index(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        """Which one this is."""
        return self._index

    def gather(self, tensor: Any) -> Any:
        """Nothing comes from elsewhere."""
        return tensor

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Nothing comes from elsewhere."""
        return tensor


def trainer(
    setting: Setting, batch: int = 64, process: Process | None = None, **schedule: Any
) -> Trainer:
    """The loop in the midst of a run: three updates are done, the adapter is no longer fresh."""
    generator = stream(setting.seed, "network")
    network = Network(generator)
    context = torch.randn(len(PROMPTS), 2, 3, generator=generator)
    score = GuidedScore(
        network,
        DDPMTable(TABLE),
        "epsilon",
        1.7,
        TextCondition(torch.randn(1, 2, 3, generator=generator)),
        adapter=AdapterSwitch(network.enable_adapters, network.disable_adapters),
    )
    model = TextToImageUNet(
        score=score,
        event=EVENT,
        table=DDPMTable(TABLE),
        encode=lambda asked: TextCondition(context[[PROMPTS.index(prompt) for prompt in asked]]),
        decode=lambda latents: latents[:, [0, 1, 0]].sigmoid(),
        parameters=[network.a, network.b],
    )
    environment = Environment(
        model=model,
        sampler=DDIM(eta=ETA).bind(DDPMTable(TABLE), STEPS),
        reward=lambda images, prompts: 3 * images.mean((1, 2, 3)) + images[:, 1, 0, 1],
        prompts=PROMPTS,
        seed=41,
    )
    made = Trainer(
        environment,
        ScoreAsAction(kl_weight=KL_WEIGHT, learning_rate=1e-3),
        UpdateSize(samples=SAMPLES, batch=batch, max_gradient_norm=1e9, value_epochs=1, **schedule),
        accelerator=process or Process(),
    )
    made.update = 3
    return made


def network_of(made: Trainer) -> Network:
    """Its network."""
    model = made.environment.model
    assert isinstance(model, TextToImageUNet)
    network = model.score.unet
    assert isinstance(network, Network)
    return network


def flat(values: Tensor, keep: int = 2) -> np.ndarray:
    """Convert to numpy, in double precision, events flattened."""
    return values.detach().double().flatten(keep).numpy()
