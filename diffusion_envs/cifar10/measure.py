"""What an unconditional network can do at several samplers: quality of samples, a grid of them."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs import samplers
from diffusion_envs.cifar10.data import load
from diffusion_envs.cifar10.family import JUDGE, PROMPTS, Cifar10Model
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import DDPO
from diffusion_envs.runs.contact_sheet import grid
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.run_folder import versions, write_json
from diffusion_envs.runs.sample_quality import RealStatistics, classifier_features, sample_quality
from diffusion_envs.training import parallel

SETTINGS: tuple[tuple[samplers.Sampler, int], ...] = (
    (samplers.QuadraticVariances(), 10),
    (samplers.EqualAngles(), 4),
    (samplers.DDIM(1.0), 10),
    (samplers.DDIM(1.0), 50),
)
SHOWN, BATCH = 40, 64


def held_out(environment: Environment, samples: int) -> Float[Tensor, "n 3 32 32"]:
    """Pictures on noise that no training sees, on the CPU; their calls are not counted.

    The noise is that of the environment's seed.
    """
    spent, parts = environment.model.calls, list[Tensor]()
    for first in range(0, samples, BATCH):
        rows = range(first, min(first + BATCH, samples))
        which = torch.zeros(len(rows), dtype=torch.int64)
        policy = DDPO().policy  # the mean: as every objective's that draws no actions
        sample = environment.sample(policy, rows, which, stream="held out", reference=False)
        parts.append(sample.images.cpu())
    environment.uncount(spent)
    return torch.cat(parts)


def measure(
    model: Cifar10Model, data: Path, output: Path, samples: int, seed: int
) -> dict[str, Any]:
    """Measure everything that ``docs/cifar10.md`` publishes; write ``cifar10.json`` and ``.png``.

    Args:
        model: whose samples are judged.
        data: folder of CIFAR-10; samples are compared with its test set.
        output: folder of the results.
        samples: pictures of each sampler.
        seed: of the samples.

    Raises:
        ValueError: there are too few samples for the features that they are compared by.
    """
    features = classifier_features()
    real = RealStatistics.of(load(data, "test").images, features)
    train = load(data, "train", limit=samples).images.float() / 255
    measured: dict[str, Any] = {
        "model": model.label,
        "versions": versions(),
        "training pictures": sample_quality(train, real, features),
    }
    loaded = model.load(device=parallel.start(model.device).device, batch=256, seed=seed)
    for sampler, steps in SETTINGS:
        environment = make_environment(
            loaded, sampler=sampler, steps=steps, reward=JUDGE, prompts=PROMPTS, seed=seed
        )
        pictures = held_out(environment, samples)
        name = f"{sampler.label}, {steps} steps"
        measured[name] = sample_quality(pictures, real, features)
        if sampler == SETTINGS[0][0]:
            sheet = grid(pictures[:SHOWN], [""] * min(SHOWN, samples), columns=10)
            sheet.save(output / "cifar10.png")
    write_json(output / "cifar10.json", measured)
    return measured
