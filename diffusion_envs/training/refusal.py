"""Steps that are refused: what was to be learned from, for whoever wants to see or repeat it."""

from dataclasses import dataclass

from diffusion_envs.rollout import Rollout


class NonFiniteError(FloatingPointError):
    """A gradient is not finite; the weights were not touched."""


@dataclass(frozen=True, eq=False)
class RefusedStep:
    """An update that was refused before its optimiser's step, on all processes together.

    Attributes:
        update: its number, from 1.
        reason: in words.
        process: whose share of the samples this is.
        samples: their global indices, which with seed and stream name all noise of theirs.
        stream: of this noise.
        prompts: of the samples.
        rollout: that was to be learned from.
    """

    update: int
    reason: str
    process: int
    samples: range
    stream: str
    prompts: list[str]
    rollout: Rollout
