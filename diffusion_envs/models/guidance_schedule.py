"""Classifier-free guidance as a policy: its scale at every noise level trains.

Policy       score = s(x) + (guidance + w(t)) (s(x | prompt) - s(x)), where w is 0 at first and
             linear in the timestep between a few knots.
Why          s(x | prompt) - s(x) is the gradient of log p(prompt | x) under the model itself: for a
             reward that asks for the prompt a good direction is known, and only how far to go along
             it, and when, is to be learned. A gradient from sampled rewards has noise in every
             parameter, which is paid for in nats of path KL; there are a handful of parameters
             here, where a LoRA has tens of thousands.
Cost         Two network calls a state instead of one, where the pretrained model has guidance 1;
             otherwise none.
In diffusers Pipelines take one scale; a callback changes it from step to step (docs/run_folder.md
             has the lines). They use no guidance at scales of 1 or less.
"""

import json
import logging
import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_envs.whole_files import whole

GUIDANCE_FILE = "guidance_schedule.json"
UNIT = 30.0  # of scale for a parameter of 1: an optimiser's step of 1e-3 is 0.03 of scale
_log = logging.getLogger(__name__)


def require_knots(knots: object) -> None:
    """Refuse what is no number of knots.

    Raises:
        ValueError: it is neither 0, for no schedule, nor an integer of at least 2.
    """
    if isinstance(knots, bool) or not isinstance(knots, int) or knots < 0 or knots == 1:
        raise ValueError(
            f"guidance_knots must be 0 (the scale does not train) or an integer of at least 2 "
            f"(one for each end of the noise levels), got {knots!r}"
        )


def require_guidance(guidance: float) -> None:
    """Refuse scales that diffusers does not use.

    Raises:
        ValueError: the scale is not finite, or below 1.
    """
    if not (math.isfinite(guidance) and guidance >= 1):
        raise ValueError(
            f"guidance must be a finite number of at least 1, got {guidance}; 1 is no guidance, "
            "and below 1 diffusers uses none either, so that its images would be others than "
            "those that were trained"
        )


def require_something_trains(
    network_trains: bool, guidance_knots: object, sharded: bool = False
) -> None:
    """Refuse numbers of knots that are none, and a model of which nothing trains.

    Raises:
        ValueError: there is no such number of knots, or neither the network nor the scale trains;
            or the scale would train beside sharded weights.
    """
    require_knots(guidance_knots)
    if sharded and guidance_knots != 0:
        raise ValueError(
            f"guidance_knots must be 0 with sharded, got {guidance_knots}: one step of the "
            "optimiser takes sharded parameters or whole ones"
        )
    if not network_trains and guidance_knots == 0:
        raise ValueError(
            "lora_rank must be at least 1 where the guidance scale does not train, got 0; set "
            "guidance_knots to train that alone"
        )


class GuidanceSchedule(nn.Module):
    """What training adds to the guidance scale at a timestep.

    Args:
        timesteps: of the model's table.
        knots: evenly from the first timestep to the last; linear in between.
    """

    def __init__(self, timesteps: int, knots: int) -> None:
        super().__init__()
        self.last = timesteps - 1
        self.offsets = nn.Parameter(torch.zeros(knots))

    def forward(self, timesteps: Tensor) -> Float[Tensor, " rows"]:
        """w at the timesteps of some rows, which may be fractional."""
        knots = len(self.offsets)
        place = (timesteps.to(self.offsets) / self.last).clamp(0, 1) * (knots - 1)
        left = place.floor().clamp(max=knots - 2)
        share, index = place - left, left.long()
        return UNIT * torch.lerp(self.offsets[index], self.offsets[index + 1], share)

    def write(self, folder: Path, guidance: float) -> Path:
        """Write timesteps and scales of the knots into a folder, for plain diffusers.

        Args:
            folder: gets ``guidance_schedule.json``.
            guidance: of the pretrained model.

        Returns:
            The file.
        """
        scales = (guidance + UNIT * self.offsets.detach().double()).tolist()
        if min(scales) <= 1:
            _log.warning(
                "the guidance scale was trained to %.3g at some noise level; diffusers' pipelines "
                "use no guidance at 1 or less, so that their images will differ there",
                min(scales),
            )
        knots = torch.linspace(0, self.last, len(scales), dtype=torch.float64).tolist()
        path = folder / GUIDANCE_FILE
        with whole(path) as partial:
            partial.write_text(json.dumps({"timestep": knots, "scale": scales}, indent=1) + "\n")
        return path
