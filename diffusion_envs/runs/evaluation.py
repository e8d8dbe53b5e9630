"""Judging a fine-tuned model on held-out seeds, paired with the pretrained one."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import DeterministicPolicy, Estimate
from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import Rollout

HELD_OUT = "held-out"  # the stream's name: training never draws from it
WATCHED = "watched"  # another, for what decides when to stop: the last evaluation never sees it


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One number per held-out sample, in the order of their index."""

    rewards: Float[Tensor, " n"]
    judged: Mapping[str, Float[Tensor, " n"]]  # by name of a reward that was not trained on
    path_kl: Float[Tensor, " n"]  # nats; infinite of an ODE, NaN of a black box: it is not known
    images: Float[Tensor, " n *picture"]
    prompts: list[str]

    def first(self, n: int) -> "Evaluation":
        """The first n samples only."""
        return Evaluation(
            rewards=self.rewards[:n],
            judged={name: values[:n] for name, values in self.judged.items()},
            path_kl=self.path_kl[:n],
            images=self.images[:n],
            prompts=self.prompts[:n],
        )


def evaluate(
    environment: Environment,
    samples: int,
    *,
    judges: Mapping[str, rewards.Reward] | None = None,
    batch: int = 32,
    pretrained: bool = False,
    stream: str = HELD_OUT,
) -> Evaluation:
    """Sample held-out seeds and judge them; costs are not counted.

    Args:
        environment: with the sampler to evaluate.
        samples: how many; sample i has prompt i modulo the number of prompts, and its own noise,
            the same for every model, step count and eta of one seed.
        judges: rewards that only judge, by name.
        batch: samples rolled out at once.
        pretrained: evaluate the model without its adapter.
        stream: names the noise.
    """
    spent = environment.reward_queries, environment.model.calls
    parts = []
    with environment.pretrained() if pretrained else nullcontext():
        for first in range(0, samples, batch):
            indices = range(first, min(first + batch, samples))
            condition = torch.tensor([i % len(environment.prompts) for i in indices])
            parts.append(
                environment.sample(
                    lambda mean, _: DeterministicPolicy(mean), indices, condition, stream=stream
                )
            )
    environment.reward_queries, environment.model.calls = spent
    images = torch.cat([part.images.cpu() for part in parts])
    prompts = [prompt for part in parts for prompt in part.prompts]
    return Evaluation(
        rewards=torch.cat([part.rollout.rewards.cpu() for part in parts]),
        judged={
            name: rewards.score(judge, images, prompts) for name, judge in (judges or {}).items()
        },
        path_kl=torch.cat([_path_kl(part.rollout).cpu() for part in parts]),
        images=images,
        prompts=prompts,
    )


def _path_kl(rollout: Rollout) -> Float[Tensor, " n"]:
    """Of each path, nats; NaN where its steps are not known."""
    known = rollout.costs.shape[1] > 0
    return rollout.costs.sum(1) if known else torch.full_like(rollout.rewards, math.nan)


def by_prompt(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Reward of each prompt before and after, and the paired difference.

    Args:
        before: the pretrained model.
        after: the fine-tuned model on the same seeds.
    """
    parts = {
        "before": before.rewards,
        "after": after.rewards,
        "difference": after.rewards - before.rewards,
    }
    members = {
        prompt: [i for i, name in enumerate(after.prompts) if name == prompt]
        for prompt in dict.fromkeys(after.prompts)
    }
    return {
        prompt: {part: Estimate.of(values[rows]) for part, values in parts.items()}
        for prompt, rows in members.items()
    }
