"""Few steps between chosen noise levels: DxMI's published ten, and our own for any number.

A chain of variances eta_0 .. eta_{T-1} has the levels alpha-bar_i = prod_{j <= i} (1 - eta_j). It
is sampled from i = T - 1 down, with DDPM's posterior at its own levels,
    x' = (x + eta score) / sqrt(1 - eta) + std z,
    std^2 = eta (1 - alpha-bar_{i-1}) / (1 - alpha-bar_i),
and std = 0.001 in the last step, whose mean is the expected data and where DDPM has no noise: so
every step has a density. The network is told the timestep, not an integer, that has the chain's
alpha-bar in the table that it was trained with.

    QuadraticVariances  eta_i = 1e-4 (1 + growth i)^2. The published code searches the growth with
                        which the chain starts at the table's last alpha-bar, below 95 / T (eta =
                        0.9); with ten steps and the published betas there is none, and it takes the
                        edge, 9.5: the chain starts at alpha-bar 0.0208, timestep 616.73 of 1000.
                        Four steps would start at 0.343, and fewer than nine are refused.
    EqualAngles         Ours. The angle arccos(alpha) decreases by equal amounts from the published
                        start to the published last level (81.7 to 0.57 degrees): 27.0 degrees a
                        step in four steps. The published ten decrease by 5.5 to 10.9 degrees each,
                        so that this is their shape for other numbers of steps.

Start       Standard normal, as published, which no marginal at alpha-bar 0.0208 is. A picture x0 is
            noised to N(alpha x0, sigma^2); its KL from N(0, 1) is
                1/2 (alpha-bar (x0^2 - 1) - log(1 - alpha-bar)) nats a coordinate,
            on average 0.0105 for data of unit power (32 nats for a picture of CIFAR-10), and the
            marginal's is at most that. Means of the start are off by up to alpha = 0.144 of the
            data's mean.
Learned     DxMI also learns log std of all steps but the last. The means stay as above.
Path KL     As DDIM's with eta = 1, whose steps these are but for the last one's noise: that of the
            SDE, 1/2 int g^2 |change of score|^2 with the score held. Where the standard deviations
            are learned, no SDE has these transitions; what their change costs, d std_kl nats a step
            of d coordinates, is the chain's and comes on top. The whole KL of the chain is
            ``transition_kl``, also from a reference with the initial standard deviations. In few
            steps the two differ: a unit change of epsilon^2 costs 0.5 to 0.7 nats in every step of
            the SDE, and in the chain 0.6 to 1.9 in the first eight of the ten published steps but
            56 and 50 in the last two, which have little noise left.

Sources     Kong & Ping 2021, "On fast sampling of diffusion probabilistic models", arXiv
            2106.00132, section 3 (VAR schedules, kappa = 1). Yoon et al. 2024, "Maximum entropy
            inverse reinforcement learning of diffusion models with energy-based models", arXiv
            2407.00626, and its code for CIFAR-10. Ho, Jain & Abbeel 2020, arXiv 2006.11239,
            equations 6 and 7, for the posterior.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor, nn

from ctrl import ControlledSDE
from ctrl.devices import as_like
from diffusion_envs.denoising import generation_sde
from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.samplers.gaussian_steps import GaussianSteps, State, Steps

LAST_STD = 0.001
NOISIEST = 0.05  # largest alpha-bar of a start that is taken to be noise
_FIRST = 1e-4  # eta_0
_EDGE = 0.95  # of the search: largest growth times steps times sqrt(eta_0)
_PUBLISHED_STEPS = 10
_PUBLISHED_END = 4.0358e-5  # alpha-bar of the last of 1000 betas from 1e-4 to 0.02


def quadratic_variances(steps: int, last: float = _PUBLISHED_END) -> Float[Tensor, " steps"]:
    """eta_i = 1e-4 (1 + growth i)^2 for i < steps, float64, with the growth of the published code.

    Args:
        steps: how many.
        last: alpha-bar that the product of all 1 - eta_i should have.
    """
    numbers = torch.arange(steps, dtype=torch.float64)

    def variances(growth: float) -> Tensor:
        return _FIRST * (1 + growth * numbers).square()

    def excess(growth: float) -> float:
        return float(torch.log1p(-variances(growth)).sum()) - math.log(last)

    edge = _EDGE / (math.sqrt(_FIRST) * steps)
    if not excess(edge) < 0 < excess(0.0):
        return variances(edge)
    growth: Any = brentq(excess, 0.0, edge, xtol=1e-13)
    return variances(growth)


def equal_angles(steps: int) -> Float[Tensor, " steps"]:
    """alpha-bar, noisiest first, at equally spaced angles arccos(alpha), float64.

    The ends are those of the published ten steps.
    """
    published = (1 - quadratic_variances(_PUBLISHED_STEPS)).cumprod(0)
    start, end = published[[-1, 0]].sqrt().arccos().tolist()
    return torch.linspace(start, end, steps, dtype=torch.float64).cos().square()


@dataclass(frozen=True)
class _FewSteps:
    """What both samplers share.

    Attributes:
        learned_std: whether the standard deviations of all steps but the last are parameters, which
            objectives that have a loss for them train.
    """

    learned_std: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.learned_std, bool):
            raise TypeError(f"learned_std must be True or False, got {self.learned_std!r}")

    @property
    def has_density(self) -> bool:
        """True: the last step has noise too."""
        return True


@dataclass(frozen=True)
class QuadraticVariances(_FewSteps):
    """DxMI's sampler; its ten steps are the published ones.

    Attributes:
        learned_std: whether the standard deviations of all steps but the last are parameters, which
            objectives that have a loss for them train.
    """

    @property
    def usual_steps(self) -> int:
        """Ten, as published."""
        return _PUBLISHED_STEPS

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        return "DxMI" + (" learned std" if self.learned_std else "")

    def bind(
        self, table: DDPMTable | FlowTable, steps: int, prediction_type: str = "epsilon"
    ) -> "BoundFewSteps":
        """This sampler on a model's noise levels.

        Raises:
            TypeError: the table is that of a flow.
            ValueError: the chain starts at alpha-bar above 0.05, as with fewer than nine steps; or
                the table has not its levels.
        """
        table = _require_table(self, table, steps)
        eta = quadratic_variances(steps, float(table.alphas_cumprod[-1]))
        return BoundFewSteps(table, (1 - eta).cumprod(0).flip(0), self.learned_std)


@dataclass(frozen=True)
class EqualAngles(_FewSteps):
    """Our sampler of four steps, or any number of at least 2, between DxMI's first and last level.

    Attributes:
        learned_std: whether the standard deviations of all steps but the last are parameters, which
            objectives that have a loss for them train.
    """

    @property
    def usual_steps(self) -> int:
        """Four."""
        return 4

    @property
    def label(self) -> str:
        """Name for tables and plots."""
        return "equal angles" + (" learned std" if self.learned_std else "")

    def bind(
        self, table: DDPMTable | FlowTable, steps: int, prediction_type: str = "epsilon"
    ) -> "BoundFewSteps":
        """This sampler on a model's noise levels, with so many steps.

        Raises:
            TypeError: the table is that of a flow.
            ValueError: ``steps`` is below 2, or the table has not the sampler's levels.
        """
        return BoundFewSteps(
            _require_table(self, table, steps), equal_angles(steps), self.learned_std
        )


def _require_table(
    sampler: QuadraticVariances | EqualAngles, table: DDPMTable | FlowTable, steps: object
) -> DDPMTable:
    if not isinstance(table, DDPMTable):
        raise TypeError(
            f"{type(sampler).__name__} needs the noise levels of a variance-preserving model "
            f"(DDPMTable), got {type(table).__name__}: use DDIM, FlowSDE or CPS on a flow"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps must be an integer of at least 2, got {steps!r}")
    return table


@dataclass(frozen=True, eq=False)
class BoundFewSteps(GaussianSteps):
    """DDPM's posterior steps between chosen levels of a table; the action is the score.

    Attributes:
        table: of the model.
        levels: alpha-bar at the left of every step, increasing in (0, 1), float64.
        learned_std: whether ``log_std`` is a parameter.
        log_std: log of the standard deviations, [steps], float64 on the CPU, or None where they are
            fixed. Its last entry is never read: that step has ``LAST_STD``.
    """

    table: DDPMTable
    levels: Float[Tensor, " steps"]
    learned_std: bool = False
    steps: int = field(init=False)
    log_std: nn.Parameter | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", len(self.levels))
        if not bool((self.levels > 0).all() and (self.alpha_bar.diff() > 0).all()):
            raise ValueError(
                f"levels must increase strictly within (0, 1), got {self.levels.tolist()}"
            )
        if not (start := float(self.levels[0])) <= NOISIEST:
            raise ValueError(
                f"{self.steps} steps would start at alpha-bar {start:.3f}, and start states are "
                f"pure noise: it must be at most {NOISIEST:g}; use more steps (DxMI's are 10), or "
                "EqualAngles"
            )
        assert self.timesteps.isfinite().all()  # the table has the levels
        learned = nn.Parameter(self.initial_std.log()) if self.learned_std else None
        object.__setattr__(self, "log_std", learned)

    @property
    def schedule(self) -> DDPMTable:
        """The table of noise levels."""
        return self.table

    @property
    def parameters(self) -> list[nn.Parameter]:
        """``log_std``, where it is learned."""
        return [] if self.log_std is None else [self.log_std]

    # -- levels -----------------------------------------------------------------------------------

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " nodes"]:
        """alpha^2 at every node; 1 at the last."""
        return torch.cat([self.levels, self.levels.new_ones(1)])

    @cached_property
    def alpha(self) -> Float[Tensor, " nodes"]:
        """Signal at every node."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Float[Tensor, " nodes"]:
        """Noise level at every node."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def timesteps(self) -> Float[Tensor, " steps"]:
        """Timesteps at the left of every step, not integers, float64."""
        return self.table.timesteps_of(self.levels.log())

    @cached_property
    def noising_times(self) -> Float[Tensor, " nodes"]:
        """s in [0, 1] at every node, decreasing: where the schedule has these levels."""
        return self.table.noising_times_of(-self.alpha_bar.log())

    @cached_property
    def sde(self) -> ControlledSDE:
        """The SDE that has the marginals of the steps: the time reversal."""
        return generation_sde(self.table)

    # -- steps ------------------------------------------------------------------------------------

    @cached_property
    def variances(self) -> Float[Tensor, " steps"]:
        """eta of every step: the share of the variance that the forward chain adds in it."""
        return 1 - self.alpha_bar[:-1] / self.alpha_bar[1:]

    @cached_property
    def state_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(state) at a fixed score: 1 / sqrt(1 - eta)."""
        return (1 - self.variances).rsqrt()

    @cached_property
    def gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(score): eta / sqrt(1 - eta)."""
        return self.state_gain * self.variances

    @cached_property
    def initial_std(self) -> Float[Tensor, " steps"]:
        """Standard deviations of the posterior, and of the pretrained model; the last is fixed."""
        posterior = self.sigma[1:] / self.sigma[:-1] * self.variances.sqrt()
        return torch.cat([posterior[:-1], posterior.new_tensor([LAST_STD])])

    @property
    def std(self) -> Float[Tensor, " steps"]:  # pyright: ignore[reportIncompatibleVariableOverride]  # its parameter changes
        """Standard deviation of every transition, now; with the gradient of ``log_std``."""
        if self.log_std is None:
            return self.initial_std
        return torch.cat([self.log_std[:-1].exp(), self.initial_std[-1:]])

    @cached_property
    def step_sizes(self) -> Float[Tensor, " steps"]:
        """The clock: int g^2 dt, time rescaled to unit diffusion."""
        return self.alpha_bar.log().diff()

    # -- divergences ------------------------------------------------------------------------------

    @property
    def kl_factor(self) -> float:
        """1: the path KL is that of the time reversal, whose clock is ``step_sizes``."""
        return 1.0

    @property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:  # pyright: ignore[reportIncompatibleVariableOverride]  # a clock by another name
        """Path KL of a step for half a square of the score's change, nats: int g^2 dt.

        Where standard deviations are learned, ``std_kl`` a coordinate comes on top.
        """
        return self.step_sizes

    @property
    def std_kl(self) -> Float[Tensor, " steps"]:
        """KL a coordinate of N(0, std^2) from N(0, initial_std^2), nats; with its gradient."""
        ratio = self.std / self.initial_std
        return 0.5 * (ratio.square() - 1) - ratio.log()

    def path_kl(
        self, actions: Float[Tensor, "paths steps *event"], references: Tensor
    ) -> Float[Tensor, "paths steps"]:
        """Path KL of every step from the reference with the initial standard deviations, nats."""
        gap = (actions - references).flatten(2)
        means = 0.5 * as_like(self.path_kl_gain, actions) * gap.square().sum(2)
        return means + as_like(self.std_kl, actions) * gap.shape[2]

    def transition_kl(self, step: Steps, action: State, reference: State) -> Float[Tensor, " rows"]:
        """KL of each row's transition from the reference's, nats; of the chain, exactly.

        The reference's standard deviation is the initial one.
        """
        shift = self._at(self.gain / self.initial_std, step, action) * (action - reference)
        widths = self._at(self.std_kl, step, action).flatten()
        return 0.5 * shift.flatten(1).square().sum(1) + action[0].numel() * widths
