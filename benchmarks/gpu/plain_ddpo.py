"""DDPO as one would write it with diffusers and peft alone: what this library is compared with.

Importance weights clipped to the old policy, DDIM with eta 1, one pass over the samples, advantages
normalised over the batch; no path KL, no value network, no evaluation, no checkpoints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlainDDPO:
    """One update at a time.

    Attributes:
        unet: with its adapter.
        alphas_cumprod: of the noise schedule.
        timesteps: of the sampler, from noise to data.
        context: embedded prompt, [1, tokens, width].
        event: of a latent.
        reward: latents -> rewards.
        optimiser: of the adapter.
        batch: rows that go through the network at once.
        dtype: the network's.
        empty: embedded empty prompt, for guidance.
        guidance: scale; 1 is none.
        clip: half-width of the trusted log-ratio of a whole step.
    """

    unet: Any
    alphas_cumprod: Tensor
    timesteps: list[int]
    context: Tensor
    event: tuple[int, ...]
    reward: Callable[[Tensor], Tensor]
    optimiser: torch.optim.Optimizer
    batch: int
    dtype: torch.dtype
    empty: Tensor | None = None
    guidance: float = 1.0
    clip: float = 1e-4

    def transition(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Mean and standard deviation of step k of DDIM with eta 1."""
        t = self.timesteps[k]
        now = float(self.alphas_cumprod[t])
        last = k + 1 == len(self.timesteps)
        then = float(self.alphas_cumprod[0 if last else self.timesteps[k + 1]])
        noise = self.predicted_noise(x, t)
        clean = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        variance = (1 - then) / (1 - now) * (1 - now / then)
        mean = math.sqrt(then) * clean + math.sqrt(max(0.0, 1 - then - variance)) * noise
        return mean, math.sqrt(variance)

    def predicted_noise(self, x: Tensor, t: int) -> Tensor:
        """The network's, guided: both branches in one call, as pipelines do."""
        context = self.context.expand(len(x), -1, -1)
        if self.guidance != 1:
            assert self.empty is not None
            context = torch.cat([self.empty.expand(len(x), -1, -1), context])
            x = torch.cat([x, x])
        times = torch.full((len(x),), t, device=x.device)
        noise = self.unet(
            x.to(self.dtype), times, encoder_hidden_states=context.to(self.dtype)
        ).sample.float()
        if self.guidance == 1:
            return noise
        without, with_prompt = noise.chunk(2)
        return without + self.guidance * (with_prompt - without)

    def log_prob(self, k: int, x: Tensor, after: Tensor) -> Tensor:
        """Log-density of a step, averaged over pixels, as published."""
        mean, std = self.transition(k, x)
        return -((after - mean) / std).square().flatten(1).mean(1) / 2

    def update(self, samples: int, generator: torch.Generator) -> dict[str, float]:
        """Sample, score and improve; the mean reward."""
        device = self.context.device
        parts = []
        with torch.no_grad():
            for begin in range(0, samples, self.batch):
                rows = min(self.batch, samples - begin)
                states = [torch.randn(rows, *self.event, device=device, generator=generator)]
                old = []
                for k in range(len(self.timesteps)):
                    mean, std = self.transition(k, states[-1])
                    noise = torch.randn(mean.shape, device=device, generator=generator)
                    states.append(mean + std * noise)
                    old.append(-noise.square().flatten(1).mean(1) / 2)
                parts.append((torch.stack(states), torch.stack(old), self.reward(states[-1])))
        rewards = torch.cat([part[2] for part in parts]).float()
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).split(self.batch)
        self.optimiser.zero_grad()
        for (states, old, _), advantage in zip(parts, advantages, strict=True):
            for k in range(len(self.timesteps)):
                ratio = (self.log_prob(k, states[k], states[k + 1]) - old[k]).exp()
                trusted = ratio.clamp(1 - self.clip, 1 + self.clip)
                gain = torch.minimum(ratio * advantage, trusted * advantage)
                (-gain.sum() / samples).backward()
        self.optimiser.step()
        return {"reward": float(rewards.mean())}
