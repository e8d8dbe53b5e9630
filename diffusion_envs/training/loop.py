"""The one training loop: sample, judge, improve; whatever the objective, whatever the model.

``Trainer`` holds what changes during a run and knows no objective by name. ``Trainer.updates`` is
an iterator:
logging, pictures, checkpoints and stopping belong to its caller. All noise comes from streams
named by sample, step and update, so the trainer's state is its weights and two counters.
"""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ctrl import Estimate
from ctrl.noise import stream
from diffusion_envs.objectives import Objective, Rollout, Rows
from diffusion_envs.training import parallel
from diffusion_envs.training.environment import Environment, Sample
from diffusion_envs.value import ResidualValue, combine, martingale_loss


class PreflightError(RuntimeError):
    """What must hold before the first update does not; the message names the likely cause."""


class NonFiniteError(FloatingPointError):
    """A gradient is not finite; the weights were not touched."""


@dataclass(frozen=True)
class Schedule:
    """How much of everything an update uses.

    Attributes:
        samples: images an update, over all processes.
        epochs: passes over a roll-out before the next is sampled.
        minibatches: optimiser steps a pass; samples are split among them.
        train_steps: steps of each path that carry a gradient, drawn without replacement; the
        others'
            share is made up by weight, so the gradient stays unbiased. None for all.
        batch: rows (sample, step) that go through the network at once; memory, not mathematics.
        max_gradient_norm: larger gradients are scaled down to it.
        weight_decay: of AdamW on the adapter.
        value_epochs: passes of the value network over the states of a roll-out.
        value_batch: states a step of the value network's optimiser.
        value_learning_rate: of AdamW on the value network.
    """

    samples: int = 32
    epochs: int = 1
    minibatches: int = 1
    train_steps: int | None = None
    batch: int = 64
    max_gradient_norm: float = 1.0
    weight_decay: float = 1e-4
    value_epochs: int = 2
    value_batch: int = 128
    value_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "minibatches", "batch", "value_epochs", "value_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_gradient_norm", "value_learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.train_steps is not None and self.train_steps < 1:
            raise ValueError(f"train_steps must be at least 1 or None, got {self.train_steps}")
        if self.samples % self.minibatches:
            raise ValueError(
                f"samples ({self.samples}) must be a multiple of minibatches ({self.minibatches})"
            )


class Trainer:
    """Improves an adapter, and the value network that helps, one update at a time.

    Args:
        environment: what acts and is judged.
        objective: what to learn from a roll-out.
        schedule: how much of everything.
        parameters: of the adapter.
        accelerator: the processes of this run; each rolls out its share of the samples.
        stream_name: names the noise of the training samples.
    """

    def __init__(
        self,
        environment: Environment,
        objective: Objective,
        schedule: Schedule,
        parameters: list[nn.Parameter],
        *,
        accelerator: Accelerator,
        stream_name: str = "train",
    ) -> None:
        share = accelerator.num_processes * schedule.minibatches
        if schedule.samples % share:
            raise ValueError(
                f"samples ({schedule.samples}) must be a multiple of processes x minibatches "
                f"({share})"
            )
        steps = len(environment.sampler.timesteps)
        if schedule.train_steps is not None and schedule.train_steps > steps:
            raise ValueError(
                f"train_steps ({schedule.train_steps}) must be at most the sampler's steps "
                f"({steps})"
            )
        if objective.needs_density and not environment.sampler.has_density:
            raise ValueError(
                f"{type(objective).__name__} needs a transition density, and a step of this "
                f"sampler has none "
                "(standard deviation 0): use eta > 0 and a scheduler with set_alpha_to_one=False, "
                "or an "
                "objective that draws its actions (ScoreAsActionSampled)"
            )
        if schedule.samples < 2:
            raise ValueError(f"samples must be at least 2 to compare them, got {schedule.samples}")
        self.environment, self.objective, self.schedule = environment, objective, schedule
        self.parameters, self.accelerator, self.stream_name = parameters, accelerator, stream_name
        self.optimiser = torch.optim.AdamW(
            parameters, lr=objective.learning_rate, weight_decay=schedule.weight_decay
        )
        self.value = ResidualValue(
            environment.event[0],
            environment.context.shape[-1],
            generator=stream(environment.seed, "value network"),
        ).to(environment.device)
        self.value_optimiser = torch.optim.AdamW(
            self.value.parameters(), lr=schedule.value_learning_rate, weight_decay=0.01
        )
        self.update = 0  # updates done
        self._seconds_before = 0.0
        self._started = time.monotonic()

    # -- what a checkpoint holds ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next update depends on, as tensors and numbers."""
        return {
            "adapter": [p.detach() for p in self.parameters],
            "optimiser": self.optimiser.state_dict(),
            "value": self.value.state_dict(),
            "value_optimiser": self.value_optimiser.state_dict(),
            "update": self.update,
            "reward_queries": self.environment.reward_queries,
            "network_calls": self.environment.score.calls,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the adapter's tensors are not those of the checkpoint.
        """
        shapes = [list(p.shape) for p in self.parameters]
        if (found := [list(t.shape) for t in state["adapter"]]) != shapes:
            raise ValueError(f"the checkpoint's adapter has shapes {found}, this model's {shapes}")
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, state["adapter"], strict=True):
                parameter.copy_(tensor)
        self.optimiser.load_state_dict(state["optimiser"])
        self.value.load_state_dict(state["value"])
        self.value_optimiser.load_state_dict(state["value_optimiser"])
        self.update = state["update"]
        self.environment.reward_queries = state["reward_queries"]
        self.environment.score.calls = state["network_calls"]
        self._seconds_before, self._started = state["seconds"], time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent on this run, earlier parts included."""
        return self._seconds_before + time.monotonic() - self._started

    # -- one update -------------------------------------------------------------------------------

    def updates(self, total: int) -> Iterator[dict[str, Any]]:
        """Improve until ``total`` updates are done; yield each one's numbers."""
        while self.update < total:
            yield self.step()

    def step(self) -> dict[str, Any]:
        """One update: sample, judge, improve the adapter, then the value network.

        Raises:
            PreflightError: something that must hold before the first update does not.
            NonFiniteError: a gradient is not finite; no weight was changed by it.
        """
        sample = self._sample()
        rollout = sample.rollout
        if self.update == 0:
            self._preflight(rollout)
        numbers = self._improve_adapter(rollout)
        if sample.denoised_rewards is not None:
            numbers["value_loss"] = self._improve_value(rollout, sample.denoised_rewards)
        self.update += 1
        rewards = parallel.gather(rollout.rewards, self.accelerator)
        nats = parallel.gather(rollout.costs.sum(1), self.accelerator)
        return {
            "update": self.update,
            "reward": Estimate.of(rewards),
            "path_kl": Estimate.of(nats),
            "reward_queries": self._over_processes(self.environment.reward_queries),
            "network_calls": self._over_processes(self.environment.score.calls),
            "seconds": self.seconds,
            **numbers,
            "memory": _peak_memory(self.environment.device),
        }

    def _sample(self) -> Sample:
        environment, samples = self.environment, self.schedule.samples
        share = samples // self.accelerator.num_processes
        first = self.update * samples + self.accelerator.process_index * share
        indices = range(first, first + share)
        # Prompts in turn, so that every roll-out has each of them equally often.
        condition = torch.tensor([i % len(environment.prompts) for i in indices])
        sample = environment.sample(
            self.objective.policy,
            indices,
            condition,
            stream=self.stream_name,
            denoised=self.objective.needs_value,
        )
        if sample.denoised_rewards is None:
            return sample
        if self.update == 0:
            self.value.calibrate(parallel.gather(sample.rollout.rewards, self.accelerator))
        with torch.no_grad():
            values = self._values(sample.rollout, sample.denoised_rewards)
        return dataclasses.replace(
            sample, rollout=dataclasses.replace(sample.rollout, values=values)
        )

    def _improve_adapter(self, rollout: Rollout) -> dict[str, float]:
        schedule, paths = self.schedule, len(rollout.rewards)
        steps = rollout.costs.shape[1]
        kept = schedule.train_steps or steps
        advantages = self._advantages(rollout)
        ratios: list[Tensor] = []
        clipped: list[Tensor] = []
        norm = torch.zeros(())
        for epoch in range(schedule.epochs):
            shuffle = stream(
                self.environment.seed,
                self.stream_name,
                "rows",
                self.update,
                epoch,
                self.accelerator.process_index,
            )
            order = torch.randperm(paths, generator=shuffle)
            chosen = torch.rand(paths, steps, generator=shuffle).argsort(1)[:, :kept]
            for part in order.chunk(schedule.minibatches):
                which = torch.stack(
                    [part.repeat_interleave(kept), chosen[part].flatten()], dim=1
                )  # [rows, (path, step)]
                self.optimiser.zero_grad(set_to_none=True)
                for piece in which.split(schedule.batch):
                    rows = self._rows(rollout, advantages, piece)
                    losses = self.objective.loss(rows)
                    # rows are a uniform draw from paths x steps: mean x steps estimates the path's
                    # sum
                    (losses.sum() * steps / len(which)).backward()
                    with torch.no_grad():
                        log_ratio = self.objective.log_ratio(rows).detach()
                        ratios.append(log_ratio.exp())
                        clipped.append(log_ratio.abs() > self.objective.half_width(rows))
                parallel.average_gradients(self.parameters, self.accelerator)
                norm = nn.utils.clip_grad_norm_(self.parameters, schedule.max_gradient_norm)
                if not torch.isfinite(norm):
                    raise NonFiniteError(
                        f"the gradient's norm is {norm.item()} at update {self.update + 1}; no "
                        f"weight "
                        "was changed. Lower learning_rate or guidance, or use float32"
                    )
                self.optimiser.step()
        ratio = torch.cat(ratios)
        return {
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "clipped_fraction": torch.cat(clipped).float().mean().item(),
            "gradient_norm": norm.item(),
        }

    def _advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """The objective's, with batch statistics over all processes."""
        world = self.accelerator
        if world.num_processes == 1:
            return self.objective.advantages(rollout)
        paths = len(rollout.rewards)
        whole = dataclasses.replace(
            rollout,
            costs=parallel.gather(rollout.costs, world),
            rewards=parallel.gather(rollout.rewards, world),
            values=None if rollout.values is None else parallel.gather(rollout.values, world),
            condition=parallel.gather(rollout.condition.to(rollout.rewards.device), world),
        )
        first = world.process_index * paths
        return self.objective.advantages(whole)[first : first + paths]

    def _rows(self, rollout: Rollout, advantages: Tensor, which: Int64[Tensor, "rows 2"]) -> Rows:
        environment, sampler = self.environment, self.environment.sampler
        path, step = which.unbind(1)
        context = environment.context[rollout.condition[path]].to(environment.device)
        timesteps = sampler.timesteps.to(environment.device)[step]
        mean = environment.score(rollout.states[path, step], timesteps, context)

        def at(table: Tensor) -> Tensor:
            return table.to(mean)[step]

        return Rows(
            mean=mean,
            old_mean=rollout.means[path, step],
            reference_score=rollout.reference_scores[path, step],
            action=rollout.actions[path, step],
            noise=rollout.noises[path, step],
            advantage=advantages[path, step].to(mean),
            step_size=at(rollout.step_sizes),
            horizon=rollout.step_sizes.sum().to(mean),
            score_gain=at(sampler.score_gain),
            std=at(sampler.std),
            action_std=self.objective.action_std(at(sampler.sigma)),
            kl_factor=sampler.kl_factor,
        )

    # -- value network ----------------------------------------------------------------------------

    def _values(
        self, rollout: Rollout, denoised_rewards: Float[Tensor, "paths nodes"]
    ) -> Float[Tensor, "paths nodes"]:
        paths, nodes = denoised_rewards.shape
        times = self.environment.sampler.noising_times.to(denoised_rewards)
        residual = self.value(
            times.repeat(paths),
            rollout.states.flatten(0, 1),
            self._pooled(rollout).repeat_interleave(nodes, 0),
        ).view(paths, nodes)
        values = combine(times, denoised_rewards, residual)
        return torch.cat([values[:, :-1], rollout.rewards[:, None]], dim=1)  # V = r at the end

    def _improve_value(self, rollout: Rollout, denoised_rewards: Tensor) -> float:
        """Martingale loss of the realised returns to go; returns the loss before the last pass."""
        environment, schedule = self.environment, self.schedule
        kl_weight = getattr(self.objective, "kl_weight", 0.0)
        to_go = rollout.costs.flip(1).cumsum(1).flip(1)
        returns = rollout.rewards[:, None] - kl_weight * to_go
        returns = torch.cat([returns, rollout.rewards[:, None]], dim=1)
        per_batch = max(1, schedule.value_batch // returns.shape[1])
        total, count = 0.0, 0
        for epoch in range(schedule.value_epochs):
            shuffle = stream(
                environment.seed,
                self.stream_name,
                "value rows",
                self.update,
                epoch,
                self.accelerator.process_index,
            )
            total, count = 0.0, 0
            for part in torch.randperm(len(returns), generator=shuffle).split(per_batch):
                values = self._values(_paths(rollout, part), denoised_rewards[part])
                losses = martingale_loss(values, returns[part], rollout.step_sizes)
                self.value_optimiser.zero_grad()
                (losses.mean() / rollout.step_sizes.sum() / self.value.scale.square()).backward()
                parameters = list(self.value.parameters())
                parallel.average_gradients(parameters, self.accelerator)
                norm = nn.utils.clip_grad_norm_(parameters, 1.0)
                if not torch.isfinite(norm):
                    raise NonFiniteError(f"the value network's gradient norm is {norm.item()}")
                self.value_optimiser.step()
                total += losses.detach().sum().item() / rollout.step_sizes.sum().item()
                count += len(part)
        return total / count

    def _pooled(self, rollout: Rollout) -> Float[Tensor, "paths width"]:
        return self.environment.context[rollout.condition].mean(1).to(self.environment.device)

    # -- checks -----------------------------------------------------------------------------------

    def _preflight(self, rollout: Rollout) -> None:
        """Before the first update: ratio 1, KL 0 of a fresh adapter, enough memory to go on."""
        paths, steps = rollout.costs.shape
        rows = torch.cartesian_prod(torch.arange(min(paths, 4)), torch.arange(steps))
        advantages = rollout.costs.new_zeros(paths, steps)
        # Roll-out and update evaluate the network in batches of other sizes. Relative rounding of a
        # score shifts a decision by that share of the score's own shift, in units of its spread.
        relative = 1e-5 if self.environment.score.precision == torch.float32 else 3e-2
        worst, allowed = 0.0, 0.0
        with torch.no_grad():
            for piece in rows.split(self.schedule.batch):
                seen = self._rows(rollout, advantages, piece)
                size = seen.old_mean.flatten(1).norm(dim=1)
                spread = torch.where(
                    seen.action_std > 0, seen.action_std, seen.std / seen.score_gain
                )
                worst = max(worst, self.objective.log_ratio(seen).abs().max().item())
                allowed = max(allowed, relative * (size / spread.abs()).max().item())
        if not worst <= allowed:
            raise PreflightError(
                f"before the first update the log-ratio of new to old policy must be 0 up to "
                f"{allowed:.2g}, "
                f"but is {worst:.3g}: roll-out and update see different networks. Usual causes: "
                f"dropout "
                "or train mode, reduced precision with different batch sizes, an adapter that was "
                "changed"
            )
        nats = rollout.costs.sum(1).max().item()
        if not 0 <= nats <= max(1e-6, allowed**2):
            raise PreflightError(
                f"a fresh adapter must equal the pretrained model, but its path KL is {nats:.3g} "
                f"nats"
            )

    def _over_processes(self, count: int) -> int:
        local = torch.tensor([count], device=self.environment.device)
        return int(parallel.gather(local, self.accelerator).sum())


def _paths(rollout: Rollout, rows: Tensor) -> Rollout:
    """The same roll-out, some of its paths only."""
    chosen = {
        f.name: value[rows]
        for f in dataclasses.fields(rollout)
        if isinstance(value := getattr(rollout, f.name), Tensor) and f.name != "step_sizes"
    }
    return dataclasses.replace(rollout, **chosen)


def _peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: of the GPU if there is one, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
