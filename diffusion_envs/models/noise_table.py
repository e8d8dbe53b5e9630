"""Noise levels of a model, read from the scheduler in its folder, whatever that one's class."""

from typing import Any

from torch import Tensor

from diffusion_envs.noise_schedules import DDPMTable

_ENDS_AS_CONFIGURED = ("DDIMScheduler", "PNDMScheduler")


def noise_table(scheduler: Any) -> DDPMTable:
    """The table of a folder's scheduler, as DDIM visits it.

    A DDIM or PNDM scheduler says itself which timesteps are visited and where sampling ends. Other
    classes (Euler, DPM-Solver++, UniPC, LCM, DDPM, ...) bring a table of their own that says
    neither in DDIM's terms; see ``trained_levels``.

    Raises:
        ValueError: there is no table, it ends at alpha = 0, or a DDIM scheduler clips.
    """
    if type(scheduler).__name__ in _ENDS_AS_CONFIGURED:
        return DDPMTable.from_diffusers(scheduler)
    return trained_levels(scheduler)


def trained_levels(scheduler: Any) -> DDPMTable:
    """The noise levels alone; steps begin and end as in Stable Diffusion.

    That is the offset 1 and an end at the table's first entry, where the last transition still has
    a density: diffusers' ``DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False,
    steps_offset=1, clip_sample=False)``. Whether the scheduler clips is not checked.

    Raises:
        ValueError: there is no table, or it ends at alpha = 0.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise ValueError(
            f"{type(scheduler).__name__} has no table of alphas_cumprod and is not supported; "
            "supported are schedulers of models trained with a table of betas (DDIM, DDPM, PNDM, "
            "Euler, DPMSolverMultistep, UniPC, LCM, ...), not of flow matching"
        )
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    return DDPMTable(
        table.detach().double().cpu(),
        final_is_one=False,
        steps_offset=max(1, int(scheduler.config.get("steps_offset") or 0)),
        spacing="trailing" if trailing else "leading",
    )
