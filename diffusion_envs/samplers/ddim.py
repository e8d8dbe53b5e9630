"""DDIM with its transition density.

Sources  [DDIM] Song, Meng & Ermon 2021, arXiv 2010.02502, equations 12 and 16.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctrl import ControlledSDE
from ctrl.devices import as_like
from diffusion_envs.denoising import denoised_sde, generation_sde, kl_factor, path_kl_per_step
from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.samplers.flow_sde import BoundFlowDDIM
from diffusion_envs.samplers.gaussian_steps import Action, GaussianSteps

# alpha-bar below which x0_hat of a float32 score is mostly round-off: alpha is then below 1e-3
_LITTLE_SIGNAL = 1e-6


@dataclass(frozen=True)
class DDIM:
    """[DDIM] with stochasticity eta: 1 is DDPM's ancestral sampling, 0 deterministic."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.eta, bool) or not isinstance(self.eta, int | float):
            raise TypeError(f"eta must be a number, got {self.eta!r}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    @property
    def has_density(self) -> bool:
        """Whether transitions have one: eta > 0 (and, once bound, no noiseless last step)."""
        return self.eta > 0

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        return f"DDIM eta {self.eta:g}"

    @overload  # of a table that starts without signal a BoundDDIMFromNoise: no type tells tables
    def bind(
        self, table: DDPMTable, steps: int, prediction_type: str = "epsilon"
    ) -> "BoundDDIM": ...

    @overload
    def bind(
        self, table: FlowTable, steps: int, prediction_type: str = "flow_prediction"
    ) -> BoundFlowDDIM: ...

    def bind(
        self, table: DDPMTable | FlowTable, steps: int, prediction_type: str = "epsilon"
    ) -> "BoundDDIM | BoundDDIMFromNoise | BoundFlowDDIM":
        """This sampler on a model's noise levels, with so many steps, whatever it predicts.

        Its action is the score; on a flow, and where it starts without signal, the expected data.
        """
        if isinstance(table, FlowTable):
            return BoundFlowDDIM(self.eta, table, steps)
        bound = BoundDDIM(self.eta, table, steps)
        if bound.alpha_bar[0] < _LITTLE_SIGNAL:
            return BoundDDIMFromNoise(bound)
        return bound


@dataclass(frozen=True, eq=False)
class BoundDDIM(GaussianSteps):
    """DDIM on a table of noise levels: Gaussian steps whose action is the score.

    Step k leads from ``timesteps[k]`` towards data, by
        x' = state_gain[k] x + score_gain[k] score + std[k] z,   z standard normal.
    All tables are float64 on the CPU, [steps] or [nodes]. The numbers are those of diffusers'
    ``DDIMScheduler.step``, except for "trailing" spacing with a step count that does not divide the
    table: there diffusers steps to another noise level than that of its next timestep, while here a
    step always ends where the next begins.
    """

    eta: float
    table: DDPMTable
    steps: int

    def __post_init__(self) -> None:
        DDIM(self.eta)  # validates eta
        if not bool((self.alpha_bar.diff() > 0).all()):
            raise ValueError(
                "the sampler's last step does not move: its timestep already has the final "
                "alpha-bar; use set_alpha_to_one=True or, with leading spacing, steps_offset=1, "
                "with trailing spacing fewer steps"
            )

    @property
    def schedule(self) -> DDPMTable:
        """The table of noise levels."""
        return self.table

    @cached_property
    def timesteps(self) -> Int64[Tensor, " steps"]:
        """Timesteps of the network at the left end of every step."""
        return torch.tensor(self.table.timesteps(self.steps))

    @cached_property
    def noising_times(self) -> Float[Tensor, " nodes"]:
        """s in [0, 1] at every node, decreasing."""
        entered = (self.timesteps.double() + 1) / len(self.table.alphas_cumprod)
        return torch.cat([entered, entered.new_tensor([self.table.last_noising_time(self.steps)])])

    @cached_property
    def _log_alpha_bar(self) -> Float[Tensor, " nodes"]:
        return -self.table.integrated_beta(self.noising_times)

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " nodes"]:
        """alpha^2 at every node."""
        return self._log_alpha_bar.exp()

    @cached_property
    def sde(self) -> ControlledSDE:
        """The SDE that the sampler discretises."""
        return generation_sde(self.table, self.eta)

    @cached_property
    def integrated_g2(self) -> Float[Tensor, " steps"]:
        """int g^2 dt over every step: log(abar_{k+1} / abar_k)."""
        return self._log_alpha_bar.diff()

    @cached_property
    def std(self) -> Float[Tensor, " steps"]:
        """Standard deviation of every transition ([DDIM] equation 16)."""
        kept = -torch.expm1(-self.integrated_g2)  # 1 - abar_k / abar_{k+1}
        return self.eta * self.sigma[1:] / self.sigma[:-1] * kept.sqrt()

    @cached_property
    def state_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(state) at a fixed score."""
        return (0.5 * self.integrated_g2).exp()

    @cached_property
    def score_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(score)."""
        # the root is of a number that is never negative, but for round-off where it is 0
        direct = (self.sigma[1:].square() - self.std.square()).clamp(min=0).sqrt()
        return self.state_gain * self.sigma[:-1].square() - direct * self.sigma[:-1]

    @cached_property
    def gain(self) -> Float[Tensor, " steps"]:
        """``score_gain``: the action is the score."""
        return self.score_gain

    @cached_property
    def step_sizes(self) -> Float[Tensor, " steps"]:
        """The clock: int g^2 dt, time rescaled to unit diffusion."""
        return self.integrated_g2

    @property
    def deterministic(self) -> bool:
        """Whether this is an ODE: no step has noise."""
        return self.eta == 0

    @property
    def kl_factor(self) -> float:
        """Factor of the path KL at this eta."""
        return kl_factor(self.eta)

    @cached_property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:
        """Path KL of a step for half a square of the score's change, nats."""
        return self.kl_factor * self.integrated_g2

    def path_kl(
        self, actions: Float[Tensor, "paths steps *event"], references: Tensor
    ) -> Float[Tensor, "paths steps"]:
        """Path KL of every step from the reference's, nats; of the SDE, not of the chain.

        Infinite for an ODE, whose laws are mutually singular.
        """
        if self.eta == 0:
            return actions.new_full(actions.shape[:2], math.inf)
        widths = as_like(self.integrated_g2, actions)
        return path_kl_per_step(actions, references, widths, factor=self.kl_factor)

    def _require_density(self) -> None:
        if self.eta == 0:
            raise ValueError(
                "DDIM with eta = 0 is deterministic: its transitions have no density; use eta > 0"
            )
        if not self.has_density:
            raise ValueError(
                "the last transition ends at alpha-bar 1, without noise, and has no density; set "
                '"set_alpha_to_one": false and "steps_offset": 1 in scheduler_config.json '
                "(DDPMTable(..., final_is_one=False, steps_offset=1))"
            )

    @property
    def _resolution(self) -> float:
        """Noising time between two entries of the table."""
        return 1 / len(self.table.alphas_cumprod)


@dataclass(frozen=True, eq=False)
class BoundDDIMFromNoise(GaussianSteps):
    """The same transitions where the first one starts without signal: the action is x0_hat.

    A score tells nothing there, and what it tells of x0_hat near there is lost to round-off.
        x' = alpha' x0_hat + sqrt(sigma'^2 - std^2) (x - alpha x0_hat) / sigma + std z
    It is for tables that end where some noise is left (``final_is_one`` false).
    """

    by_score: BoundDDIM

    def __post_init__(self) -> None:
        if self.by_score.table.final_is_one:
            raise ValueError(
                "a table that starts without signal must end where some noise is left: "
                "DDPMTable(..., final_is_one=False)"
            )

    @property
    def steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """How many there are."""
        return self.by_score.steps

    @property
    def eta(self) -> float:
        """Stochasticity."""
        return self.by_score.eta

    @property
    def action(self) -> Action:
        """The action is the expected data."""
        return "denoised"

    @property
    def schedule(self) -> DDPMTable:
        """The table of noise levels."""
        return self.by_score.table

    @cached_property
    def timesteps(self) -> Int64[Tensor, " steps"]:
        """Timesteps of the network at the left end of every step."""
        return self.by_score.timesteps

    @cached_property
    def noising_times(self) -> Float[Tensor, " nodes"]:
        """s in [0, 1] at every node, decreasing."""
        return self.by_score.noising_times

    @cached_property
    def sde(self) -> ControlledSDE:
        """The SDE that the sampler discretises."""
        return denoised_sde(self.schedule, self.eta)

    @cached_property
    def std(self) -> Float[Tensor, " steps"]:
        """Standard deviation of every transition ([DDIM] equation 16)."""
        return self.by_score.std

    @cached_property
    def state_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(state) at a fixed x0_hat."""
        kept = (self.sigma[1:].square() - self.std.square()).clamp(min=0).sqrt()
        return kept / self.sigma[:-1]

    @cached_property
    def gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(x0_hat)."""
        return self.alpha[1:] - self.state_gain * self.alpha[:-1]

    @cached_property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:
        """Path KL of a step for half a square of x0_hat's change, nats; of the SDE."""
        return kl_factor(self.eta) * (self.alpha / self.sigma).square().diff()

    @property
    def _resolution(self) -> float:
        """Noising time between two entries of the table."""
        return 1 / len(self.schedule.alphas_cumprod)
