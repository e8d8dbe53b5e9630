"""Gaussian steps on a rectified flow x = (1 - s) x0 + s eps, from pure noise at s = 1.

The action is the expected data x0_hat, finite at s = 1; the network's velocity is
v = (x - x0_hat) / s. A step leads from s to u = s - h.

    FlowSDE   Euler-Maruyama for the SDE of the flow's marginals with noise sigma_s dW,
              sigma_s^2 = a^2 s / (1 - s):
                  x' = x - h (v + sigma_s^2 / (2 s) (x + (1 - s) v)) + sigma_s sqrt(h) z.
              As g^2 = 2 s / (1 - s) it is the eta family's, eta = a / sqrt(2); a = sqrt(2) is the
              time reversal. Since int g^2 is infinite at s = 1 it forgets its start at every a > 0:
              its KL-regularised optimum is the tilt of the data.
    DDIM      x' = (1 - u) x0_hat + sqrt(u^2 - c^2) eps_hat + c z, exact where x0_hat is constant,
              c = eta u sqrt(1 - SNR(s) / SNR(u)).
    CPS       the same with c = u sin(a pi / 2): noise that does not shrink with the step.

At s = 1 sigma_s is infinite. Flow-GRPO's code puts 1 - s_1 for 1 - s there, s_1 the second node,
and so does FlowSDE. Its first step then has the standard deviation a, however short it is; where
x0_hat is the data's mean, as it is at s = 1, it leaves the marginal's mean exact and makes its
variance too large by a^4 / 4 + a^2 h - h^2 var(x0): 0.06 of 1 at a = 0.7 and h = 0.

Sources  [FG] Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, equations 8 and 9, and its code,
         github.com/yifan123/flow_grpo, sd3_sde_with_logprob.py.
         [CPS] Wang & Yu 2025, coefficients-preserving sampling, arXiv 2509.05952.
         [DDIM] Song, Meng & Ermon 2021, arXiv 2010.02502, equations 12 and 16.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import ControlledSDE
from diffusion_envs.denoising import denoised_sde, kl_factor
from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.samplers.gaussian_steps import Action, GaussianSteps


def _require_flow(name: str, table: DDPMTable | FlowTable) -> FlowTable:
    if not isinstance(table, FlowTable):
        raise TypeError(
            f"{name} needs the table of a rectified flow (FlowTable), got {type(table).__name__}: "
            "use DDIM on the table of a variance-preserving model"
        )
    return table


def _require_noise_level(noise_level: object, most: float) -> None:
    if isinstance(noise_level, bool) or not isinstance(noise_level, int | float):
        raise TypeError(f"noise_level must be a number, got {noise_level!r}")
    if not (0 <= noise_level <= most and math.isfinite(noise_level)):
        upper = "finite" if most == math.inf else f"at most {most:g}"
        raise ValueError(f"noise_level must be at least 0 and {upper}, got {noise_level}")


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's SDE ([FG] equation 9); noise_level is its a."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _require_noise_level(self.noise_level, math.inf)

    @property
    def has_density(self) -> bool:
        """Whether transitions have one."""
        return self.noise_level > 0

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        return f"flow SDE a {self.noise_level:g}"

    def bind(
        self, table: DDPMTable | FlowTable, steps: int, prediction_type: str = "flow_prediction"
    ) -> "BoundFlowSDE":
        """This sampler on a flow's noise levels, with so many steps.

        Raises:
            TypeError: the table is not that of a flow.
        """
        return BoundFlowSDE(self.noise_level, _require_flow("FlowSDE", table), steps)


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling ([CPS]): every node has the flow's amount of noise."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _require_noise_level(self.noise_level, 1.0)

    @property
    def has_density(self) -> bool:
        """Whether transitions have one (and, once bound, the last one does)."""
        return self.noise_level > 0

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        return f"CPS a {self.noise_level:g}"

    def bind(
        self, table: DDPMTable | FlowTable, steps: int, prediction_type: str = "flow_prediction"
    ) -> "BoundCPS":
        """This sampler on a flow's noise levels, with so many steps.

        Raises:
            TypeError: the table is not that of a flow.
        """
        return BoundCPS(self.noise_level, _require_flow("CPS", table), steps)


class _OnFlow(GaussianSteps):
    """Steps between the nodes of a flow, and their path KL by the SNR."""

    table: FlowTable

    @property
    def action(self) -> Action:
        """The action is the expected data."""
        return "denoised"

    @property
    def schedule(self) -> FlowTable:
        """The flow's noise levels."""
        return self.table

    @cached_property
    def noising_times(self) -> Float[Tensor, " nodes"]:
        """s at every node, from 1 down."""
        return self.table.nodes(self.steps)

    @cached_property
    def timesteps(self) -> Float[Tensor, " steps"]:
        """1000 s at the left of every step, float32 as in diffusers."""
        return (self.table.num_train_timesteps * self.noising_times[:-1]).float()

    @cached_property
    def snr_increase(self) -> Float[Tensor, " steps"]:
        """Int g^2 (alpha / sigma^2)^2 over every step, with x0_hat held.

        The last step to clean data holds the score instead: the SNR is infinite there.
        """
        increase = (self.alpha / self.sigma).square().diff()
        if self.table.end == 0:
            s = self.noising_times[-2:]
            rate = self.alpha[-2] / self.sigma[-2].square()
            increase[-1] = self.table.integrated_g2(s[1], s[0]) * rate.square()
        return increase


@dataclass(frozen=True, eq=False)
class BoundFlowSDE(_OnFlow):
    """Flow-GRPO's steps on a flow."""

    noise_level: float
    table: FlowTable
    steps: int

    def __post_init__(self) -> None:
        FlowSDE(self.noise_level)
        self.table.nodes(self.steps)  # validates steps

    @property
    def eta(self) -> float:
        """Eta of the same SDE in the eta family."""
        return self.noise_level / math.sqrt(2)

    @cached_property
    def sde(self) -> ControlledSDE:
        """The SDE that the sampler discretises."""
        return denoised_sde(self.table, self.eta)

    @cached_property
    def _variance_rate(self) -> Float[Tensor, " steps"]:
        """sigma_s^2, with s_1 for s in 1 - s where s = 1."""
        s = self.noising_times[:-1]
        return self.noise_level**2 * s / (1 - torch.where(s == 1, s[1], s))

    @cached_property
    def _velocity_gain(self) -> Float[Tensor, " steps"]:
        """Minus d(mean of the next state) / d(velocity)."""
        s, h = self.noising_times[:-1], self.grid.steps
        return (1 + self._variance_rate * (1 - s) / (2 * s)) * h

    @cached_property
    def state_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(state) at a fixed x0_hat."""
        s, h = self.noising_times[:-1], self.grid.steps
        return 1 - self._variance_rate * h / (2 * s) - self._velocity_gain / s

    @cached_property
    def gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(x0_hat)."""
        return self._velocity_gain / self.noising_times[:-1]

    @cached_property
    def std(self) -> Float[Tensor, " steps"]:
        """sigma_s sqrt(h)."""
        return (self._variance_rate * self.grid.steps).sqrt()

    @cached_property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:
        """Path KL of a step for half a square of x0_hat's change, nats; of the SDE."""
        return kl_factor(self.eta) * self.snr_increase


class _Preserving(_OnFlow):
    """Steps that predict both parts of the state and keep the flow's amounts of them.

    ``std`` says how much of the noise is re-drawn.
    """

    @cached_property
    def _kept(self) -> Float[Tensor, " steps"]:
        """Factor of the predicted noise: sqrt(u^2 - std^2)."""
        return (self.sigma[1:].square() - self.std.square()).clamp(min=0).sqrt()

    @cached_property
    def state_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(state) at a fixed x0_hat."""
        return self._kept / self.sigma[:-1]

    @cached_property
    def gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(x0_hat)."""
        return self.alpha[1:] - self.state_gain * self.alpha[:-1]


@dataclass(frozen=True, eq=False)
class BoundFlowDDIM(_Preserving):
    """[DDIM] on a flow: the exact step of the eta family where x0_hat is constant (eta 0 and 1)."""

    eta: float
    table: FlowTable
    steps: int

    def __post_init__(self) -> None:
        self.table.nodes(self.steps)  # validates steps

    @cached_property
    def sde(self) -> ControlledSDE:
        """The SDE that the sampler discretises."""
        return denoised_sde(self.table, self.eta)

    @cached_property
    def std(self) -> Float[Tensor, " steps"]:
        """Eta times the standard deviation of x_u conditional on x_s and x0."""
        renewed = -torch.expm1(-self.table.log_snr(self.noising_times).diff())
        return self.eta * self.sigma[1:] * renewed.sqrt()

    @cached_property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:
        """Path KL of a step for half a square of x0_hat's change, nats; of the SDE."""
        return kl_factor(self.eta) * self.snr_increase


@dataclass(frozen=True, eq=False)
class BoundCPS(_Preserving):
    """Coefficients-preserving steps on a flow.

    Their noise does not shrink with the step: there is no SDE that they approximate, and the path
    KL is the chain's own. To clean data the last step has no noise, hence no density and infinite
    KL; the published code drops it out of the log-density by leaving out the variances.
    """

    noise_level: float
    table: FlowTable
    steps: int

    def __post_init__(self) -> None:
        CPS(self.noise_level)
        self.table.nodes(self.steps)  # validates steps

    @cached_property
    def sde(self) -> ControlledSDE:
        """One with the same marginals, the time reversal."""
        return denoised_sde(self.table)

    @cached_property
    def std(self) -> Float[Tensor, " steps"]:
        """u sin(a pi / 2)."""
        return self.sigma[1:] * math.sin(0.5 * math.pi * self.noise_level)

    @cached_property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:
        """Path KL of a step for half a square of x0_hat's change, nats; of the chain."""
        return (self.gain / self.std).square()
