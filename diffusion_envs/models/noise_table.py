"""Noise levels of a model, read from the scheduler in its folder, whatever that one's class."""

import functools
import logging
from typing import Any

from torch import Tensor

from diffusion_envs.noise_schedules import DDPMTable

# alpha^2 that stands for 0, where no signal is left (``rescale_betas_zero_snr``): no float32 state
# tells them apart, and logarithms stay finite
NO_SIGNAL = 2.0**-60
_log = logging.getLogger(__name__)


def trained_levels(scheduler: Any) -> DDPMTable:
    """The noise levels alone; steps begin and end as in Stable Diffusion.

    That is the offset 1 and an end at the table's first entry, where the last transition still has
    a density: diffusers' ``DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False,
    steps_offset=1, clip_sample=False)``. Whether the scheduler clips is not checked.

    Raises:
        ValueError: there is no table.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise ValueError(
            f"{type(scheduler).__name__} has no table of alphas_cumprod and is not supported; "
            "supported are schedulers of models trained with a table of betas (DDIM, DDPM, PNDM, "
            "Euler, DPMSolverMultistep, UniPC, LCM, ...), not of flow matching"
        )
    table = table.detach().double().cpu()
    # of a table that ends at 0, diffusers' Euler, DPM-Solver and others have 2^-24 instead
    if scheduler.config.get("rescale_betas_zero_snr") or not table[-1]:
        table = table.clone()
        table[-1] = NO_SIGNAL
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    return DDPMTable(
        table,
        final_is_one=False,
        steps_offset=max(1, int(scheduler.config.get("steps_offset") or 0)),
        spacing="trailing" if trailing else "leading",
    )


def levels_and_prediction(model: str, scheduler: Any) -> tuple[DDPMTable, str]:
    """A model's noise levels, and what its network predicts in diffusers' words.

    What our sampler does otherwise than the scheduler is said, once for each model.

    Raises:
        ValueError: there is no table, or the network cannot say what it must where no signal is
            left.
    """
    table, predicts = trained_levels(scheduler), scheduler.config.get("prediction_type", "epsilon")
    if float(table.alphas_cumprod[-1]) <= NO_SIGNAL and predicts == "epsilon":
        raise ValueError(
            f"model {model} has noise levels that end without signal (rescale_betas_zero_snr) and "
            "predicts epsilon, which says nothing of the data there; it must predict v or the "
            "sample, or have rescale_betas_zero_snr false in scheduler_config.json"
        )
    if (settings := what_is_set(scheduler)) is not None:
        _say_what_is_set(model, settings)
    return table, predicts


def what_is_set(scheduler: Any) -> str | None:
    """What of a folder's scheduler is not used as it stands there; None if all is.

    A transition has a density if it is Gaussian with some noise left: it does not clip, and does
    not end at clean data.
    """
    config, ours = scheduler.config, []
    if type(scheduler).__name__ not in ("DDIMScheduler", "PNDMScheduler"):
        ours.append(f"DDIM on the noise levels of its {type(scheduler).__name__}")
    elif config.get("set_alpha_to_one", True):
        ours.append("set_alpha_to_one false")
    if (config.get("steps_offset") or 0) < 1 and config.get("timestep_spacing") != "trailing":
        ours.append("steps_offset 1")
    if config.get("timestep_spacing", "leading") == "linspace":
        ours.append("timestep_spacing leading")
    ours += [f"{name} false" for name in ("clip_sample", "thresholding") if config.get(name)]
    return ", ".join(ours) or None


@functools.cache
def _say_what_is_set(model: str, settings: str) -> None:
    _log.warning(
        "so that every step has a density, samples of %s are drawn with %s; the pipeline's own "
        "scheduler can still be used with what is exported",
        model,
        settings,
    )
