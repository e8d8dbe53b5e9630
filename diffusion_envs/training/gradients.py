"""The gradient of an update: in pieces that fit, summed over the processes, finite or refused."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctrl.devices import sent
from diffusion_envs.environment import Environment
from diffusion_envs.objectives.protocol import DivisibleLosses, Losses
from diffusion_envs.rollout import Rollout, Share
from diffusion_envs.training import memory, parallel, sharded
from diffusion_envs.training.loss_scale import LossScale
from diffusion_envs.training.optimisers.protocol import Stepper
from diffusion_envs.training.refusal import NonFiniteError


class Gradients:
    """Gradients of an objective's losses in the parameters that it trains.

    Args:
        environment: whose network is differentiated.
        parameters: in which.
        optimiser: of these, that clears their gradients.
        accelerator: the processes of this run.
        batch: most rows of the losses at once.
        asks_reward: whether a loss asks the reward for its gradient, which may fail.

    Attributes:
        batch: the same; fewer once memory has run out.
        loss_scale: by which losses are multiplied before they are differentiated.
    """

    def __init__(
        self,
        environment: Environment,
        parameters: list[nn.Parameter],
        optimiser: Stepper,
        accelerator: Accelerator,
        batch: int,
        *,
        asks_reward: bool,
    ) -> None:
        self.environment, self.parameters, self.optimiser = environment, parameters, optimiser
        self.accelerator, self.batch, self._asks_reward = accelerator, batch, asks_reward
        self.loss_scale = LossScale.of(environment.model.precision)
        self._shards = sharded.shards_of(environment.model)

    def of(
        self,
        losses: Losses,
        part: Tensor,
        shuffle: torch.Generator,
        rollout: Rollout,
        *,
        update: int,
        most: float,
        watched: Mapping[str, Tensor],
    ) -> tuple[float, dict[str, float]]:
        """Put the gradient of some groups' losses, that of all processes, into the parameters.

        Args:
            losses: of the roll-out.
            part: the groups, by their place among those of all processes.
            shuffle: what the losses draw from, the same on all processes.
            rollout: that they are of.
            update: its number, for messages.
            most: norm to which the gradient is clipped.
            watched: what must be finite though no gradient may see it, by its name in words.

        Returns:
            The norm before it was clipped, and the objective's numbers so far.

        Raises:
            NonFiniteError: the gradient or what is watched is not finite, on any process; the
                parameters are as they were.
            MemoryLimitError: memory runs out however few rows go through the network at once.
        """
        drawn = shuffle.get_state()
        while True:  # once, unless float16 overflows
            shuffle.set_state(drawn)
            with self._differentiating():
                self.differentiate(losses, part, shuffle, rollout.place)
            seen = self._spoil(losses, part, watched)
            parallel.add_gradients(self.parameters, self.accelerator)
            self.loss_scale.divide(self.parameters)
            norm = sharded.clip_gradients(self.parameters, most)
            if math.isfinite(norm):
                self.loss_scale.keep()
                return norm, seen
            self._shrink_loss_scale(norm, update, _why(seen, watched))

    def differentiate(
        self, losses: Losses, part: Tensor, shuffle: torch.Generator, share: Share
    ) -> None:
        """This process's part of it, in as many pieces as fit into memory.

        It waits for no other process, but where weights are sharded: then no piece is halved.
        """
        drawn, spent = shuffle.get_state(), self.environment.spent

        def attempt() -> None:
            shuffle.set_state(drawn)
            self.environment.spent = spent
            self.optimiser.zero_grad(set_to_none=True)
            for loss in self.loss_scale.scaled(self._in_step(losses, part, shuffle, share)):
                loss.backward()

        if self._shards.networks:
            with memory.once("the update of sharded weights"):
                return attempt()
        if not isinstance(losses, DivisibleLosses):
            return attempt()
        rows, least = losses.rows_of(part)
        memory.retried(attempt, losses, "the update", rows=rows, least=least)
        self.batch = losses.batch
        return None

    def _differentiating(self) -> AbstractContextManager[Any]:
        """Within this context losses may ask the reward for its gradient, and it may fail."""
        return parallel.failing_together(self.accelerator) if self._asks_reward else nullcontext()

    def _in_step(
        self, losses: Losses, part: Tensor, generator: torch.Generator, share: Share
    ) -> Iterator[Tensor]:
        """This process's losses of some groups; of sharded weights as many as other processes'."""
        drawn = generator.get_state()

        def spare() -> Tensor:
            spent, own = self.environment.spent, torch.tensor([share.groups.start])
            # what the objective draws for all of a part, it draws here too
            loss = next(losses.losses(own, torch.Generator().set_state(drawn)))
            self.environment.spent = spent
            return loss

        return self._shards.in_step(iter(losses.losses(part, generator)), spare)

    def _spoil(
        self, losses: Losses, part: Tensor, watched: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Make a gradient NaN where a number to log is not finite; the objective's numbers so far.

        Then all processes see it, and refuse it together. A ratio of policies may overflow where
        the gradient, clipped, does not. The device is not waited for, but for those numbers.
        """
        here = not isinstance(losses, DivisibleLosses) or losses.rows_of(part)[0] > 0
        seen = losses.numbers() if here else {}
        fine = torch.stack([value.isfinite().all() for value in watched.values()]).all()
        if not all(math.isfinite(value) for value in seen.values()):
            fine = torch.zeros_like(fine)
        first = next((p for p in self.parameters if p.grad is not None), self.parameters[0])
        if first.grad is not None and not sharded.is_shard(first):
            first.grad = torch.where(sent(fine, first.device), first.grad, math.nan)
        elif not fine:
            first.grad = torch.full_like(first, math.nan)
        return seen

    def _shrink_loss_scale(self, norm: float, update: int, why: str) -> None:
        """After a gradient that is not finite: the same rows again, with a smaller factor.

        Args:
            norm: of the gradient.
            update: its number.
            why: in words, where this process knows it.

        Raises:
            NonFiniteError: the factor is not to blame, on any of the processes.
        """
        finite = self.loss_scale.finite_losses.to(self.environment.device)
        everyones = parallel.total(finite, self.accelerator)
        if bool(everyones == self.accelerator.num_processes) and self.loss_scale.shrink():
            return
        raise NonFiniteError(
            f"the gradient's norm is {norm} at update {update}{why}"
            + (", and not by the scale of the loss" if self.loss_scale.used else "")
            + "; no weight was changed by it. Lower learning_rate or guidance, or use float32"
        )


def _why(seen: Mapping[str, float], watched: Mapping[str, Tensor]) -> str:
    """Which of these numbers is not finite, in words; none, if a gradient alone is not."""
    bad = [f"{name} is {value}" for name, value in seen.items() if not math.isfinite(value)]
    for name, value in watched.items():
        if not bool(value.isfinite().all()):
            bad.append(f"{name} is not finite")
    return "".join(f", as {words}" for words in bad[:1])
