"""How a run is watched, stored and stopped: one class for Python and the command line."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffusion_envs import rewards
from diffusion_envs.preferences import Preference, Recorded
from diffusion_envs.prompt import Prompt
from diffusion_envs.rewards.registry import require_reward
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.perceptual import STLPIPS
from diffusion_envs.runs.prompts import read_prompts, split
from diffusion_envs.training.energy import TrainingData
from diffusion_envs.training.kl_controller import TargetKL


@dataclass(frozen=True)
class RunOptions:
    """How a run is watched, stored and stopped.

    Attributes:
        evaluation_samples: held-out samples, before and after, paired by seed.
        evaluation_prompts: what held-out samples are asked for (on the command line words or a
            file, as for prompts); what training asks for if left out. With prompts that training
            never sees, the gain is that on other prompts.
        held_out: prompts that are split off by the run's seed for held-out samples, and that
            training never sees: how many, or their share of all (0.1); none if 0.
        evaluation_guidance: classifier-free guidance scale of held-out samples; training's if left
            out.
        frontier_samples: further samples of the pretrained model, over all prompts, from which the
            most reward that a policy can have at each KL is estimated once the run is done; the
            pretrained model's held-out samples count too, and may be enough. A finished run may be
            resumed with more.
        checkpoint_every: updates between checkpoints; a run that is told to end writes one, too.
        picture_every: updates between pictures and over-optimisation metrics.
        judges: rewards that only judge, by name; the reward itself is refused.
        distance: a further distance of pictures for the over-optimisation metrics, beside pixels
            and the features of judges: stlpips, a perceptual one (pip install --no-deps
            stlpips_pytorch).
        target_kl: path KL to keep, nats: kl_weight, which is then only where it begins, moves after
            every update.
        stop: when to end the run early; then the best model that was evaluated is exported.
        preference: who prefers which sample, for objectives that learn from preferences (d3po,
            dense-reward): the reward if left out, people's choices recorded in a file of JSON
            lines, {"order": [best, ..., worst]} each, or a function. A run that meets samples
            without a choice leaves their images and waits to be resumed.
        data: what samples should look like, for objectives that learn the reward from data (those
            named ...-from-data): on the command line a folder of CIFAR-10.
        log_path_kl: report the path KL of every update also where the method does not need it, at
            the price of a network call a step.
        reward_timeout: seconds that one call of the reward, or of a judge, may take before the run
            ends in good order and says which; None for any time.
        overlap: calls of the reward that may go on while the next pictures are sampled and the
            pretrained model is asked; the numbers are the same. 1 for any reward that leaves
            torch's settings alone: it is called in order, from one thread; more for one that
            declares concurrent = True, such as Remote and VLMJudge.
        wandb: log to Weights & Biases too; or the name of the project ("ctrl" if left out).
        wandb_name: of the run there; that of the run's folder if left out.
        process_timeout: seconds that several processes wait for each other; who waits in vain says
            which one is missing, and in which phase it was, and the run ends, to be resumed.
        progress: show a progress bar.
    """

    evaluation_samples: int = 64
    evaluation_prompts: tuple[str, ...] | None = None
    held_out: int | float = 0
    evaluation_guidance: float | None = None
    frontier_samples: int = 0
    checkpoint_every: int = 1
    picture_every: int = 10
    judges: Mapping[str, rewards.Reward] = field(default_factory=dict)
    distance: Literal["stlpips"] | None = None
    target_kl: TargetKL | None = None
    stop: tyro.conf.Suppress[StopRule | None] = None  # three options of the command line
    preference: Annotated[Preference | None, tyro.conf.arg(name="preferences")] = None
    data: TrainingData | None = None
    log_path_kl: bool = False
    reward_timeout: float | None = None
    overlap: int = 0
    wandb: bool | str = False
    wandb_name: str | None = None
    process_timeout: float = 1800.0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.evaluation_prompts is not None:
            read = read_prompts(self.evaluation_prompts, "evaluation_prompts")
            object.__setattr__(self, "evaluation_prompts", read)
        self._check_held_out()
        if not isinstance(self.judges, Mapping):
            raise TypeError(
                "judges must be rewards by name, such as "
                f"{{'sharp': rewards.JpegIncompressibility()}}, got {self.judges!r:.80}"
            )
        for name, judge in self.judges.items():
            require_reward(f"judge {name!r}", judge)
        least = {"evaluation_samples": 2, "checkpoint_every": 1, "picture_every": 1}
        least |= {"frontier_samples": 0, "overlap": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be an integer of at least {bound}, got {value!r}")
        rewards.require_seconds(self.reward_timeout)
        waits = self.process_timeout
        if not (isinstance(waits, int | float) and waits > 0 and math.isfinite(waits)):
            raise ValueError(f"process_timeout must be a positive number of seconds, got {waits!r}")
        if self.distance not in (None, STLPIPS):
            raise ValueError(f"distance must be {STLPIPS!r} or None, got {self.distance!r}")
        if self.distance in self.judges:
            raise ValueError(f"a judge must not have the name of the distance, {self.distance!r}")
        if isinstance(self.preference, Recorded):  # a resumed run may be in another directory
            path = Path(self.preference.path).expanduser().absolute()
            object.__setattr__(self, "preference", dataclasses.replace(self.preference, path=path))

    def _check_held_out(self) -> None:
        held_out, guidance = self.held_out, self.evaluation_guidance
        share = isinstance(held_out, float) and 0 < held_out < 1
        number = isinstance(held_out, int) and not isinstance(held_out, bool) and held_out >= 0
        if not (share or number):
            raise ValueError(
                "held_out must be a number of prompts, such as 20, or a share of them between 0 "
                f"and 1, such as 0.1, got {held_out!r}"
            )
        if held_out and self.evaluation_prompts is not None:
            raise ValueError(
                "held_out and evaluation_prompts both say which prompts held-out samples have: "
                "leave one of them out"
            )
        scale = isinstance(guidance, int | float) and guidance >= 0 and math.isfinite(guidance)
        if guidance is not None and not scale:
            raise ValueError(
                f"evaluation_guidance must be a finite number of at least 0, got {guidance!r}"
            )

    def prompts_of(
        self, prompts: Sequence[Prompt], seed: int
    ) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
        """Those to train on and those of held-out samples.

        Raises:
            ValueError: ``held_out`` leaves nothing on one side.
        """
        if self.held_out:
            training, held_out = split(len(prompts), self.held_out, seed)
            return tuple(prompts[k] for k in training), tuple(prompts[k] for k in held_out)
        training = tuple(prompts)
        if self.evaluation_prompts is None:
            return training, training
        return training, read_prompts(self.evaluation_prompts)
