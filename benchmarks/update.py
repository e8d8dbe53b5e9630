"""How much slower is a fine-tuning update than its network calls alone?

Counts the calls of UNet, VAE and reward in one update of the tiny model (sampling, reference,
denoised rewards, update with gradients, value network), then times the same calls of the same
shapes alone, interleaved in one run, in processor time. Prints one JSON line; the aim is a ratio of
at most 1.3.

    python -m benchmarks.update
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

STEPS, SAMPLES, RUNS = 10, 32, 5


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    reward = rewards.PromptAlignment("reward")
    model = TextToImageUNet.load(guidance=2.0)
    environment = Environment(
        model=model,
        sampler=samplers.DDIM().bind(model.table, STEPS),
        reward=reward,
        prompts=["a photo of a cat", "a photo of a ship"],
        seed=0,
    )
    trainer = Trainer(
        environment,
        objectives.ScoreAsAction(),
        UpdateSize(samples=SAMPLES),
        accelerator=parallel.start(),
    )
    calls: list[tuple[str, Callable[[], Any]]] = []
    record(model, reward, environment, calls)
    trainer.step()  # the preflight belongs to the first update only
    calls.clear()
    trainer.step()
    replay = [make for _, make in calls]
    whole, alone = [], []
    for _ in range(RUNS):
        recorded = len(calls)
        started = time.process_time()
        trainer.step()
        whole.append(time.process_time() - started)
        del calls[recorded:]
        started = time.process_time()
        for call in replay:
            call()
        alone.append(time.process_time() - started)
    ratios = [a / b for a, b in zip(whole, alone, strict=True)]
    counts: dict[str, int] = {}
    for name, _ in calls:
        counts[name] = counts.get(name, 0) + 1
    print(
        json.dumps(
            {
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "update_cpu_seconds": round(statistics.median(whole), 2),
                "network_cpu_seconds": round(statistics.median(alone), 2),
                "calls": counts,
                "images": SAMPLES,
                "steps": STEPS,
                "runs": RUNS,
                "threads": 1,
                "versions": versions(),
            }
        )
    )


def record(
    model: TextToImageUNet,
    reward: Any,
    environment: Environment,
    calls: list[tuple[str, Callable[[], Any]]],
) -> None:
    """Note every network call of an update as something that can be called again."""
    unet, vae = model.pipe.unet, model.pipe.vae
    call_unet, call_decode = unet.forward, vae.decode

    def forward(states: Tensor, timesteps: Tensor, **settings: Any) -> Any:
        with_gradient = torch.is_grad_enabled()
        context = settings["encoder_hidden_states"]
        adapter_off = model.score.adapter.is_off

        def again() -> None:
            with torch.set_grad_enabled(with_gradient):
                if adapter_off:
                    unet.disable_adapters()
                out = call_unet(states.detach(), timesteps, encoder_hidden_states=context).sample
                if adapter_off:
                    unet.enable_adapters()
                if with_gradient:
                    out.backward(torch.ones_like(out))

        calls.append(("unet with gradient" if with_gradient else "unet", again))
        return call_unet(states, timesteps, **settings)

    def decode(latents: Tensor, **settings: Any) -> Any:
        def again() -> None:
            with torch.no_grad():
                call_decode(latents)

        calls.append(("vae", again))
        return call_decode(latents, **settings)

    def recorded_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        def again() -> None:
            with torch.no_grad():
                reward(images, prompts)

        calls.append(("reward", again))
        return reward(images, prompts)

    unet.forward, vae.decode = forward, decode
    environment.reward = recorded_reward


if __name__ == "__main__":
    main()
