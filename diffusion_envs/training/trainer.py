"""The one training loop: sample, advantages, losses, optimiser; whatever objective and model.

``Trainer`` holds what changes during a run and knows no objective by name or kind.
``Trainer.updates`` is an iterator: logs, pictures, checkpoints and stopping belong to its caller.
All noise comes from streams named by sample, step and update, so the trainer's state is its weights
and a few counters.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctrl import Estimate
from ctrl.devices import sent
from ctrl.noise import stream
from diffusion_envs.environment import Environment, Sample
from diffusion_envs.objectives import Objective
from diffusion_envs.objectives.protocol import Losses, PreflightError, Update
from diffusion_envs.preferences import FromReward, MissingChoicesError, Preference, compare
from diffusion_envs.rewards import Counting, Reward
from diffusion_envs.rollout import Rollout, Share
from diffusion_envs.training import kl_controller, memory, parallel, sharded
from diffusion_envs.training.critic import Critic
from diffusion_envs.training.energy import EnergyCritic, TrainingData
from diffusion_envs.training.gradients import Gradients
from diffusion_envs.training.optimisers import AdamW, Optimiser
from diffusion_envs.training.path_metric import PathMetric
from diffusion_envs.training.phase import phase
from diffusion_envs.training.refusal import NonFiniteError, RefusedStep
from diffusion_envs.training.requirements import require_fit, require_shardable
from diffusion_envs.training.update_numbers import Earned, means, peak_memory
from diffusion_envs.training.update_size import UpdateSize

__all__ = ["NonFiniteError", "PreflightError", "Trainer"]

_ADAMW = AdamW()


class Trainer:
    """Improves an adapter, and the value network where one helps, one update at a time.

    Args:
        environment: what acts and is rewarded.
        objective: what to learn from a roll-out.
        size: sizes of one update.
        accelerator: the processes of this run; each rolls out its share of the samples.
        stream_name: names the noise of the training samples.
        preference: who prefers which sample, for objectives that learn from preferences.
        data: what samples should look like, for objectives that learn the reward from it.
        target_kl: changes the objective's kl_weight after every update.
        optimiser: how a gradient becomes a step of the adapter.
        log_path_kl: report the path KL of every roll-out also where no method needs it, at the
            price of a network call a step.
        refused: is told of a step that is refused as its numbers are not finite, before the error
            that ends the run.
    """

    def __init__(
        self,
        environment: Environment,
        objective: Objective,
        size: UpdateSize,
        *,
        accelerator: Accelerator,
        stream_name: str = "train",
        preference: Preference | None = None,
        data: TrainingData | None = None,
        target_kl: kl_controller.TargetKL | None = None,
        log_path_kl: bool = False,
        optimiser: Optimiser = _ADAMW,
        refused: Callable[[RefusedStep], None] | None = None,
    ) -> None:
        processes = accelerator.num_processes
        require_fit(environment, objective, size, processes, target_kl, preference, data)
        self.environment, self.objective, self.size = environment, objective, size
        self._shards = sharded.shards_of(environment.model)
        require_shardable(self._shards, optimiser)
        self.accelerator, self.stream_name = accelerator, stream_name
        self.preference = preference or FromReward()
        self.target_kl, self.log_path_kl, self.refused = target_kl, log_path_kl, refused
        learned = environment.sampler.parameters  # of the sampler
        self.parameters = [*environment.model.parameters, *learned]
        self.old = [p.detach().clone() for p in self.parameters]  # of the policy that samples
        self.mean = [old.clone() for old in self.old] if size.average is not None else []
        rate, std_rate = objective.rates
        kinds: list[dict[str, Any]] = [{"params": environment.model.parameters}]
        if learned:
            kinds.append({"params": learned, "lr": std_rate, "weight_decay": 0.0})
        self.optimiser = optimiser.start(
            kinds, rate=rate, weight_decay=size.weight_decay, environment=environment
        )
        self.critic: Critic | EnergyCritic | None = None
        if data is not None:
            self.critic = EnergyCritic(environment, objective, size, accelerator, stream_name, data)
        elif objective.needs_value:
            self.critic = Critic(environment, objective, size, accelerator, stream_name)
        self.gradients = Gradients(
            environment,
            self.parameters,
            self.optimiser,
            accelerator,
            size.batch,
            asks_reward=objective.needs_reward_gradient,
        )
        self.update = 0  # updates done
        self.rewards_by_prompt = dict[int, Estimate]()  # of the last update, by index
        self._at_first = {name: pieces.batch for name, pieces in self._pieces.items()}
        self._seconds_before = 0.0
        self._started = time.monotonic()

    # -- what a checkpoint holds ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next update depends on, as tensors and numbers.

        Of sharded weights the main process gets whole tensors; all processes have to ask.
        """
        weight = None if self.target_kl is None else kl_controller.kl_weight(self.objective)
        state = {
            "adapter": [p.detach() for p in self.parameters],
            "old": self.old if self._lags else [],  # otherwise it is the adapter
            "mean": self.mean,
            "optimiser": self.optimiser.state_dict(),
            "critic": None if self.critic is None else self.critic.state(),
            "loss_scale": self.gradients.loss_scale.state(),
            "update": self.update,
            "reward_queries": self.environment.reward_queries,
            "network_calls": self.environment.model.calls,
            "seconds": self.seconds,
            "kl_weight": weight,
            "at_once": {name: pieces.batch for name, pieces in self._pieces.items()},
        }
        return sharded.gathered(state, keep=self.accelerator.process_index == 0)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the adapter's tensors are not those of the checkpoint.
        """
        shapes = [list(p.shape) for p in self.parameters]
        if (stored := [list(t.shape) for t in state["adapter"]]) != shapes:
            raise ValueError(f"the checkpoint's adapter has shapes {stored}, this model's {shapes}")
        self._set(self.parameters, state["adapter"])
        self._set(self.old, state["old"] or state["adapter"])
        self._set(self.mean, state.get("mean", []))  # checkpoints of before have none
        moments = sharded.scattered_moments(state["optimiser"], self.parameters)
        self.optimiser.load_state_dict(moments)
        if self.critic is not None:
            self.critic.load_state(state["critic"])
        self.gradients.loss_scale.load_state(state.get("loss_scale", {}))  # as above
        self.update = state["update"]
        if self.target_kl is not None:
            self.objective = kl_controller.with_kl_weight(self.objective, state["kl_weight"])
        self.environment.reward_queries = state["reward_queries"]
        self.environment.model.calls = state["network_calls"]
        for name, rows in state.get("at_once", {}).items():  # as above
            pieces = self._pieces.get(name)
            if pieces is not None:
                pieces.batch = min(pieces.batch, rows)
        self._seconds_before, self._started = state["seconds"], time.monotonic()

    @property
    def _pieces(self) -> dict[str, memory.Batched]:
        """Whatever goes through something in pieces, by the name of its rows in the log."""
        model, critic = self.environment.model, self.critic
        pieces: dict[str, memory.Batched] = {
            "batch": self.gradients,
            "batch.pictures": self.environment,
        }
        if isinstance(model, memory.Batched):
            pieces["batch.network"] = model
        if critic is not None:
            pieces["batch.values"] = critic
        return pieces

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
        """One update: sample and score, make the losses, improve the adapter, then the critic.

        Raises:
            PreflightError: something that must hold before the first update does not.
            NonFiniteError: a gradient is not finite; no weight was changed by it.
            MemoryLimitError: memory runs out however few rows go through the network at once.
        """
        with memory.explained(f"update {self.update + 1}"):
            return self._step()

    def _step(self) -> dict[str, Any]:
        counted = _counts(self.environment.reward)
        with self._sampling_policy():
            sample = self.sample()
        with self._refusing(sample):
            numbers = self._improve(sample)
        self._keep_old()
        self._keep_mean()
        self.update += 1
        measured = self._measured(sample.rollout, numbers)
        return measured | self._counted_since(counted)

    def _improve(self, sample: Sample) -> dict[str, Any]:
        """Adapter and critic, from one roll-out."""
        numbers, critic = dict[str, Any](), self.critic
        if critic is not None and critic.learns_first:
            numbers |= critic.improve(sample.rollout, sample.denoised_rewards, self.update)
        losses = self.losses(sample.rollout)
        if self.update == 0:
            with self._shards.unsharded():
                losses.check_fresh()
        with self._scheduled() as rates:
            numbers |= self._improve_adapter(losses, sample.rollout) | rates
        for group in self.optimiser.param_groups:
            group["lr"] *= self.objective.decay
        if critic is not None and not critic.learns_first:
            numbers |= critic.improve(sample.rollout, sample.denoised_rewards, self.update)
        return numbers

    @contextmanager
    def _refusing(self, sample: Sample) -> Iterator[None]:
        """Within this context a step that is refused is told to whoever wants to know."""
        try:
            yield
        except NonFiniteError as error:
            if self.refused is not None:
                first = self.update * self.size.samples
                paths = sample.rollout.place.paths
                step = RefusedStep(
                    update=self.update + 1,
                    reason=str(error),
                    process=self.accelerator.process_index,
                    samples=range(first + paths.start, first + paths.stop),
                    stream=self.stream_name,
                    prompts=sample.prompts,
                    rollout=sample.rollout,
                )
                self.refused(step)
            raise

    @phase("sampling")
    def sample(self) -> Sample:
        """The next update's roll-out by the policy as it is, with values and preferences.

        At the first update its rewards set the scale of the value network.
        """
        environment, objective, samples = self.environment, self.objective, self.size.samples
        world, groups = self.accelerator, samples // objective.group
        share = Share.even(groups, objective.group, world.process_index, world.num_processes)
        first = self.update * samples
        indices = range(first + share.paths.start, first + share.paths.stop)
        # Prompts in turn, so that every roll-out has each of them equally often.
        condition = torch.tensor([i // objective.group % len(environment.prompts) for i in indices])
        needed = objective.compares_paths or self.target_kl is not None
        with parallel.failing_together(self.accelerator):
            sample = environment.sample(
                objective.policy,
                indices,
                condition,
                stream=self.stream_name,
                denoised=objective.needs_value and objective.denoised_rewards,
                group=objective.group,
                shared_start=objective.shared_start,
                reference=needed or self.log_path_kl,
                count_reference=needed,
            )
        rollout = dataclasses.replace(sample.rollout, share=share)
        more = dict[str, Tensor]()
        if self.critic is not None:
            if self.update == 0:
                rewards = parallel.gather(rollout.rewards, self.accelerator)
                self.critic.calibrate(rewards)
            values = self.critic.values_along(rollout, sample.denoised_rewards)
            if values is not None:
                more["values"] = values
        if objective.needs_preferences:
            more["preferences"] = self._preferences(sample, indices)
        if self.size.stored_paths == "host":
            rollout = rollout.on_host()
        return dataclasses.replace(sample, rollout=dataclasses.replace(rollout, **more))

    def _preferences(self, sample: Sample, indices: range) -> Tensor:
        """Who is preferred; no process goes on while another one waits for people."""
        rollout, preferences, missing = sample.rollout, None, None
        try:
            preferences = compare(
                self.preference,
                sample.images,
                sample.prompts,
                rollout.rewards,
                indices,
                rollout.group,
            )
        except MissingChoicesError as error:
            missing = error
        missing = parallel.missing_anywhere(missing, self.accelerator)
        if missing is not None:
            raise missing
        assert preferences is not None
        return preferences

    @phase("update")
    def losses(self, rollout: Rollout) -> Losses:
        """What the objective learns from this roll-out; made before the weights change."""
        objective, size = self.objective, self.size
        changes = size.minibatches > 1 or self._lags
        with parallel.failing_together(self.accelerator) as agree, self._shards.unsharded():

            def advantages(function: Callable[[Rollout], Tensor]) -> Tensor:
                agree()  # targets may have asked the reward, and this waits for all
                return self._over_all(function, rollout)

            return objective.losses_of(
                Update(
                    environment=self.environment,
                    rollout=rollout,
                    advantages=advantages,
                    values=None if self.critic is None else self.critic.at(rollout),
                    usual_moves=None if self.critic is None else self.critic.usual_moves,
                    stream=self._generator,
                    own_stream=self._own_generator,
                    old_policy=self._sampling_policy if changes else None,
                    batch=self.gradients.batch,
                    train_steps=size.train_steps,
                )
            )

    def _generator(self, *name: str | int, process: int = 0) -> torch.Generator:
        """Random numbers of this update, the same on all processes."""
        return stream(self.environment.seed, self.stream_name, *name, self.update, process)

    def _own_generator(self, *name: str | int) -> torch.Generator:
        """Random numbers of this update and process."""
        return self._generator(*name, process=self.accelerator.process_index)

    @phase("update")
    def _improve_adapter(self, losses: Losses, rollout: Rollout) -> dict[str, float]:
        size, groups = self.size, rollout.place.of
        most = size.max_gradient_norm if self.optimiser.clips else math.inf
        norm, seen, stepped = 0.0, dict[str, float](), dict[str, float]()
        watched = self._watched(rollout)
        if self._shards.networks:
            self._agree_on_rows(losses)
        for epoch in range(size.epochs):
            shuffle = stream(self.environment.seed, self.stream_name, "rows", self.update, epoch, 0)
            order = torch.randperm(groups, generator=shuffle)
            for k, part in enumerate(dealt(order, size.minibatches)):
                norm, seen = self.gradients.of(
                    losses,
                    part,
                    shuffle,
                    rollout,
                    update=self.update + 1,
                    most=most,
                    watched=watched,
                )
                metrics = list[PathMetric]()
                stepped = self.optimiser.step(self._metric(rollout, epoch, k, metrics))
                self.gradients.batch = min([self.gradients.batch, *(m.batch for m in metrics)])
        numbers = {**(seen or losses.numbers()), "gradient_norm": norm, **stepped}
        return numbers | self.gradients.loss_scale.numbers()

    def _watched(self, rollout: Rollout) -> dict[str, Tensor]:
        """What a step must not be made from if it is not finite, though no gradient may see it."""
        read = {"a reward": rollout.rewards}
        if rollout.reward_parts is not None:
            read["a part of the reward"] = rollout.reward_parts
        if self.target_kl is not None:
            read["the path KL, which kl_weight follows,"] = rollout.costs
        return read

    @contextmanager
    def _scheduled(self) -> Iterator[dict[str, float]]:
        """Within this context learning rates are those of this update; numbers to log."""
        size, groups = self.size, self.optimiser.param_groups
        factor = size.rate_factor(self.update)
        before = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= factor
        changes = size.warm_up > 0 or size.schedule != "constant"
        try:
            yield {"learning_rate": groups[0]["lr"]} if changes else {}
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _metric(
        self, rollout: Rollout, epoch: int, k: int, made: list[PathMetric]
    ) -> Callable[[str, float], PathMetric]:
        """(what for, share of the rows) -> the metric of path laws on this roll-out's states.

        Those that are asked for are put into ``made``.
        """

        def metric(what: str, share: float) -> PathMetric:
            name = ("metric", what, epoch, k)
            first = self.accelerator.process_index == 0
            told = PathMetric.of(
                self.environment,
                self.parameters,
                rollout,
                share=share,
                generator=self._generator(*name),
                own_generator=None if first else self._own_generator(*name),
                batch=self.gradients.batch,
                accelerator=self.accelerator,
            )
            made.append(told)
            return told

        return metric

    def _over_all(self, function: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
        """A function of the whole roll-out, that of all processes."""
        world = self.accelerator
        if world.num_processes == 1:
            return function(rollout)

        def whole(value: Tensor | None) -> Tensor | None:
            return None if value is None else parallel.gather(value, world)

        preferences, device = rollout.preferences, rollout.rewards.device
        everything = dataclasses.replace(
            rollout,
            costs=whole(rollout.costs),
            rewards=whole(rollout.rewards),
            values=whole(rollout.values),
            condition=whole(rollout.condition.to(device)),
            reward_parts=whole(rollout.reward_parts),
            preferences=None if preferences is None else whole(preferences.to(rollout.rewards)),
            share=None,
        )
        return function(everything)

    # -- the policy that samples ------------------------------------------------------------------

    @property
    def _lags(self) -> bool:
        """Whether the policy that samples is an older one than the current."""
        return self.update > 0 and self.objective.old_decay(self.update - 1) > 0

    @contextmanager
    def _sampling_policy(self) -> Iterator[None]:
        """Within this context the adapter is the one that samples: the current, or an older one."""
        with self._holding(self.old if self._lags else []), self._shards.unsharded():
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the adapter is the running mean of ``size.average``, if there is one.

        For evaluation and export: what ``state`` returned here would hold the mean as what trains.
        Weights that are sharded are whole on every process; all of them enter.
        """
        with self._holding(self.mean), self._shards.unsharded():
            yield

    @contextmanager
    def _holding(self, values: list[Tensor]) -> Iterator[None]:
        """Within this context the parameters are these; without any, they stay."""
        if not values:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        self._set(self.parameters, values)
        try:
            yield
        finally:
            self._set(self.parameters, current)

    def _keep_old(self) -> None:
        """The sampling policy follows the current one, as far as the objective lets it."""
        decay = self.objective.old_decay(self.update)
        with torch.no_grad():
            for old, parameter in zip(self.old, self.parameters, strict=True):
                old.lerp_(parameter, 1 - decay)

    def _keep_mean(self) -> None:
        """The mean takes in the current weights: all updates count alike while they are few."""
        if self.size.average is None:
            return
        share = 1 - min(self.size.average, self.update / (self.update + 1))
        with torch.no_grad():
            for mean, parameter in zip(self.mean, self.parameters, strict=True):
                mean.lerp_(parameter, share)

    @torch.no_grad()
    def _set(self, parameters: list[nn.Parameter] | list[Tensor], values: list[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(sent(sharded.scattered(value, parameter), parameter.device))
        if parameters is self.parameters:
            self._shards.refresh()

    # -- what to log ------------------------------------------------------------------------------

    def _measured(self, rollout: Rollout, numbers: dict[str, Any]) -> dict[str, Any]:
        """Numbers of this update over all processes; the next kl_weight follows from them."""
        environment, world = self.environment, self.accelerator
        earned = Earned.of(rollout, world)
        self.rewards_by_prompt = earned.by_prompt()
        if self.target_kl is not None:
            assert earned.path_kl is not None  # a step from costs that are not finite is refused
            numbers["kl_weight"] = weight = kl_controller.kl_weight(self.objective)
            weight = self.target_kl.next_weight(weight, earned.path_kl.mean)
            self.objective = kl_controller.with_kl_weight(self.objective, weight)
        counts = {
            "reward_queries": environment.reward_queries,
            "network_calls": environment.model.calls,
        }
        return {
            "update": self.update,
            **earned.numbers(),
            **parallel.add(counts, world),
            "seconds": self.seconds,
            **means(numbers, len(rollout.rewards), world),
            **self._fewer_at_once(),
            "memory": peak_memory(environment.device),
        }

    def _agree_on_rows(self, losses: Losses) -> None:
        """As many rows at once on all processes, none of which the network divides further."""
        gradients = self.gradients
        gradients.batch = min(gradients.batch, self._pieces.get("batch.network", gradients).batch)
        if isinstance(losses, memory.Batched):
            gradients.batch = min(gradients.batch, losses.batch)
        self._fewer_at_once()
        if isinstance(losses, memory.Batched):
            losses.batch = gradients.batch

    def _fewer_at_once(self) -> dict[str, int]:
        """Rows at once where memory has run out so far: the least of all processes, on each."""
        pieces = self._pieces
        mine = torch.tensor([[each.batch for each in pieces.values()]])
        if self.accelerator.num_processes > 1:
            mine = parallel.gather(mine.to(self.environment.device), self.accelerator).cpu()
        for each, rows in zip(pieces.values(), mine.amin(0).tolist(), strict=True):
            each.batch = rows
        now = {name: each.batch for name, each in pieces.items()}
        return {name: rows for name, rows in now.items() if rows < self._at_first[name]}

    def _counted_since(self, before: Mapping[str, int]) -> dict[str, int]:
        """What the reward has counted since, on all processes."""
        reward = self.environment.reward
        now = _counts(reward)
        if not isinstance(reward, Counting):
            return {}
        changed = {name: count - before.get(name, 0) for name, count in now.items()}
        total = parallel.add(changed, self.accelerator)
        return {f"reward_counts.{name}": count for name, count in total.items()}


def dealt(order: Tensor, minibatches: int) -> list[Tensor]:
    """The groups of each minibatch; of as many groups in a row each has one.

    So every process, whose groups are in a row, has about as many in each.

    Args:
        order: of all groups, by their place.
        minibatches: how many; the groups are a multiple.
    """
    turn = order.argsort().view(-1, minibatches).argsort(1).argsort(1).flatten()  # of every group
    return [order[turn[order] == k] for k in range(minibatches)]


def _counts(reward: Reward) -> dict[str, int]:
    """What it has counted so far; nothing, if it does not count."""
    return dict(reward.counts) if isinstance(reward, Counting) else {}
