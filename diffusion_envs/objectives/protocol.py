"""What an objective is, and what the trainer hands it.

An objective is a frozen dataclass of hyperparameters with pure functions; it holds no network and
no state. There are three kinds, by what they learn from; a method derives from one of them. The
trainer knows neither methods nor kinds: a kind makes its own losses from rows of its own.

    path_steps.PathObjective        steps of sampled paths: policy gradients, adjoint matching, ...
    noised_data.NoisedObjective     data that the model made, re-noised: any sampler will do
    last_steps.BackpropObjective    the last steps of the sampler, differentiated with the reward

What it needs is declared, so that a sampler or a reward that cannot serve is refused at the start.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from ctrl import DeterministicPolicy, Policy
from ctrl.devices import sent
from diffusion_envs.environment import Environment
from diffusion_envs.rewards.rounding import standardised
from diffusion_envs.rollout import Rollout

Values: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(node, states, path) -> V at any states of a node, a row each, differentiable in the states."""


class PreflightError(RuntimeError):
    """What must hold before the first update does not; the message names the likely cause."""


@dataclass(frozen=True, eq=False)
class Update:
    """What an objective makes the losses of one update from.

    Attributes:
        environment: that made the roll-out.
        rollout: to learn from; this process's share of it.
        advantages: applies a function of the whole roll-out, that of all processes; the result has
            a row for each path of all of them.
        values: the value network at any states; None if the objective needs none.
        usual_moves: mean squared move of a coordinate in each step, so far; None if not followed.
        stream: generator of this update, by name, the same on all processes.
        own_stream: of this update and process.
        old_policy: a context within which the environment's policy is the one that sampled; None if
            that is the current one and all of the roll-out is used before the weights change.
        batch: rows that go through the network at once.
        train_steps: of each path that are used; None for all.
    """

    environment: Environment
    rollout: Rollout
    advantages: Callable[[Callable[[Rollout], Tensor]], Tensor]
    values: Values | None
    usual_moves: Float[Tensor, " steps"] | None
    stream: Callable[[str], Generator]
    own_stream: Callable[[str], Generator]
    old_policy: Callable[[], AbstractContextManager[Any]] | None
    batch: int
    train_steps: int | None = None


@runtime_checkable
class Losses(Protocol):
    """Losses of groups of paths, in pieces that fit into memory."""

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Scalars, the sum of which over all processes is the mean loss of these groups' paths.

        Args:
            groups: by their place among those of all processes; there may be none of this one.
            generator: the same on all processes.

        What is logged of them counts once all have been taken: if memory runs out before, they are
        asked for again.
        """
        ...

    def numbers(self) -> dict[str, float]:
        """What was seen while the losses were made, to log."""
        ...

    def check_fresh(self) -> None:
        """Before the first update: what must hold while the policy is the pretrained one.

        Raises:
            PreflightError: it does not.
        """
        ...


@runtime_checkable
class DivisibleLosses(Losses, Protocol):
    """Losses whose pieces can be made smaller, where memory runs out.

    Attributes:
        batch: rows that go through the network at once; can be set.
    """

    batch: int

    def rows_of(self, groups: Int64[Tensor, " groups"]) -> tuple[int, int]:
        """How many rows of these groups are here, and how many of them cannot be taken apart."""
        ...


@dataclass(frozen=True)
class Objective(ABC):
    """A way to improve a policy, as a frozen dataclass of its hyperparameters."""

    learning_rate: float = 1e-3  # of the adapter, AdamW

    needs_density: ClassVar[bool] = False
    needs_reward_gradient: ClassVar[bool] = False
    needs_preferences: ClassVar[bool] = False
    needs_value: ClassVar[bool] = False
    needs_fresh_rollouts: ClassVar[bool] = False  # one optimiser step, then sample anew
    needs_steps: ClassVar[bool] = True  # of the sampler; a black box shows none
    needs_noisy_steps: ClassVar[bool] = False  # an ODE has none
    # its formula takes what the sampler is acted on by for a score; on a flow it is expected data
    needs_scores: ClassVar[bool] = False
    reads_by_row: ClassVar[bool] = (
        False  # of what the roll-out keeps: by ``Rollout.at``, ``chosen``
    )
    chooses_steps: ClassVar[bool] = False  # some steps of each path may do (``train_steps``)
    fits_end: ClassVar[bool] = False  # the value network is also fitted at the final node
    value_sees_denoised: ClassVar[bool] = False  # V is a function of x0_hat; no reward query
    needs_data: ClassVar[bool] = False  # the reward is learned, from data and samples in turns
    learns_std: ClassVar[bool] = False  # its loss has a gradient in the sampler's std

    @property
    def needs_reference(self) -> bool:
        """Whether pretrained scores enter the loss."""
        return True

    @property
    def compares_paths(self) -> bool:
        """Whether they do so along the sampled paths, where their path KL is known then."""
        return False

    @property
    def compares_parts(self) -> bool:
        """Whether each part of the reward is compared by itself."""
        return False

    @property
    def on_policy(self) -> bool:
        """Whether roll-outs are of the trained policy, or of one that follows it: so their KL."""
        return True

    @property
    def group(self) -> int:
        """How many paths in a row share a prompt."""
        return 1

    @property
    def shared_start(self) -> bool:
        """Whether the paths of a group share their starting noise too."""
        return False

    @property
    def reward_per_nat(self) -> float | None:
        """b of the J = E[reward] - b KL that is to be large; None where there is no such J.

        A weight in other units (standard deviations of the reward, squares of predicted noise, a
        learned energy) is none.
        """
        return None if self.needs_data else self.cost_weight or None

    @property
    def cost_weight(self) -> float:
        """Reward per nat that the value function is charged along a path."""
        return 0.0

    @property
    def denoised_rewards(self) -> bool:
        """Whether values start from the reward of the denoised image (one query a node)."""
        return False

    def policy(
        self, mean: Callable[[Tensor, Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
    ) -> Policy:
        """How roll-outs act, with the network's score and the noise level at a time."""
        return DeterministicPolicy(mean)

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates at first: of the adapter, and of the sampler's log std."""
        return self.learning_rate, 0.0

    @property
    def decay(self) -> float:
        """Factor of the learning rates from one update to the next."""
        return 1.0

    def old_decay(self, update: int) -> float:
        """How much the sampling policy keeps of itself after an update; 0: it is the current."""
        return 0.0

    def maintain(  # noqa: B027  # a hook: most methods do nothing
        self,
        value: Any,
        optimiser: torch.optim.Optimizer,
        shown: Callable[[], tuple[Tensor, ...]],
        update: int,
        generator: Generator,
    ) -> None:
        """What is done to the value network after an update; nothing, usually.

        Args:
            value: the network.
            optimiser: of it.
            shown: its arguments at every node of the roll-outs of all processes.
            update: number of this one, from 0.
            generator: the same on all processes.
        """

    @abstractmethod
    def losses_of(self, update: Update) -> Losses:
        """The losses of one update, made before the weights change."""


def per_prompt(
    rewards: Float[Tensor, " paths"], condition: Int64[Tensor, " paths"], std_offset: float
) -> Float[Tensor, " paths"]:
    """(r - mean) / (std + std_offset) within each prompt, by the population standard deviation.

    A prompt with one reward, or with equal ones, gets 0; rounding is not blown up.
    """
    host, condition = rewards.cpu(), condition.cpu()  # read once, not for every prompt
    scaled = torch.zeros_like(host)
    for prompt in condition.unique():
        one = condition == prompt
        scaled[one] = standardised(host[one], std_offset)
    return sent(scaled, rewards.device)
