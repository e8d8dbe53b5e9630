"""Samplers: DDIM with its transition density.

Sources  [DDIM] Song, Meng & Ermon 2021, arXiv 2010.02502, equations 12 and 16.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctrl import ControlledSDE, TimeGrid
from diffusion_envs.denoising import generation_sde, kl_factor
from diffusion_envs.schedule import DDPMTable


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
        """Whether transitions have one: eta > 0."""
        return self.eta > 0

    def bind(self, table: DDPMTable, steps: int) -> "BoundDDIM":
        """This sampler on a model's schedule, with so many steps."""
        return BoundDDIM(self.eta, table, steps)


@dataclass(frozen=True, eq=False)
class BoundDDIM:
    """DDIM on a schedule: a ``ctrl.TransitionSolver`` on its own time grid; the action is the score.

    Step k leads from ``timesteps[k]`` towards data. All tables are float64, [steps] or [nodes].
    """

    eta: float
    table: DDPMTable
    steps: int

    def __post_init__(self) -> None:
        if not bool((self.alpha_bar.diff() > 0).all()):
            raise ValueError(
                "the sampler's last step does not move: its timestep and the final alpha-bar are one; use "
                "steps_offset=1 or set_alpha_to_one=True"
            )

    @cached_property
    def timesteps(self) -> Int64[Tensor, " steps"]:
        """Of the network, at the left end of every step."""
        return torch.tensor(self.table.timesteps(self.steps))

    @cached_property
    def noising_times(self) -> Float[Tensor, " nodes"]:
        """s in [0, 1] at every node, decreasing."""
        count = len(self.table.alphas_cumprod)
        last = 0.0 if self.table.final_is_one else 1 / count
        return torch.cat([(self.timesteps.double() + 1) / count, torch.tensor([last]).double()])

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " nodes"]:
        """alpha^2 at every node."""
        last = 1.0 if self.table.final_is_one else float(self.table.alphas_cumprod[0])
        entries = self.table.alphas_cumprod.double().cpu()[self.timesteps]
        return torch.cat([entries, torch.tensor([last]).double()])

    @cached_property
    def alpha(self) -> Float[Tensor, " nodes"]:
        """Signal at every node."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Float[Tensor, " nodes"]:
        """Noise level at every node."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def grid(self) -> TimeGrid:
        """RL times t = 1 - s of the nodes."""
        return TimeGrid(self.table.horizon - self.noising_times)

    @cached_property
    def sde(self) -> ControlledSDE:
        """The SDE that the sampler discretises."""
        return generation_sde(self.table, self.eta)

    @cached_property
    def integrated_g2(self) -> Float[Tensor, " steps"]:
        """int g^2 dt over every step: log(abar_{k+1} / abar_k)."""
        return self.alpha_bar.log().diff()

    @cached_property
    def std(self) -> Float[Tensor, " steps"]:
        """Standard deviation of every transition ([DDIM] equation 16)."""
        before, after = self.alpha_bar[:-1], self.alpha_bar[1:]
        return self.eta * ((1 - after) / (1 - before) * (1 - before / after)).sqrt()

    @cached_property
    def state_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(state) at a fixed score."""
        return self.alpha[1:] / self.alpha[:-1]

    @cached_property
    def score_gain(self) -> Float[Tensor, " steps"]:
        """d(mean of the next state) / d(score)."""
        towards = (1 - self.alpha_bar[1:] - self.std.square()).clamp(min=0).sqrt()
        return self.state_gain * self.sigma[:-1].square() - towards * self.sigma[:-1]

    @property
    def has_density(self) -> bool:
        """Whether every transition has a density: none has standard deviation 0."""
        return bool((self.std > 0).all())

    @property
    def kl_factor(self) -> float:
        """Of the path KL at this eta."""
        return kl_factor(self.eta)

    def _index(self, t0: Tensor) -> int:
        """The step that begins at RL time t0."""
        gaps = (self.grid.nodes[:-1] - float(t0)).abs()
        k = int(gaps.argmin())
        if gaps[k] > 0.25 / len(self.table.alphas_cumprod):
            raise ValueError(f"time {float(t0):g} is not a node of this sampler's grid")
        return k

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state ([DDIM] equation 12); the action is the score."""
        k = self._index(t0)
        mean = float(self.state_gain[k]) * states + float(self.score_gain[k]) * action
        return mean, self.std[k].to(states)

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One transition, driven by a Brownian increment over [t0, t1]."""
        mean, std = self.transition(sde, t0, t1, states, action)
        return mean + std * (increment / math.sqrt(float(t1 - t0)))


def transition_kl(
    sampler: BoundDDIM,
    score: Float[Tensor, "paths steps *event"],
    reference_score: Float[Tensor, "paths steps *event"],
) -> Float[Tensor, "paths steps"]:
    """KL of every transition from the reference's, nats: |difference of means|^2 / (2 std^2).

    Their sum is the exact path KL of the discrete chain.

    Raises:
        ValueError: the sampler has no density.
    """
    if not sampler.has_density:
        raise ValueError("transitions have no density: use DDIM with eta > 0")
    gap = (score - reference_score).square().flatten(2).sum(2)
    return 0.5 * gap * (sampler.score_gain / sampler.std).square().to(gap)
