"""The critic: a value network that learns from roll-outs what is to come.

It starts from the reward of the denoised image where the objective asks for that, and fits the
martingale loss of realised returns (``diffusion_envs.training.value_network``).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ctrl.devices import as_like, sent
from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import Objective
from diffusion_envs.rollout import Rollout
from diffusion_envs.training import memory, parallel
from diffusion_envs.training.phase import phase
from diffusion_envs.training.refusal import NonFiniteError
from diffusion_envs.training.update_size import UpdateSize
from diffusion_envs.training.value_network import (
    Weights,
    combine,
    martingale_loss,
    value_network,
)


class Critic:
    """A value network with its optimiser: what it is shown, what it says, how it learns.

    Args:
        environment: whose states it sees.
        objective: what it is asked for.
        size: how long it learns, and how fast.
        accelerator: the processes of this run.
        stream_name: names the order in which it sees the states.
        weights: of the denoised image's reward and of the network, by noising time;
            ``value_network.skip_weights`` if not given.

    Attributes:
        batch: paths that the network sees at once; fewer from then on where memory runs out.
    """

    def __init__(
        self,
        environment: Environment,
        objective: Objective,
        size: UpdateSize,
        accelerator: Accelerator,
        stream_name: str,
        weights: Weights | None = None,
    ) -> None:
        self.environment, self.objective, self.size = environment, objective, size
        self.accelerator, self.stream_name = accelerator, stream_name
        self.weights, self.batch = weights, size.samples
        self.network = value_network(
            environment.event,
            environment.features_of(torch.tensor([0])).shape[-1],
            generator=stream(environment.seed, "value network"),
        ).to(environment.device)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=size.value_learning_rate, weight_decay=0.01
        )

    learns_first = False  # the policy learns by what the critic knew when it acted
    usual_moves = None  # not followed

    def calibrate(self, rewards: Float[Tensor, " n"]) -> None:
        """Set the units of the answer, from the first rewards.

        Raises:
            NonFiniteError: they have none.
        """
        if not bool(rewards.isfinite().all()):  # of all processes, on each
            raise NonFiniteError("the first rewards are not finite; nothing was learned from them")
        self.network.calibrate(rewards)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: network and optimiser."""
        return {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])

    def values(
        self,
        rollout: Rollout,
        denoised_rewards: Float[Tensor, "paths nodes"] | None,
    ) -> Float[Tensor, "paths nodes"]:
        """V at every node: c_skip r(x0_hat) + c_out F, or F alone where nothing was denoised."""
        times = as_like(self.environment.steps.noising_times, rollout.rewards)
        residual = self.network(*self.shown(rollout)).view(rollout.states.shape[:2])
        values = residual
        if denoised_rewards is not None:
            values = combine(times, denoised_rewards, residual, self.weights)
        return torch.cat([values[:, :-1], rollout.rewards[:, None]], dim=1)  # V = r at the end

    @torch.no_grad()
    def values_along(
        self, rollout: Rollout, denoised_rewards: Float[Tensor, "paths nodes"] | None
    ) -> Float[Tensor, "paths nodes"] | None:
        """The same of a whole roll-out, without a gradient, in pieces that fit into memory."""
        rows = torch.arange(len(rollout.rewards))

        def values(piece: slice) -> Tensor:
            some = rows[piece]
            if len(some) == len(rows):
                return self.values(rollout, denoised_rewards)
            seen = None if denoised_rewards is None else denoised_rewards[piece]
            return self.values(rollout.chosen(some), seen)

        return torch.cat(memory.in_pieces(values, self, "the value network", rows=len(rows)))

    def shown(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is shown: (noising time, state, prompt) of every node."""
        rollout, sampler = rollout.here(), self.environment.steps
        paths, nodes = rollout.states.shape[:2]
        states, times = rollout.states, as_like(sampler.noising_times, rollout.rewards)
        if self.objective.value_sees_denoised:
            guesses = sampler.denoised(states[:, :-1], rollout.means)
            states = torch.cat([guesses, states[:, -1:]], dim=1)
        features = self.environment.features_of(rollout.condition).repeat_interleave(nodes, 0)
        return times.repeat(paths), states.flatten(0, 1), features

    def at(self, rollout: Rollout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(node, states, path) -> the network's value of each row, differentiable in the states."""
        times = self.environment.steps.noising_times
        features = self.environment.features_of(rollout.condition)

        def value(node: Tensor, states: Tensor, path: Tensor) -> Tensor:
            return self.network(as_like(times, states)[node], states, features[path])

        return value

    @phase("value network")
    def improve(
        self,
        rollout: Rollout,
        denoised_rewards: Float[Tensor, "paths nodes"] | None,
        update: int,
    ) -> dict[str, float]:
        """Learn from a roll-out, then do what the objective asks for after an update.

        Returns:
            The loss in the last pass.

        Raises:
            NonFiniteError: a gradient is not finite; no weight was changed by it.
        """
        loss = self._fit(rollout, denoised_rewards, update)
        self.objective.maintain(
            self.network,
            self.optimiser,
            lambda: tuple(parallel.gather(x, self.accelerator) for x in self.shown(rollout)),
            update,
            stream(self.environment.seed, self.stream_name, "maintain", update),
        )
        return {"value_loss": loss}

    def _fit(
        self,
        rollout: Rollout,
        denoised_rewards: Float[Tensor, "paths nodes"] | None,
        update: int,
    ) -> float:
        """Martingale loss of the realised returns to go; returns the loss in the last pass."""
        environment, size = self.environment, self.size
        kl_weight = self.objective.cost_weight
        to_go = rollout.costs.flip(1).cumsum(1).flip(1)
        returns = rollout.rewards[:, None].expand_as(to_go)
        if kl_weight > 0:  # costs are not known where nothing charges them
            returns = returns - kl_weight * to_go
        returns = torch.cat([returns, rollout.rewards[:, None]], dim=1)
        per_batch, place = max(1, size.value_batch // returns.shape[1]), rollout.place
        total, count = rollout.rewards.new_zeros(()), 0
        for epoch in range(size.value_epochs):
            # batches are of the paths of all processes, each of which has some of their rows
            shuffle = stream(environment.seed, self.stream_name, "value rows", update, epoch, 0)
            total, count = torch.zeros_like(total), 0
            everyones = torch.randperm(place.of * place.size, generator=shuffle)
            for batch in everyones.split(per_batch):
                part = batch[place.has(batch)] - place.paths.start
                losses = self._differentiated(
                    rollout, denoised_rewards, returns, part, of=len(batch)
                )
                parameters = list(self.network.parameters())
                parallel.add_gradients(parameters, self.accelerator)
                norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
                if not math.isfinite(norm):
                    raise NonFiniteError(f"the value network's gradient norm is {norm}")
                self.optimiser.step()
                total += losses.sum() / rollout.step_sizes.sum()
                count += len(part)
        return total.item() / count

    def _differentiated(
        self,
        rollout: Rollout,
        denoised_rewards: Float[Tensor, "paths nodes"] | None,
        returns: Float[Tensor, "paths nodes"],
        part: Int64[Tensor, " part"],
        *,
        of: int,
    ) -> Float[Tensor, " part"]:
        """Losses of some paths; their sum over ``of`` has its gradient in the network then."""
        seen = list[Tensor]()

        def clear() -> None:
            self.optimiser.zero_grad()
            seen.clear()

        def loss(piece: slice) -> Tensor:
            losses = self._losses(rollout, denoised_rewards, returns, part[piece])
            seen.append(losses.detach())
            mean = losses.sum() / of / rollout.step_sizes.sum()
            return mean / self.network.scale.square()

        if not len(part):  # of several processes one may have none of them
            clear()
            return returns.new_zeros(0)
        memory.accumulated(loss, self, "the value network's update", rows=len(part), clear=clear)
        return torch.cat(seen)

    def _losses(
        self,
        rollout: Rollout,
        denoised_rewards: Float[Tensor, "paths nodes"] | None,
        returns: Float[Tensor, "paths nodes"],
        part: Int64[Tensor, " part"],
    ) -> Float[Tensor, " part"]:
        """The martingale loss of some paths, and of the end where the objective asks for it."""
        chosen, part = rollout.chosen(part), sent(part, returns.device)
        seen = None if denoised_rewards is None else denoised_rewards[part]
        losses = martingale_loss(self.values(chosen, seen), returns[part], rollout.step_sizes)
        if self.objective.fits_end:
            last = torch.full_like(part, returns.shape[1] - 1)
            end = self.at(rollout)(last, chosen.states[:, -1], part)
            gap = end - returns[part, -1]
            losses = losses + rollout.step_sizes[-1] * gap.square()
        return losses
