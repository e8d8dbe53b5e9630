"""What an update is known by in the log, over all processes."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from ctrl import Estimate
from ctrl.devices import as_like
from diffusion_envs.rewards.rounding import all_alike
from diffusion_envs.rollout import Rollout
from diffusion_envs.training import parallel


@dataclass(frozen=True, eq=False)
class Earned:
    """What the paths of all processes have earned and cost, on the CPU.

    Attributes:
        rewards: of every path.
        parts: of the reward, by name, where it has any.
        path_kl: nats; None where it is not known.
        compared: what the paths of a group are compared by.
        prompts: index of every path's prompt.
        group: paths of a group.
    """

    rewards: Float[Tensor, " paths"]
    parts: Mapping[str, Float[Tensor, " paths"]]
    path_kl: Estimate | None
    compared: Float[Tensor, " paths"]
    prompts: Float[Tensor, " paths"]
    group: int

    @classmethod
    def of(cls, rollout: Rollout, accelerator: Accelerator) -> "Earned":
        """By this process's share of them; all processes have to ask."""
        compared = rollout.rewards if rollout.preferences is None else rollout.preferences
        parts = () if rollout.reward_parts is None else rollout.reward_parts.unbind(1)
        columns = [rollout.rewards, rollout.costs.sum(1), compared, rollout.condition, *parts]
        earned = torch.stack([as_like(column, rollout.rewards) for column in columns], dim=1)
        earned = parallel.gather(earned, accelerator).cpu()
        rewards, nats, compared, prompts, *parts = earned.unbind(1)
        known = rollout.costs.shape[1] > 0 and bool(torch.isfinite(nats).all())
        return cls(
            rewards=rewards,
            parts=dict(zip(rollout.part_weights, parts, strict=True)),
            path_kl=Estimate.of(nats) if known else None,
            compared=compared,
            prompts=prompts,
            group=rollout.group,
        )

    def by_prompt(self) -> dict[int, Estimate]:
        """Rewards of each prompt, by its index."""
        return {
            int(k): Estimate.of(self.rewards[self.prompts == k])
            for k in self.prompts.unique().tolist()
        }

    def numbers(self) -> dict[str, Any]:
        """What of it is logged."""
        told: dict[str, Any] = {"reward": Estimate.of(self.rewards)}
        told |= {f"reward.{name}": Estimate.of(part) for name, part in self.parts.items()}
        if self.group > 1:  # the share of groups in which there is nothing to compare
            alike = all_alike(self.compared.view(-1, self.group))
            told["groups_without_signal"] = alike.double().mean().item()
        return told if self.path_kl is None else {**told, "path_kl": self.path_kl}


def means(numbers: dict[str, Any], paths: int, accelerator: Accelerator) -> dict[str, Any]:
    """Of all processes, weighted by their paths; of what is called a minimum or a maximum, that.

    Args:
        numbers: of this process; all have the same names.
        paths: of this process.
        accelerator: the processes.
    """
    if accelerator.num_processes == 1:
        return numbers
    mine = torch.tensor([[paths, *numbers.values()]], dtype=torch.float64)
    every = parallel.gather(mine.to(accelerator.device), accelerator).cpu()
    weight, every = every[:, :1] / every[:, 0].sum(), every[:, 1:]
    least, most = every.amin(0), every.amax(0)
    # what all know alike stays so, to the last bit
    mean = torch.where(least == most, least, (weight * every).sum(0))
    kinds = {"min": least.tolist(), "max": most.tolist()}
    names = enumerate(numbers)
    return {name: kinds.get(name.rpartition("_")[2], mean.tolist())[k] for k, name in names}


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: of the GPU if there is one, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
