"""Samplers whose steps are Gaussian: the one contract that roll-outs, losses and exact answers use.

Step k leads from node k, the noisier one, to node k + 1:
    x' = state_gain[k] x + gain[k] a + std[k] z,   z standard normal.
The action a is what the steps are affine in and what is held over each of them:
    "score"      grad log p, where some signal is left at every node;
    "denoised"   x0_hat, the expected data, where the first node has no signal (alpha = 0). There
                 the score is -x / sigma^2 whatever the network says, while x0_hat is finite.
With score = (alpha x0_hat - x) / sigma^2 the path KL of a step is
    1/2 int g^2 |change of score|^2 = 1/2 int g^2 (alpha / sigma^2)^2 |change of x0_hat|^2,
and since g^2 alpha^2 / sigma^4 = -d SNR / d(noising time), SNR = alpha^2 / sigma^2, it is half the
increase of the SNR times |change of x0_hat|^2 where x0_hat is held: finite at alpha = 0.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ctrl import ControlledSDE, TimeGrid
from ctrl.devices import as_like
from diffusion_envs.denoising import tweedie_mean
from diffusion_envs.noise_schedules import DDPMTable, FlowTable

State: TypeAlias = Float[Tensor, " rows *event"]
Steps: TypeAlias = Int64[Tensor, " rows"]
Action: TypeAlias = Literal["score", "denoised"]


class GaussianSteps(ABC):
    """Gaussian steps on noise levels: a ``ctrl.TransitionSolver`` on its own grid.

    A sampler fills the tables, float64 on the CPU; densities and divergences follow from them.
    Where ``parameters`` is not empty, ``std`` follows them and carries their gradient.

    Attributes:
        steps: how many there are.
    """

    steps: int

    # -- the tables that a sampler fills ----------------------------------------------------------

    timesteps: cached_property[Tensor]
    """What the network is told at the left of every step, [steps]: integers, or floats."""
    noising_times: cached_property[Float[Tensor, " nodes"]]
    """s at every node, decreasing."""
    sde: cached_property[ControlledSDE]
    """An SDE with the marginals of the steps, as a function of the action."""
    state_gain: cached_property[Float[Tensor, " steps"]]
    """d(mean of the next state) / d(state) at a fixed action."""
    gain: cached_property[Float[Tensor, " steps"]]
    """d(mean of the next state) / d(action)."""
    std: cached_property[Float[Tensor, " steps"]]
    """Standard deviation of every transition."""
    path_kl_gain: cached_property[Float[Tensor, " steps"]]
    """Path KL of a step for half a square of the action's change, nats."""

    @property
    def action(self) -> Action:
        """What the steps are affine in: the score, or the expected data."""
        return "score"

    @property
    @abstractmethod
    def schedule(self) -> DDPMTable | FlowTable:
        """The noise levels that the model was trained on."""

    @cached_property
    def alpha(self) -> Float[Tensor, " nodes"]:
        """Signal at every node."""
        return self.schedule.alpha(self.noising_times)

    @cached_property
    def sigma(self) -> Float[Tensor, " nodes"]:
        """Noise level at every node."""
        return self.schedule.sigma(self.noising_times)

    @cached_property
    def grid(self) -> TimeGrid:
        """Times of the nodes, increasing from noise to data."""
        return TimeGrid(self.schedule.horizon - self.noising_times)

    @cached_property
    def step_sizes(self) -> Float[Tensor, " steps"]:
        """The clock of advantages, value losses and clip ranges: by default the angle turned.

        The angle arctan(alpha / sigma) grows from 0 without signal to pi / 2 without noise: finite
        at both ends, and a function of the noise levels alone, however time is measured.
        """
        return torch.atan2(self.alpha, self.sigma).diff()

    @property
    def kl_factor(self) -> float | Float[Tensor, " steps"]:
        """``path_kl_gain`` per unit of the clock; one number if it is the same at every step."""
        return self.path_kl_gain / self.step_sizes

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What can be trained of the sampler: nothing, where its tables are fixed."""
        return []

    @property
    def shows_steps(self) -> bool:
        """Its states between start and data are known."""
        return True

    @property
    def deterministic(self) -> bool:
        """Whether this is an ODE: no step has noise."""
        return not bool(self.std.any())

    @property
    def has_density(self) -> bool:
        """Whether every transition has a density: none has standard deviation 0."""
        return bool((self.std > 0).all())

    # -- whole paths ------------------------------------------------------------------------------

    def path_kl(
        self, actions: Float[Tensor, "paths steps *event"], references: Tensor
    ) -> Float[Tensor, "paths steps"]:
        """Path KL of every step from the reference's, nats; infinite for an ODE.

        It is that of the SDE where the sampler discretises one, not of the chain.
        """
        if self.deterministic:
            return actions.new_full(actions.shape[:2], math.inf)
        gap = (actions - references).square().flatten(2).sum(2)
        return 0.5 * as_like(self.path_kl_gain, actions) * gap

    def chain_kl(
        self, actions: Float[Tensor, "paths steps *event"], references: Tensor
    ) -> Float[Tensor, "paths steps"]:
        """KL of every transition from the reference's, nats; infinite without a density.

        Its sum is the path KL of the chain that is sampled, which no KL of what it generates
        exceeds. ``path_kl`` is that of the SDE, in few steps another number.
        """
        if not self.has_density:
            return actions.new_full(actions.shape[:2], math.inf)
        step = torch.arange(actions.shape[1], device=actions.device).repeat(len(actions))
        kl = self.transition_kl(step, actions.flatten(0, 1), references.flatten(0, 1))
        return kl.view(actions.shape[:2])

    def denoised(
        self,
        states: Float[Tensor, "paths steps *event"],
        actions: Float[Tensor, "paths steps *event"],
    ) -> Float[Tensor, "paths steps *event"]:
        """x0_hat at the left of every step, from the actions there."""
        if self.action == "denoised":
            return actions
        alpha, sigma = (
            as_like(level[:-1], states).view(1, -1, *[1] * (states.ndim - 2))
            for level in (self.alpha, self.sigma)
        )
        return tweedie_mean(states, actions, alpha, sigma)

    def denoised_at(self, step: int, states: State, action: State) -> State:
        """x0_hat at the left of one step, from the action there."""
        if self.action == "denoised":
            return action
        alpha, sigma = (as_like(level[step], states) for level in (self.alpha, self.sigma))
        return tweedie_mean(states, action, alpha, sigma)

    # -- rows of any steps ------------------------------------------------------------------------

    def mean(self, step: Steps, states: State, action: State) -> State:
        """Mean of the next state of each row, whose step is ``step[row]``."""
        return self._at(self.state_gain, step, states) * states + (
            self._at(self.gain, step, states) * action
        )

    def transition_kl(self, step: Steps, action: State, reference: State) -> Float[Tensor, " rows"]:
        """KL of each row's transition from the reference's, |difference of means|^2 / (2 std^2).

        In nats. Summed along paths and averaged over them it is the path KL of the discrete chain,
        exactly; ``path_kl`` is that of the SDE which the chain approximates.

        Raises:
            ValueError: the sampler has no density.
        """
        return 0.5 * self._whitened(step, action - reference).square().flatten(1).sum(1)

    def _whitened(self, step: Tensor, shift: Tensor) -> Tensor:
        """A shift of the action, as one of the next state in units of its standard deviation."""
        self._require_density()
        return self._at(self.gain / self.std, step, shift) * shift

    @staticmethod
    def _at(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
        return as_like(table, like)[step].view(-1, *[1] * (like.ndim - 1))

    def _require_density(self) -> None:
        if not self.has_density:
            k = int((self.std == 0).nonzero()[0])
            raise ValueError(
                f"step {k} of this sampler has no noise, hence no transition density; use noise "
                "above 0, and end where some noise is left"
            )

    # -- ctrl.TransitionSolver --------------------------------------------------------------------

    def _index(self, t0: Tensor) -> int:
        """The step that begins at time t0."""
        gaps = (self.grid.nodes[:-1] - float(t0)).abs()
        k = int(gaps.argmin())
        if not gaps[k] < 0.25 * self._resolution:
            raise ValueError(
                f"time {float(t0):g} begins no step of this sampler; simulate on its own grid"
            )
        return k

    @property
    def _resolution(self) -> float:
        """How far apart the times of two nodes are at least."""
        return float(self.grid.steps.min())

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state.

        Raises:
            ValueError: ``t0`` begins no step, or ``action`` has not the states' shape.
        """
        if action.shape != states.shape:
            kind = "score" if self.action == "score" else "denoised state"
            raise ValueError(
                f"action must be a {kind} of the states' shape {list(states.shape)}, "
                f"got {list(action.shape)}"
            )
        k = self._index(t0)
        mean = float(self.state_gain[k]) * states + float(self.gain[k]) * action
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
