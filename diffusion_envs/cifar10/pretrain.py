"""Pretrain a score network on CIFAR-10, over as many short runs as it takes.

The loss is the mean squared error of what the network predicts, with min-SNR weights; pictures are
mirrored at random. Every checkpoint leaves a whole pipeline of the averaged weights, so that
training can be stopped at any time.

Sources     Ho, Jain & Abbeel 2020, arXiv 2006.11239, equation 14. Hang et al. 2023, arXiv
            2303.09556, for the weights: min(SNR, 5) / SNR where epsilon is predicted, and
            min(SNR, 5) / (SNR + 1) for v.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from torch import Generator, Tensor, nn

from diffusion_envs.cifar10 import networks
from diffusion_envs.cifar10.pictures import Pictures
from diffusion_envs.runs.fit import Recipe, fit, initial_weights
from diffusion_envs.runs.run_folder import write_json
from diffusion_envs.runs.settings import describe, differences

_log = logging.getLogger(__name__)

SNR_CAP = 5.0  # of the min-SNR weights
PUBLISHED = Recipe(
    updates=800_000, learning_rate=2e-4, batch=128, warmup=0.00625, weight_decay=0.0, average=0.9999
)
SMALL = Recipe(updates=2600, learning_rate=1e-3, batch=32, average=0.999, precision=torch.float32)

RECIPES = {"small": SMALL, "published": PUBLISHED}
_BUILDERS = {"small": networks.small, "published": networks.published}


def prediction_loss(
    network: nn.Module,
    clean: Tensor,
    levels: Tensor,
    prediction_type: networks.Prediction,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Weighted and unweighted mean squared error of a prediction at random timesteps.

    Args:
        network: (noisy, timesteps) -> an output with ``sample``.
        clean: pictures in [-1, 1], ``[n, c, h, w]``, on the network's device.
        levels: alpha-bar by timestep.
        prediction_type: "epsilon" or "v_prediction".
        generator: of timesteps and noise, on the CPU.

    Raises:
        ValueError: the pictures are not in [-1, 1].
    """
    if not (clean.is_floating_point() and bool((clean.abs() <= 1).all())):
        low, high = clean.min().item(), clean.max().item()
        raise ValueError(
            f"clean must be pictures in [-1, 1], got {clean.dtype} from {low:g} to {high:g}; of "
            "bytes take pictures / 127.5 - 1"
        )
    timesteps = torch.randint(len(levels), (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    alpha_bar = levels[timesteps].to(clean.device)
    level = alpha_bar.view(-1, 1, 1, 1)
    noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
    snr = alpha_bar / (1 - alpha_bar)
    target, weight = noise, snr.clamp(max=SNR_CAP) / snr
    if prediction_type == "v_prediction":
        target, weight = level.sqrt() * noise - (1 - level).sqrt() * clean, weight * snr / (1 + snr)
    predicted = network(noisy, timesteps.to(clean.device)).sample.float()
    errors = (predicted - target).square().flatten(1).mean(1)
    return (weight * errors).mean(), errors.detach().mean()


def pretrain(
    data: Path,
    output: Path,
    network: str = "small",
    *,
    prediction_type: networks.Prediction = "v_prediction",
    recipe: Recipe | None = None,
    seed: int = 0,
) -> Path:
    """Train from scratch, or go on from the newest checkpoint in ``output``.

    Args:
        data: where CIFAR-10 lies (``data.load``).
        output: of the checkpoints and of the pipeline.
        network: "small", or "published" for the configuration of ``google/ddpm-cifar10-32``.
        prediction_type: what the network predicts, "epsilon" (as published) or "v_prediction".
        recipe: length, rate, batch; if left out, that of the network.
        seed: of all randomness.

    Returns:
        The folder of the pipeline with averaged weights, for ``DDPMPipeline.from_pretrained``.

    Raises:
        ValueError: there is no such network or prediction type, or ``output`` was trained with
            other settings.
        FileNotFoundError: the data are not there.
    """
    if network not in RECIPES:
        raise ValueError(f"network must be one of {', '.join(RECIPES)}, got {network!r}")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type must be epsilon or v_prediction, got {prediction_type!r}"
        )
    recipe = recipe or RECIPES[network]
    pictures = Pictures(data)
    settings = {"network": network, "prediction_type": prediction_type, "seed": seed}
    _require_settings(output, {**settings, "recipe": describe(recipe)})
    scheduler = networks.scheduler(prediction_type)
    levels = scheduler.alphas_cumprod

    def loss(modules: nn.ModuleDict, generator: Generator) -> dict[str, Tensor]:
        device = next(modules.parameters()).device
        clean = pictures.draw(recipe.batch, generator).to(device)
        weighted, mse = prediction_loss(modules["unet"], clean, levels, prediction_type, generator)
        return {"loss": weighted, "mse": mse}

    folder = output / "pipeline"

    def write(step: int, modules: nn.ModuleDict) -> None:
        unet = copy.deepcopy(modules["unet"]).cpu().half()
        assert isinstance(unet, UNet2DModel)
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        _log.info(f"pipeline of step {step} is in {folder}")

    with initial_weights(seed):
        modules = nn.ModuleDict({"unet": _BUILDERS[network]()})
    fit(
        modules,
        loss,
        recipe,
        folder=output / "training",
        seed=seed,
        name="pretraining",
        on_checkpoint=write,
    )
    return folder


def _require_settings(output: Path, settings: dict[str, Any]) -> None:
    """Store what is trained, or refuse to go on with something else.

    Raises:
        ValueError: ``output`` was trained with other settings; the first is named.
    """
    path = output / "pretraining.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    stored = json.loads(path.read_text())
    for name, then, now in differences(stored, settings):
        if not name.endswith("seconds_between_checkpoints"):
            raise ValueError(
                f"{output} was trained with {name} {then}, not {now}: go on with the same, or name "
                "another output"
            )
