"""Stable Diffusion as an environment: fine-tune it with ``finetune``, or from the command line."""

from pathlib import Path
from typing import Any

from diffusion_envs.models.trainable import LEARNING_RATE_OF_ALL
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.runs.finetune import Run, refuse_misplaced
from diffusion_envs.runs.finetune import finetune as _finetune
from diffusion_envs.sd15.stable_diffusion import StableDiffusion

__all__ = ["Run", "StableDiffusion", "finetune", "preset"]


def preset(name: str | Path, *options: str) -> dict[str, Any]:
    """Arguments of ``finetune`` but ``output``, from a preset (``runs.presets``).

    ``sd15.finetune(output="runs/jpeg", **sd15.preset("jpeg", "--updates", "20"))``

    Args:
        name: of one that ships, or the path of one's own.
        options: of the command line, which win over it.

    Raises:
        FileNotFoundError: there is no such preset, or no such model of a reward.
        ValueError: an option is unknown or out of range.
    """
    from diffusion_envs.runs.command_line import Family, read  # tyro takes a while to import

    family = Family("sd15.preset", StableDiffusion)
    made = read(family, ["--preset", str(name), *options, "--output", "runs"]).arguments()
    return {argument: value for argument, value in made.items() if argument != "output"}


def finetune(model: str | Path | StableDiffusion = "tiny", **arguments: Any) -> Run:
    """``runs.finetune.finetune``, which documents ``arguments``, with a Stable Diffusion model.

    Where all weights train, the objective is ``ScoreAsAction(learning_rate=1e-5)`` if left out; any
    other should have such a rate.

    Args:
        model: "tiny", "words", a folder in diffusers' layout, or a hub id; ``StableDiffusion`` for
            other guidance, adapter, precision or device.
        arguments: reward, prompts, output, objective, sampler, steps, updates, size, options, seed,
            resume.

    Raises:
        TypeError: an argument belongs elsewhere, or is of another kind; the message says what to
            write.
    """
    refuse_misplaced(arguments, StableDiffusion, "sd15.StableDiffusion(...)")
    named = model if isinstance(model, StableDiffusion) else StableDiffusion(model)
    if named.trains == "all" and arguments.get("objective") is None:
        arguments["objective"] = ScoreAsAction(learning_rate=LEARNING_RATE_OF_ALL)
    return _finetune(named, **arguments)
