"""DDIM with its transition density.

Sources  [DDIM] Song, Meng & Ermon 2021, arXiv 2010.02502, equations 12 and 16.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctrl import ControlledSDE, TimeGrid
from ctrl.devices import as_like
from diffusion_envs.denoising import generation_sde, kl_factor, path_kl_per_step
from diffusion_envs.noise_schedules import DDPMTable

State: TypeAlias = Float[Tensor, " rows *event"]
Steps: TypeAlias = Int64[Tensor, " rows"]


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
        """For tables and plots."""
        return f"DDIM eta {self.eta:g}"

    def bind(self, table: DDPMTable, steps: int, prediction_type: str = "epsilon") -> "BoundDDIM":
        """This sampler on a model's schedule, with so many steps; it plays scores, of any model."""
        return BoundDDIM(self.eta, table, steps)


@dataclass(frozen=True, eq=False)
class BoundDDIM:
    """DDIM on a schedule: a ``ctrl.TransitionSolver`` on its own grid; the action is the score.

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
        DDIM(self.eta)  # refuses what is no eta
        if not bool((self.alpha_bar.diff() > 0).all()):
            raise ValueError(
                "the sampler's last step does not move: its timestep already has the final "
                "alpha-bar; use set_alpha_to_one=True or, with leading spacing, steps_offset=1, "
                "with trailing spacing fewer steps"
            )

    @cached_property
    def timesteps(self) -> Int64[Tensor, " steps"]:
        """Of the network, at the left end of every step."""
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
    def alpha(self) -> Float[Tensor, " nodes"]:
        """Signal at every node."""
        return self.table.alpha(self.noising_times)

    @cached_property
    def sigma(self) -> Float[Tensor, " nodes"]:
        """Noise level at every node."""
        return self.table.sigma(self.noising_times)

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

    @property
    def shows_steps(self) -> bool:
        """Its states between start and data are known."""
        return True

    @property
    def deterministic(self) -> bool:
        """Whether this is an ODE: no step has noise."""
        return self.eta == 0

    @property
    def has_density(self) -> bool:
        """Whether every transition has a density: none has standard deviation 0."""
        return bool((self.std > 0).all())

    @property
    def kl_factor(self) -> float:
        """Of the path KL at this eta."""
        return kl_factor(self.eta)

    @property
    def path_kl_gain(self) -> Float[Tensor, " steps"]:
        """Path KL of a step for half a square of the score's change, nats."""
        return self.kl_factor * self.integrated_g2

    def path_kl(
        self, scores: Float[Tensor, "paths steps *event"], references: Tensor
    ) -> Float[Tensor, "paths steps"]:
        """Path KL of every step from the reference's, nats; of the SDE, not of the chain.

        Infinite for an ODE, whose laws are mutually singular.
        """
        if self.eta == 0:
            return scores.new_full(scores.shape[:2], math.inf)
        widths = as_like(self.integrated_g2, scores)
        return path_kl_per_step(scores, references, widths, factor=self.kl_factor)

    # -- rows of any steps ------------------------------------------------------------------------

    def mean(self, step: Steps, states: State, score: State) -> State:
        """Mean of the next state of each row, whose step is ``step[row]`` ([DDIM] equation 12)."""
        return self._at(self.state_gain, step, states) * states + (
            self._at(self.score_gain, step, states) * score
        )

    def noise(self, step: Steps, states: State, next_states: State, score: State) -> State:
        """The standard normal that led from a state to the next one under a score.

        Raises:
            ValueError: the sampler has no density.
        """
        self._require_density()
        gap = next_states - self.mean(step, states, score)
        return gap / self._at(self.std, step, states)

    def log_ratio(
        self, step: Steps, noise: State, score: State, old_score: State
    ) -> Float[Tensor, " rows"]:
        """log p(x' | x, score) - log p(x' | x, old_score), summed over coordinates, nats.

        Scores of one network at one state differ by round-off where it was asked in other batches;
        what that makes of a log-ratio is bounded by ``objectives.protocol.log_ratio_rounding``.

        Args:
            step: of each row.
            noise: standard normal that led to x' under ``old_score``.
            score: of the policy in question.
            old_score: of the policy that sampled.

        Raises:
            ValueError: the sampler has no density.
        """
        shift = self._whitened(step, score - old_score)
        return (shift * noise - 0.5 * shift.square()).flatten(1).sum(1)

    def transition_kl(
        self, step: Steps, score: State, reference_score: State
    ) -> Float[Tensor, " rows"]:
        """KL of each row's transition from the reference's, |difference of means|^2 / (2 std^2).

        In nats. Summed along paths and averaged over them it is the path KL of the discrete chain,
        exactly; ``denoising.path_kl_per_step`` is that of the SDE which the chain approximates.

        Raises:
            ValueError: the sampler has no density.
        """
        return 0.5 * self._whitened(step, score - reference_score).square().flatten(1).sum(1)

    def _whitened(self, step: Tensor, shift: Tensor) -> Tensor:
        """A shift of the score, as a shift of the next state in units of its standard deviation."""
        self._require_density()
        return self._at(self.score_gain / self.std, step, shift) * shift

    @staticmethod
    def _at(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
        return as_like(table, like)[step].view(-1, *[1] * (like.ndim - 1))

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

    # -- ctrl.TransitionSolver --------------------------------------------------------------------

    def _index(self, t0: Tensor) -> int:
        """The step that begins at RL time t0."""
        gaps = (self.grid.nodes[:-1] - float(t0)).abs()
        k = int(gaps.argmin())
        if not gaps[k] < 0.25 / len(self.table.alphas_cumprod):
            raise ValueError(
                f"time {float(t0):g} begins no step of this sampler; simulate on its own grid"
            )
        return k

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state; the action is the score.

        Raises:
            ValueError: ``t0`` begins no step, or ``action`` has not the states' shape.
        """
        if action.shape != states.shape:
            raise ValueError(
                f"action must be a score of the states' shape {list(states.shape)}, "
                f"got {list(action.shape)}"
            )
        k = self._index(t0)
        mean = float(self.state_gain[k]) * states + float(self.score_gain[k]) * action
        return mean, as_like(self.std[k], states)

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
