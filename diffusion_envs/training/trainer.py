"""The one training loop: sample, judge, improve; whatever the objective, whatever the model.

``Trainer`` holds what changes during a run and knows no objective by name. ``Trainer.updates`` is
an iterator: logging, pictures, checkpoints and stopping belong to its caller. All noise comes from
streams named by sample, step and update, so the trainer's state is its weights and two counters.
"""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from ctrl import Estimate
from ctrl.devices import as_like, read, sent
from ctrl.noise import stream
from diffusion_envs.denoising import path_kl_per_step
from diffusion_envs.environment import Environment, Sample
from diffusion_envs.objectives import (
    BackpropObjective,
    NoisedObjective,
    Objective,
    PathObjective,
    Rollout,
)
from diffusion_envs.objectives.protocol import log_ratio_rounding, score_rounding
from diffusion_envs.preferences import FromReward, MissingChoicesError, Preference, compare
from diffusion_envs.training import kl_controller as control
from diffusion_envs.training import parallel
from diffusion_envs.training.critic import Critic, NonFiniteError
from diffusion_envs.training.lessons import LastSteps, Lesson, NoisedData, PathSteps
from diffusion_envs.training.requirements import require_fit
from diffusion_envs.training.update_size import UpdateSize

__all__ = ["NonFiniteError", "PreflightError", "Trainer"]


class PreflightError(RuntimeError):
    """What must hold before the first update does not; the message names the likely cause."""


class Trainer:
    """Improves an adapter, and the value network that helps, one update at a time.

    Args:
        environment: what acts and is judged.
        objective: what to learn from a roll-out.
        schedule: how much of everything.
        parameters: of the adapter.
        accelerator: the processes of this run; each rolls out its share of the samples.
        stream_name: names the noise of the training samples.
        preference: who prefers which sample, for objectives that learn from preferences.
        target_kl: moves the objective's kl_weight after every update.
    """

    def __init__(
        self,
        environment: Environment,
        objective: Objective,
        schedule: UpdateSize,
        parameters: list[nn.Parameter],
        *,
        accelerator: Accelerator,
        stream_name: str = "train",
        preference: Preference | None = None,
        target_kl: control.TargetKL | None = None,
    ) -> None:
        processes = accelerator.num_processes
        require_fit(environment, objective, schedule, processes, target_kl, preference)
        self.environment, self.objective, self.schedule = environment, objective, schedule
        self.parameters, self.accelerator, self.stream_name = parameters, accelerator, stream_name
        self.preference = preference or FromReward()
        self.target_kl = target_kl
        self.old = [p.detach().clone() for p in parameters]  # of the policy that samples
        self.optimiser = torch.optim.AdamW(
            parameters, lr=objective.learning_rate, weight_decay=schedule.weight_decay
        )
        self.critic = Critic(environment, schedule, accelerator, stream_name)
        self.update = 0  # updates done
        self._seconds_before = 0.0
        self._started = time.monotonic()

    # -- what a checkpoint holds ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the next update depends on, as tensors and numbers."""
        return {
            "adapter": [p.detach() for p in self.parameters],
            "old": self.old,
            "optimiser": self.optimiser.state_dict(),
            "value": self.critic.network.state_dict(),
            "value_optimiser": self.critic.optimiser.state_dict(),
            "update": self.update,
            "reward_queries": self.environment.reward_queries,
            "network_calls": self.environment.score.calls,
            "seconds": self.seconds,
            "kl_weight": None if self.target_kl is None else control.kl_weight(self.objective),
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
                parameter.copy_(sent(tensor, parameter.device))
            for parameter, tensor in zip(self.old, state["old"], strict=True):
                parameter.copy_(sent(tensor, parameter.device))
        self.optimiser.load_state_dict(state["optimiser"])
        self.critic.network.load_state_dict(state["value"])
        self.critic.optimiser.load_state_dict(state["value_optimiser"])
        self.update = state["update"]
        if self.target_kl is not None:
            self.objective = control.with_kl_weight(self.objective, state["kl_weight"])
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
        with self._sampling_policy():
            sample = self.sample()
        rollout = sample.rollout
        lesson = self.lesson(rollout)
        if self.update == 0 and isinstance(lesson, PathSteps):
            self._preflight(lesson)
        told: dict[str, Any] = dict(self._improve_adapter(lesson, rollout))
        if rollout.values is not None and isinstance(self.objective, PathObjective):
            told["value_loss"] = self.critic.improve(
                self.objective, rollout, sample.denoised_rewards, self.update
            )
        self._keep_old()
        self.update += 1
        earned = torch.stack([rollout.rewards, rollout.costs.sum(1).to(rollout.rewards)], dim=1)
        rewards, nats = parallel.gather(earned, self.accelerator).cpu().unbind(1)
        known = rollout.costs.shape[1] > 0 and bool(torch.isfinite(nats).all())
        seen = {"path_kl": Estimate.of(nats)} if known else {}
        if self.target_kl is not None:
            told["kl_weight"] = weight = control.kl_weight(self.objective)
            weight = self.target_kl.next_weight(weight, seen["path_kl"].mean)
            self.objective = control.with_kl_weight(self.objective, weight)
        return {
            "update": self.update,
            "reward": Estimate.of(rewards),
            **seen,
            "reward_queries": self._over_processes(self.environment.reward_queries),
            "network_calls": self._over_processes(self.environment.score.calls),
            "seconds": self.seconds,
            **told,
            "memory": _peak_memory(self.environment.device),
        }

    def sample(self) -> Sample:
        """The next update's roll-out by the policy as it is, with values and preferences.

        At the first update its rewards set the scale of the value network.
        """
        environment, samples = self.environment, self.schedule.samples
        share = samples // self.accelerator.num_processes
        first = self.update * samples + self.accelerator.process_index * share
        indices = range(first, first + share)
        # Prompts in turn, so that every roll-out has each of them equally often.
        group = self.objective.group
        condition = torch.tensor([i // group % len(environment.prompts) for i in indices])
        objective = self.objective
        # the others look at the pretrained model elsewhere, or not at all
        compared = isinstance(objective, PathObjective) and objective.needs_reference
        on_paths = isinstance(objective, PathObjective) and objective.needs_value
        sample = environment.sample(
            objective.policy,
            indices,
            condition,
            stream=self.stream_name,
            denoised=on_paths and objective.denoised_rewards,
            group=group,
            shared_start=objective.shared_start,
            count_reference=compared or self.target_kl is not None,
        )
        rollout, added = sample.rollout, dict[str, Tensor]()
        if on_paths:
            if self.update == 0:
                self.critic.network.calibrate(parallel.gather(rollout.rewards, self.accelerator))
            with torch.no_grad():
                added["values"] = self.critic.values(objective, rollout, sample.denoised_rewards)
        if objective.needs_preferences:
            added["preferences"] = self._preferences(sample, indices)
        return dataclasses.replace(sample, rollout=dataclasses.replace(rollout, **added))

    def _preferences(self, sample: Sample, indices: range) -> Tensor:
        """Who is preferred; no process goes on while another one waits for people."""
        rollout, found, missing = sample.rollout, None, None
        try:
            found = compare(
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
        assert found is not None
        return found

    def lesson(self, rollout: Rollout) -> Lesson:
        """What the objective learns from this roll-out, by its kind; before the weights move."""
        environment, objective, schedule = self.environment, self.objective, self.schedule
        if isinstance(objective, PathObjective):
            if objective.needs_targets:
                rollout = dataclasses.replace(rollout, targets=self._targets(rollout))
            return PathSteps(
                environment,
                objective,
                rollout,
                self._advantages(rollout),
                self.critic.at(rollout) if objective.needs_value else None,
                train_steps=schedule.train_steps,
                batch=schedule.batch,
            )
        if isinstance(objective, NoisedObjective):
            generator = self._generator("noise")
            moves = schedule.minibatches > 1 or objective.old_decay(self.update) > 0
            return NoisedData(
                environment,
                objective,
                rollout,
                self._advantages(rollout),
                generator,
                self._sampling_policy if moves else None,
                batch=schedule.batch,
            )
        assert isinstance(objective, BackpropObjective)
        return LastSteps(environment, objective, rollout, batch=schedule.batch)

    def _targets(self, rollout: Rollout) -> Tensor:
        """The objective's, for as many paths at once as fit into memory."""
        assert isinstance(self.objective, PathObjective)
        found = []
        for part in torch.arange(len(rollout.rewards)).split(self.schedule.batch):
            with torch.no_grad():
                targets = self.objective.targets(rollout.chosen(part), self.environment)
            assert targets is not None  # needs_targets
            found.append(targets)
        return torch.cat(found)

    def _generator(self, *name: str | int) -> torch.Generator:
        """Random numbers of this update and process."""
        process = self.accelerator.process_index
        return stream(self.environment.seed, self.stream_name, *name, self.update, process)

    @contextmanager
    def _sampling_policy(self) -> Iterator[None]:
        """Within this context the adapter is the one that samples: the current, or an older one."""
        objective = self.objective
        if not isinstance(objective, NoisedObjective) or not objective.old_decay(self.update):
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter, old in zip(self.parameters, self.old, strict=True):
                parameter.copy_(old)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, now in zip(self.parameters, current, strict=True):
                    parameter.copy_(now)

    def _keep_old(self) -> None:
        """The sampling policy follows the current one, as far as the objective lets it."""
        objective = self.objective
        if isinstance(objective, NoisedObjective):
            decay = objective.old_decay(self.update)
            with torch.no_grad():
                for old, parameter in zip(self.old, self.parameters, strict=True):
                    old.lerp_(parameter, 1 - decay)

    def _improve_adapter(self, lesson: Lesson, rollout: Rollout) -> dict[str, float]:
        schedule, groups = self.schedule, len(rollout.rewards) // rollout.group
        norm = 0.0
        for epoch in range(schedule.epochs):
            shuffle = stream(
                self.environment.seed,
                self.stream_name,
                "rows",
                self.update,
                epoch,
                self.accelerator.process_index,
            )
            order = torch.randperm(groups, generator=shuffle)
            for part in order.chunk(schedule.minibatches):
                self.optimiser.zero_grad(set_to_none=True)
                for loss in lesson.losses(part, shuffle):
                    loss.backward()
                parallel.average_gradients(self.parameters, self.accelerator)
                norm = nn.utils.clip_grad_norm_(self.parameters, schedule.max_gradient_norm).item()
                if not math.isfinite(norm):
                    raise NonFiniteError(
                        f"the gradient's norm is {norm} at update {self.update + 1}; no "
                        "weight was changed. Lower learning_rate or guidance, or use float32"
                    )
                self.optimiser.step()
        return {**lesson.numbers(), "gradient_norm": norm}

    def _advantages(self, rollout: Rollout) -> Float[Tensor, " paths *steps"]:
        """The objective's, with batch statistics over all processes."""
        world = self.accelerator
        assert isinstance(self.objective, PathObjective | NoisedObjective)
        if world.num_processes == 1:
            return self.objective.advantages(rollout)
        paths = len(rollout.rewards)
        whole = dataclasses.replace(
            rollout,
            costs=parallel.gather(rollout.costs, world),
            rewards=parallel.gather(rollout.rewards, world),
            values=None if rollout.values is None else parallel.gather(rollout.values, world),
            condition=parallel.gather(rollout.condition.to(rollout.rewards.device), world),
            preferences=None
            if rollout.preferences is None
            else parallel.gather(rollout.preferences.to(rollout.rewards), world),
        )
        first = world.process_index * paths
        return self.objective.advantages(whole)[first : first + paths]

    # -- checks -----------------------------------------------------------------------------------

    def _preflight(self, lesson: PathSteps) -> None:
        """Before the first update: ratio 1, KL 0 of a fresh adapter, enough memory to go on."""
        rollout, objective = lesson.rollout, lesson.objective
        paths, steps = rollout.costs.shape
        few = min(paths, max(4, rollout.group))
        rows = torch.cartesian_prod(torch.arange(few), torch.arange(steps))
        precision, factor = self.environment.score.precision, self.environment.sampler.kl_factor
        # The pretrained model too is asked in other batches: its scores may differ as the ratio's.
        gap = score_rounding(precision) * rollout.means
        kl = path_kl_per_step(gap, 0 * gap, as_like(rollout.step_sizes, gap), factor=factor)
        ratios, bounds = list[Tensor](), list[Tensor]()
        with torch.no_grad():
            for piece in rows.split(self.schedule.batch):
                seen = lesson.rows(piece)
                ratios.append(objective.log_ratio(seen).abs().max())
                bounds.append(log_ratio_rounding(seen, precision).max())
            worst, allowed, nats, kl_allowed = read(
                torch.stack(ratios).max(),
                torch.stack(bounds).max(),
                rollout.costs.sum(1).max(),
                kl.sum(1).max(),
            )
        if not worst <= allowed:
            raise PreflightError(
                f"before the first update the log-ratio of new to old policy must be 0 up to "
                f"{allowed:.2g}, but is {worst:.3g}: roll-out and update see different networks. "
                "Usual causes: dropout or train mode, reduced precision with different batch "
                "sizes, an adapter that was changed"
            )
        if not 0 <= nats <= max(1e-6, kl_allowed):
            raise PreflightError(
                f"a fresh adapter must equal the pretrained model up to {kl_allowed:.2g} nats of "
                f"round-off, but its path KL is {nats:.3g} nats"
            )

    def _over_processes(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        local = torch.tensor([count], device=self.environment.device)
        return int(parallel.gather(local, self.accelerator).sum())


def _peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: of the GPU if there is one, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
