"""CIFAR-10's unconditional networks as an environment: which model, and how it is fine-tuned."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from diffusion_envs import rewards, samplers
from diffusion_envs.models.adapters import ATTENTION, require_precision, require_rank
from diffusion_envs.models.folders import from_anywhere
from diffusion_envs.models.protocol import Model
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.ranges import require_numbers
from diffusion_envs.runs.finetune import Run, refuse_misplaced
from diffusion_envs.runs.finetune import finetune as _finetune
from diffusion_envs.runs.options import RunOptions

SMALL = "small"
LEARNING_RATE = 1e-5  # all weights train: that of adapters, 1e-3, destroys them in two updates
REWARD = rewards.ClassConfidence("reward")
JUDGE = rewards.ClassConfidence("judge")
PROMPTS = ("a picture",)  # asks for nothing: the networks do not read it


def small_folder() -> Path:
    """Where the embedded small network lies: a folder in diffusers' own layout."""
    return Path(str(resources.files("diffusion_envs.cifar10"))) / "weights" / "pipeline"


@dataclass(frozen=True)
class Cifar10Model:
    """Which unconditional pixel-space network, and how it is used.

    Attributes:
        model: "small", a folder in the layout of diffusers' DDPMPipeline, or a hub id such as
            google/ddpm-cifar10-32.
        lora_rank: of an adapter; all weights train if left out.
        lora_targets: names of the layers that get one.
        precision: of the network: float32, bfloat16 or (CUDA only) float16.
        gradient_checkpointing: recompute activations: less memory, more time.
        device: cpu or cuda; what there is if left out.
    """

    model: str | Path = SMALL
    lora_rank: int | None = None
    lora_targets: Sequence[str] = ATTENTION
    precision: str = "float32"
    gradient_checkpointing: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        require_numbers(self)
        require_precision(self.precision)
        if self.lora_rank is not None:
            require_rank(self.lora_rank)
        object.__setattr__(self, "model", from_anywhere(self.model, SMALL))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    @property
    def label(self) -> str:
        """Name for reports."""
        return str(self.model)

    def load(self, *, device: torch.device, batch: int, seed: int) -> Model:
        """The network, all of whose weights train, or a fresh adapter.

        Args:
            device: where the network goes; ``self.device`` is what was asked for.
            batch: most rows that one call of the network gets when no gradient is asked for.
            seed: of the adapter's initial weights.

        Raises:
            ValueError: an argument does not fit the model.
            FileNotFoundError: the model is not there.
        """
        from diffusion_envs.models.unconditional_unet import UnconditionalUNet  # diffusers is heavy

        model = self.model
        if model == SMALL:
            model = small_folder()
            if not (model / "model_index.json").is_file():
                raise FileNotFoundError(
                    f"model 'small' is not part of this installation ({model}); "
                    'pip install "ctrl-diffusion[models]" brings it; or train one by '
                    "python -m diffusion_envs.cifar10 pretrain --data DIR --output DIR and name "
                    "the folder of its pipeline, or use google/ddpm-cifar10-32"
                )
        return UnconditionalUNet.load(
            model,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            precision=self.precision,
            batch=batch,
            gradient_checkpointing=self.gradient_checkpointing,
            device=device,
            seed=seed,
        )


def finetune(model: str | Path | Cifar10Model = SMALL, **arguments: Any) -> Run:
    """``runs.finetune.finetune``, which documents ``arguments``, with an unconditional network.

    The objective is ``ScoreAsAction`` at ``LEARNING_RATE``, as all weights train, if left out; any
    other should have such a rate. The reward is ``ClassConfidence`` if left out, with that of the
    other classifier as its judge; prompts are one that asks for nothing; steps are those that the
    sampler is made for, if any.

    Args:
        model: "small", a folder in diffusers' layout, or a hub id; ``Cifar10Model`` for an adapter,
            another precision or device.
        arguments: reward, prompts, output, objective, sampler, steps, updates, size, options, seed,
            resume.

    Raises:
        TypeError: an argument belongs elsewhere, or is of another kind; the message says what to
            write.
    """
    refuse_misplaced(arguments, Cifar10Model, "cifar10.Cifar10Model(...)")
    named = model if isinstance(model, Cifar10Model) else Cifar10Model(model)
    usual = ScoreAsAction(learning_rate=LEARNING_RATE)
    defaults: dict[str, Any] = {"reward": REWARD, "prompts": PROMPTS, "objective": usual}
    if arguments.get("reward", REWARD) == REWARD:
        defaults["options"] = RunOptions(judges={"judge": JUDGE})
    if (sampler := arguments.get("sampler")) and (steps := samplers.usual_steps(sampler)):
        defaults["steps"] = steps
    return _finetune(named, **defaults | arguments)
