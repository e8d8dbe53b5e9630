"""Objectives that differentiate the last steps of the sampler with the reward at their end."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from ctrl.devices import as_like, sent
from diffusion_envs.environment import Environment
from diffusion_envs.objectives.protocol import Objective, Update
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True)
class BackpropObjective(Objective):
    """Learns by differentiating the last steps of the sampler with the reward."""

    needs_reward_gradient: ClassVar[bool] = True

    @abstractmethod
    def cut(self, steps: int, generator: Generator) -> tuple[int, int]:
        """First step that is differentiated, and the step after which the image is scored.

        The second is ``steps`` for the finished image; earlier ones show the denoised one.
        """

    @abstractmethod
    def loss(
        self, rewards: Float[Tensor, " paths"], path_kl: Float[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """Loss of each path; both arguments carry gradients.

        The KL is that of the differentiated steps; 0 if it is not charged (``needs_reference``).
        """

    def losses_of(self, update: Update) -> "LastLosses":
        """Losses of the last steps, run again with a gradient."""
        return LastLosses(update.environment, self, update.rollout, batch=update.batch)


class LastLosses:
    """Losses of the end of the sampler, run again with a gradient, with the reward at its end.

    Args:
        environment: that made the roll-out.
        objective: that learns.
        rollout: to learn from: starts and noises of the differentiated steps.
        batch: paths that are differentiated at once.
    """

    def __init__(
        self,
        environment: Environment,
        objective: BackpropObjective,
        rollout: Rollout,
        *,
        batch: int,
    ) -> None:
        self.environment, self.objective, self.rollout = environment, objective, rollout
        self.batch = batch
        self._seen: list[Tensor] = []

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Mean over these groups' paths."""
        size, steps = self.rollout.group, self.rollout.costs.shape[1]
        paths = (groups[:, None] * size + torch.arange(size)).flatten()
        first, last = self.objective.cut(steps, generator)  # in however many pieces
        place = self.rollout.place
        mine = paths[place.has(paths)] - place.paths.start
        if not len(mine):
            return
        seen = list[Tensor]()
        for piece in mine.split(self.batch):
            rewards, nats = self._finish(piece, first, last)
            seen.append(rewards.detach())
            yield self.objective.loss(rewards, nats).sum() / len(paths)
        self._seen += seen

    def rows_of(self, groups: Int64[Tensor, " groups"]) -> tuple[int, int]:
        """The paths of these groups; each can be differentiated alone."""
        size = self.rollout.group
        return int(self.rollout.place.has(groups * size).sum()) * size, 1

    def _finish(self, paths: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Reward and path KL of steps ``first`` to ``last``, differentiable; no KL, no nats."""
        environment, rollout = self.environment, self.rollout
        sampler, condition = environment.steps, rollout.condition[paths]
        paths = sent(paths, environment.device)
        states = rollout.states[paths, first]
        nats = states.new_zeros(len(paths))
        for k in range(first, last):
            action = environment.action(states, k, condition)
            if k == last - 1 and last < rollout.costs.shape[1]:
                states = sampler.denoised_at(k, states, action)
                break
            if self.objective.needs_reference:
                # with its gradient: the state is that of this policy, and the KL changes with it
                with environment.pretrained():
                    reference = environment.action(states, k, condition)
                gap = (action - reference).square().flatten(1).sum(1)
                nats = nats + 0.5 * as_like(sampler.path_kl_gain[k], states) * gap
            gains = (sampler.state_gain, sampler.gain, sampler.std)
            state_gain, gain, std = (as_like(table[k], states) for table in gains)
            states = state_gain * states + gain * action + std * rollout.noises[paths, k]
        return environment.differentiable_reward(states, condition), nats

    def check_fresh(self) -> None:
        """Nothing: no ratio enters."""

    def numbers(self) -> dict[str, float]:
        """Rewards at the differentiated end."""
        return {"differentiated_reward": torch.cat(self._seen).mean().item()}
