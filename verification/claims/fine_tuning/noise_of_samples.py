"""Noise of samples: distinct vectors for each sample, equal for any number of processes.

Every sample of every update has noise of its own, on every process: as many distinct
noise vectors as were asked for, the same for 1, 2 and 3 processes, whatever the prompts;
evaluation sees none of it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusion_envs.environment import Sample
from verification.claim import Check, Setting, pathwise
from verification.problems.training_loop import PROMPTS, SAMPLES, STEPS, Process, trainer

SOURCE = "verl-omni issue 561, VeOmni issue 956 (seeds local to a worker; seed + rank)"
WHY_DOUBLE = "the loop's networks, states and rewards are float32 whatever the setting"
PRECISION = torch.float32


def noises(setting: Setting, processes: int) -> Tensor:
    """Start and transition noise of two updates, [updates * samples, 1 + steps, dim]."""
    each = [trainer(setting, process=Process(index, processes)) for index in range(processes)]
    by_update = []
    for update in (3, 4):
        for made in each:
            made.update = update
            with torch.no_grad():
                by_update.append(_of(made.sample()))
    return torch.cat(by_update)


def _of(sample: Sample) -> Tensor:
    rollout = sample.rollout
    return torch.cat([rollout.states[:, :1], rollout.noises], dim=1).flatten(2)


def _distinct(vectors: Tensor) -> float:
    return float(len({tuple(row) for row in vectors.flatten(0, 1).tolist()}))


def checks(setting: Setting) -> Iterator[Check]:
    """Counts of distinct vectors, and equality over numbers of processes."""
    parts = [noises(setting, processes) for processes in (1, 2, 3)]
    asked = float(2 * SAMPLES * (1 + STEPS))
    counts = [_distinct(one) for one in parts]
    yield pathwise("distinct noise vectors of 1, 2, 3 processes", counts, [asked] * 3)
    gaps = torch.stack([one - parts[0] for one in parts])
    yield pathwise("noise of 1, 2, 3 processes is one", gaps, 0 * gaps, scale=1.0)
    made = trainer(setting)
    indices = range(3 * SAMPLES, 5 * SAMPLES)
    conditions = torch.arange(2 * SAMPLES) % len(PROMPTS)
    held_out = made.environment.sample(
        made.objective.policy, indices, conditions, stream="evaluation"
    )
    both = torch.cat([parts[0], _of(held_out)])
    yield pathwise("distinct with evaluation's", _distinct(both), 2 * asked)


MISTAKES = """
diffusion_envs.training.trainer.Trainer.sample
    seeds local to a process | range(first + share.paths.start, first + share.paths.stop)
        => range(first, first + len(share.paths))
    the same noise at every update | first = self.update * samples => first = 0
    updates overlap | self.update * samples => self.update * (samples - 1)
diffusion_envs.environment.Environment._normals
    index within the batch | samples=samples => samples=range(len(samples))
    start and transitions alike | (stream, what) => (stream,)
    evaluation sees training's noise | (stream, what) => (what,)
    seed + rank | seed=self.seed, name=(stream, what), samples=samples
        => seed=self.seed + samples[0], name=(stream, what), samples=range(len(samples))
diffusion_envs.environment.Environment.sample
    noise of the prompt | self._normals((steps, *self.event), stream, "transition", samples)
        => self._normals((steps, *self.event), stream, "transition", range(len(self.prompts)))[condition]
"""
