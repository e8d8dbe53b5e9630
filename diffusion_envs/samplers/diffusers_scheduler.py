"""Any diffusers scheduler as a black box: it makes data, and its steps have no density."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from diffusion_envs.noise_schedules import DDPMTable, FlowTable

_LEAST_SIGNAL = 2.0**-24  # alpha^2 that diffusers puts for 0, at which its sigmas are infinite


@dataclass(frozen=True, eq=False)
class BlackBox:
    """Any diffusers scheduler (DPM-Solver++, UniPC, Heun, ...), to evaluate with: no density."""

    scheduler: Any
    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if not callable(getattr(self.scheduler, "set_timesteps", None)):
            raise TypeError(
                f"scheduler must be a diffusers scheduler, got {type(self.scheduler).__name__}"
            )

    @property
    def has_density(self) -> bool:
        """False: intermediate states are not exposed."""
        return False

    @torch.no_grad()
    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        start: Float[Tensor, " paths *event"],
        generator: Generator | list[Generator] | None = None,
    ) -> Float[Tensor, " paths *event"]:
        """Samples, from standard normals.

        Args:
            predict: (scaled states, timestep []) -> the network's prediction, of the kind that the
                scheduler's ``prediction_type`` says. Some schedulers ask at fractional timesteps.
            start: standard normals.
            generator: for schedulers that draw noise, one or one a path.

        Raises:
            ValueError: the scheduler draws noise, and there is no generator.
        """
        scheduler = copy.deepcopy(self.scheduler)  # schedulers remember their steps
        scheduler.set_timesteps(self.steps, device=start.device)
        extra = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = generator
        if generator is None and _draws_noise(scheduler):
            raise ValueError(
                f"generator must be given: {type(scheduler).__name__} draws noise as it samples"
            )
        states = start * float(scheduler.init_noise_sigma)
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(states, timestep)
            states = scheduler.step(
                predict(scaled, timestep), timestep, states, **extra
            ).prev_sample
        return states


@dataclass(frozen=True)
class Scheduler:
    """A black box by the name of its class in diffusers, made from a model's own noise levels.

    Attributes:
        name: "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", ...
        options: settings of that class that differ from the model's scheduler's.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if "trained_betas" not in self._settings():
            raise ValueError(
                f"name must be a scheduler of diffusers that takes a table of betas "
                f"(DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler, "
                f"...), got {self.name!r}"
            )

    @property
    def has_density(self) -> bool:
        """False: a black box has no density."""
        return False

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        return self.name.removesuffix("Scheduler") + (f" ({options})" if options else "")

    def _settings(self) -> frozenset[str]:
        """Names of what the class can be told; none if there is no such class."""
        import diffusers

        kind = getattr(diffusers, self.name, None)
        return frozenset() if kind is None else frozenset(inspect.signature(kind).parameters)

    def bind(
        self, table: DDPMTable | FlowTable, steps: int, prediction_type: str = "epsilon"
    ) -> "BoundBlackBox":
        """This scheduler on a model's table, with so many steps.

        Args:
            table: of the model.
            steps: of the scheduler; some call the network more than once a step (Heun: 2 - 1/steps
                times).
            prediction_type: of the network, in diffusers' words.

        Raises:
            TypeError: the table is that of a flow.
            ValueError: the table has fewer entries than ``steps``.
        """
        import diffusers

        if isinstance(table, FlowTable):
            raise TypeError(
                f"Scheduler({self.name!r}) needs the noise levels of a variance-preserving model "
                "(DDPMTable), got FlowTable: use DDIM, FlowSDE or CPS on a flow"
            )
        levels = table.alphas_cumprod.clamp(min=_LEAST_SIGNAL)
        betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
        kind = getattr(diffusers, self.name)
        known = {"timestep_spacing": "trailing", "prediction_type": prediction_type}
        settings = {name: value for name, value in known.items() if name in self._settings()}
        scheduler = kind(
            num_train_timesteps=len(betas),
            trained_betas=betas.cpu().numpy(),
            **settings | dict(self.options),
        )
        return BoundBlackBox(scheduler, table, steps)


@dataclass(frozen=True, eq=False)
class BoundBlackBox:
    """A scheduler on a table of noise levels: it makes data, and shows nothing of how."""

    scheduler: Any
    table: DDPMTable
    steps: int

    def __post_init__(self) -> None:
        BlackBox(self.scheduler, self.steps)  # validates both
        if self.steps > (most := len(self.table.alphas_cumprod)):
            raise ValueError(f"steps must be at most the table's {most} entries, got {self.steps}")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Nothing of a black box can be trained."""
        return []

    @property
    def shows_steps(self) -> bool:
        """Its intermediate states are not exposed."""
        return False

    @property
    def deterministic(self) -> bool:
        """False: whether its steps have noise is not known."""
        return False

    @property
    def has_density(self) -> bool:
        """False: a black box has no density."""
        return False

    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        start: Float[Tensor, " paths *event"],
        generators: list[Generator] | None = None,
    ) -> Float[Tensor, " paths *event"]:
        """As ``BlackBox.sample``, one generator a path for schedulers that draw noise."""
        return BlackBox(self.scheduler, self.steps).sample(predict, start, generators)


def _draws_noise(scheduler: Any) -> bool:
    """Whether a scheduler's steps are random, as far as its name and settings tell."""
    name, kind = type(scheduler).__name__, str(scheduler.config.get("algorithm_type", ""))
    return kind.startswith("sde") or any(
        word in name for word in ("Ancestral", "SDE", "DDPM", "LCM", "TCD")
    )
