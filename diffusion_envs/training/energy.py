"""The critic of methods that learn the reward from data: one network, energy and value.

It is trained by the steps (1) and (2) of ``objectives.dxmi_from_data``, before the policy's step.

Sources      Yoon et al. 2024, arXiv 2407.00626, and the authors' code for CIFAR-10, after Du &
             Mordatch 2019, "Implicit generation and modeling with energy-based models", arXiv
             1903.08689, for the network of pictures.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ctrl.devices import as_like, read, sent
from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import Objective
from diffusion_envs.objectives.dxmi_from_data import LearnedEnergy, energy_loss, next_cost
from diffusion_envs.objectives.protocol import Values
from diffusion_envs.rollout import Rollout
from diffusion_envs.training import memory, parallel
from diffusion_envs.training.phase import phase
from diffusion_envs.training.refusal import NonFiniteError
from diffusion_envs.training.update_size import UpdateSize


@runtime_checkable
class TrainingData(Protocol):
    """Data without noise, as states of the model: pictures in [-1, 1] for models in pixel space."""

    def draw(self, n: int, generator: Generator) -> Float[Tensor, " n *event"]:
        """So many of them at random, float32."""
        ...


class EnergyOfPictures(nn.Module):
    """E of pictures: a convolution, six residual blocks, a sum over pixels, a learned scale.

    Args:
        channels: of a picture.
        width: of the first blocks; of the later ones twice that. 128 as published, where there are
            5.3 M parameters.
        generator: draws the initial weights.
    """

    def __init__(self, channels: int, *, width: int, generator: Generator) -> None:
        super().__init__()
        wide = 2 * width
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                _Block(width, width, halve=True),
                _Block(width, width),
                _Block(width, wide, halve=True),
                _Block(wide, wide),
                _Block(wide, wide, halve=True),
                _Block(wide, wide),
            ]
        )
        self.leave = nn.Linear(wide, 1)
        self.scale = nn.Linear(1, 1)
        _initialise(self, generator)

    def forward(self, states: Float[Tensor, "n channels h w"]) -> Float[Tensor, " n"]:
        """Energies; small for what looks like data."""
        x = functional.leaky_relu(self.enter(states), 0.2)
        for block in self.blocks:
            x = block(x)
        return self.scale(self.leave(functional.relu(x).sum((2, 3))))[:, 0]


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, *, halve: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1)
        changes = halve or width_in != width_out
        self.skip = nn.Conv2d(width_in, width_out, 1, bias=False) if changes else nn.Identity()
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(functional.leaky_relu(self.first(x), 0.2))
        x = branch + self.skip(x)
        if self.halve:
            x = functional.avg_pool2d(x, 2)
        return functional.leaky_relu(x, 0.2)


class EnergyOfVectors(nn.Module):
    """E of vectors: three layers and a learned scale.

    Args:
        dim: of a vector.
        width: of the hidden layers.
        generator: draws the initial weights.
    """

    def __init__(self, dim: int, *, width: int, generator: Generator) -> None:
        super().__init__()
        self.enter, self.hidden = nn.Linear(dim, width), nn.Linear(width, width)
        self.leave, self.scale = nn.Linear(width, 1), nn.Linear(1, 1)
        _initialise(self, generator)

    def forward(self, states: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Energies; small for what looks like data."""
        x = functional.leaky_relu(self.enter(states), 0.2)
        x = functional.leaky_relu(self.hidden(x), 0.2)
        return self.scale(self.leave(x))[:, 0]


def energy_network(event: tuple[int, ...], *, width: int, generator: Generator) -> nn.Module:
    """The energy network for states of this shape: pictures or vectors.

    Raises:
        ValueError: states are neither [channels, height, width] nor [dim].
    """
    if len(event) == 3:
        return EnergyOfPictures(event[0], width=width, generator=generator)
    if len(event) == 1:
        return EnergyOfVectors(event[0], width=width, generator=generator)
    raise ValueError(f"states must be [channels, height, width] or [dim], got {list(event)}")


def _initialise(network: nn.Module, generator: Generator) -> None:
    """torch's initial weights, from a generator."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


class EnergyCritic:
    """An energy network that learns from data and samples, and is minus the value everywhere.

    Args:
        environment: whose samples it sees.
        objective: how it learns.
        size: how fast, and how often.
        accelerator: the processes of this run.
        stream_name: names the draws of data.
        data: what the samples should look like.

    Attributes:
        usual_moves: running average of a coordinate's squared move in every step.
        batch: samples that the network sees at once; fewer from then on where memory runs out.
    """

    learns_first = True  # before the policy

    def __init__(
        self,
        environment: Environment,
        objective: Objective,
        size: UpdateSize,
        accelerator: Accelerator,
        stream_name: str,
        data: TrainingData,
    ) -> None:
        assert isinstance(objective, LearnedEnergy)  # needs_data
        self.batch = size.samples
        self.environment, self.objective, self.size = environment, objective, size
        self.accelerator, self.stream_name, self.data = accelerator, stream_name, data
        self.network = energy_network(
            environment.event,
            width=objective.energy_width,
            generator=stream(environment.seed, "energy network"),
        ).to(environment.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=size.value_learning_rate)
        alpha_bar = environment.steps.alpha.square()
        kept = alpha_bar[:-1] / alpha_bar[1:]
        self.usual_moves = sent((1 - kept).float(), environment.device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: network, optimiser, usual moves."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "usual_moves": self.usual_moves,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.usual_moves = sent(state["usual_moves"], self.environment.device)

    def calibrate(self, rewards: Tensor) -> None:
        """Nothing: the energy has its own units."""

    def values_along(self, rollout: Rollout, denoised_rewards: Tensor | None) -> None:
        """None: losses ask for the value at states of their own (``at``)."""

    def at(self, rollout: Rollout) -> Values:
        """(node, states, path) -> minus the energy of each row, differentiable in the states."""

        def value(node: Tensor, states: Tensor, path: Tensor) -> Tensor:
            frozen = {name: p.detach() for name, p in self.network.named_parameters()}
            return -functional_call(self.network, frozen, (states,))

        return value

    @phase("value network")
    def improve(
        self, rollout: Rollout, denoised_rewards: Tensor | None, update: int
    ) -> dict[str, float]:
        """Steps (1) and (2) on a roll-out, and the running average of its moves.

        Returns:
            Mean energies of data and samples, the energy's loss, the value's mean loss.

        Raises:
            NonFiniteError: a gradient is not finite; no weight was changed by it.
            ValueError: what is drawn are no states of the model.
        """
        moves = rollout.states.diff(dim=1).square().flatten(2).mean((0, 2))
        decay = self.objective.move_decay
        moves = parallel.total(rollout.place.weight * moves, self.accelerator)
        # of paths that are not finite, on any process, nothing is learned: the gradient is NaN
        fine = torch.where(moves.isfinite().all(), 1.0, math.nan)
        told: dict[str, Tensor] = {}
        for epoch in range(self.size.value_epochs):
            told = self._energy_step(rollout, update, epoch, fine)
            steps = range(len(rollout.step_sizes))
            losses = [self._value_step(rollout, k) for k in reversed(steps)]
            told["value_loss"] = torch.stack(losses).mean()
        self.usual_moves = decay * self.usual_moves + (1 - decay) * moves
        return dict(zip(told, read(*told.values()), strict=True))  # read once

    def _energy_step(
        self, rollout: Rollout, update: int, epoch: int, fine: Tensor
    ) -> dict[str, Tensor]:
        samples = rollout.states[:, -1]
        place = rollout.place
        # all that all processes need, so that theirs together are those of a single one
        generator = stream(self.environment.seed, self.stream_name, "data", update, epoch)
        wanted = (place.of * place.size, *samples.shape[1:])
        drawn = as_like(place.own(_checked(self.data.draw(wanted[0], generator), wanted)), samples)
        seen = list[tuple[Tensor, Tensor]]()

        def loss(piece: slice) -> Tensor:
            if piece.start == 0:
                seen.clear()
            # both at once, as one batch
            both = torch.cat([drawn[piece], samples[piece]])
            of_data, of_samples = self.network(both).chunk(2)
            seen.append((of_data.detach(), of_samples.detach()))
            return fine * energy_loss(of_data, of_samples, self.objective.square_weight)

        told = self._descend(loss, len(samples), place.weight)
        of_data, of_samples = (torch.cat(each).mean() for each in zip(*seen, strict=True))
        return {"energy_of_data": of_data, "energy_of_samples": of_samples, "energy_loss": told}

    def _value_step(self, rollout: Rollout, step: int) -> Tensor:
        cost = next_cost(step, len(rollout.step_sizes), self.objective.time_cost)

        def loss(piece: slice) -> Tensor:
            with torch.no_grad():
                target = self.network(rollout.states[piece, step + 1]) + cost
            return functional.mse_loss(self.network(rollout.states[piece, step]), target)

        return self._descend(loss, len(rollout.rewards), rollout.place.weight)

    def _descend(self, loss: Callable[[slice], Tensor], rows: int, weight: float) -> Tensor:
        """One step down the mean loss of all processes' rows, of which so many are here.

        Args:
            loss: mean of some rows.
            rows: that are here.
            weight: of the mean over these.

        Returns:
            The mean over these, before the step.
        """
        parameters, means = list(self.network.parameters()), list[Tensor]()

        def clear() -> None:
            self.optimiser.zero_grad()
            means.clear()

        def weighed(piece: slice) -> Tensor:
            part = loss(piece) * ((piece.stop - piece.start) / rows if rows else 1.0)
            means.append(part.detach())
            return weight * part

        memory.accumulated(weighed, self, "the energy's update", rows=rows, clear=clear)
        mean = torch.stack(means).sum()
        parallel.add_gradients(parameters, self.accelerator)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the energy network's gradient norm is {norm}")
        self.optimiser.step()
        return mean


def _checked(drawn: Any, shape: tuple[int, ...]) -> Tensor:
    """States that were drawn.

    Raises:
        ValueError: they have another shape, or are not finite.
    """
    if not isinstance(drawn, Tensor) or tuple(drawn.shape) != shape:
        got = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise ValueError(
            f"data.draw({shape[0]}) must return states of the model, {list(shape)}, got {got}"
        )
    if not bool(torch.isfinite(drawn).all()):
        raise ValueError("data.draw must return finite states, got NaN or infinity")
    return drawn
