"""A controller that keeps the path KL at a target by moving kl_weight.

Why          The kl_weight that leads to one distance is not known before the run: it depends on
             the reward's units. Of max E[r] subject to KL <= nats, it is the Lagrange multiplier;
             this finds it while training.
Update       w <- w exp(rate clip(KL / nats - 1, -1, 1)), after every update: an integral controller
             of log w, as [Zie19] section 2.2 (there w (1 + 0.1 clip(KL / nats - 1, -0.2, 0.2)): at
             most 2 % an update, here at most ``rate``).
Limits       The measured KL is that of the update's own samples, and answers to w only as fast as
             training does: with a rate much above 1 / (updates that the KL needs to settle) it
             swings about the target, the more the further training lags.
Source       [Zie19] Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences",
             arXiv 1909.08593.
"""

import dataclasses
import math
from dataclasses import dataclass

from diffusion_envs.objectives import Objective
from diffusion_envs.ranges import require_numbers


@dataclass(frozen=True)
class TargetKL:
    """Moves kl_weight after every update so that the path KL tends to ``nats``.

    Attributes:
        nats: path KL from the pretrained model to keep.
        rate: most that log kl_weight moves in an update.
        least: smallest kl_weight, reward per nat; where even a weight near 0 leaves the KL below
            the target, the weight waits here instead of falling for ever.
        most: largest kl_weight.
    """

    nats: float
    rate: float = 0.05
    least: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("nats", "rate", "least", "most"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        if not self.least < self.most:
            raise ValueError(f"least must be below most, got {self.least} and {self.most}")

    def next_weight(self, weight: float, measured: float) -> float:
        """kl_weight of the next update, where this one's samples were ``measured`` nats away.

        Raises:
            ValueError: ``measured`` is not a number of nats: negative, or not finite.
        """
        if not (measured >= 0 and math.isfinite(measured)):
            raise ValueError(f"measured must be finite and at least 0 nats, got {measured}")
        miss = min(measured / self.nats - 1, 1.0)
        return min(max(weight * math.exp(self.rate * miss), self.least), self.most)


def kl_weight(objective: Objective) -> float:
    """The weight that a controller may move.

    Raises:
        ValueError: the objective has none, or it is 0, which no factor changes.
    """
    settings = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    if "kl_weight" not in settings:
        raise ValueError(
            f"target_kl moves a kl_weight, and {type(objective).__name__} has none: leave out "
            "target_kl, or use an objective that charges a KL (ScoreAsAction)"
        )
    weight: float = settings["kl_weight"]
    if not weight > 0:
        raise ValueError(
            f"target_kl multiplies the kl_weight of {type(objective).__name__}, which must be "
            f"above 0 to begin with, got {weight}: set it, or leave out target_kl"
        )
    return weight


def require_steerable(objective: Objective) -> None:
    """Refuse an objective that no target can steer.

    Raises:
        ValueError: it has no kl_weight that a factor changes, or its roll-outs are not of the
            policy that is trained, so that nothing that is measured answers to the weight.
    """
    kl_weight(objective)
    if not objective.on_policy:
        raise ValueError(
            f"target_kl steers by the path KL of the roll-outs, and those of "
            f"{type(objective).__name__} are not of the policy that is trained: set kl_weight "
            "itself, or use an objective that samples from its own policy"
        )


def with_kl_weight(objective: Objective, weight: float) -> Objective:
    """The same objective with another weight."""
    return dataclasses.replace(objective, **{"kl_weight": weight})
