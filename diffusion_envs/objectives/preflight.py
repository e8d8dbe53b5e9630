"""Why the policy of a roll-out and that of the update differ before the first step: by experiment.

The same states are put to the model again: twice the same way, alone and together, with the adapter
and without, rounded, with the last bit of some coordinates changed. Which of the answers
agree says what is wrong: randomness, what a row meets in its batch, the arithmetic, the adapter.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import sent
from diffusion_envs.environment import Environment
from diffusion_envs.rollout import Rollout

_CHANGED = 256  # coordinates of a state whose last bit is changed: few, see ``half_precision``


@dataclass(frozen=True, eq=False)
class Experiments:
    """The states of a roll-out, put to the model again.

    Attributes:
        environment: that made the roll-out; its policy is the update's.
        rollout: what the policy answered then.
        paths: of it that are asked for alone.
        rounding: |difference| / |answer| that is no difference.
    """

    environment: Environment
    rollout: Rollout
    paths: int
    rounding: float

    @torch.no_grad()
    def together(
        self,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        rounded: torch.dtype = torch.float64,
    ) -> Float[Tensor, "paths steps *event"]:
        """As the roll-out asked: all of its paths at once, step by step; states rounded first."""
        rollout = self.rollout
        states = rollout.states.to(rounded).to(rollout.states.dtype)
        with within():
            answers = [
                self.environment.action(states[:, k], k, rollout.condition)
                for k in range(rollout.means.shape[1])
            ]
        return torch.stack(answers, dim=1)

    @torch.no_grad()
    def alone(self) -> Float[Tensor, "paths steps *event"]:
        """Every row by itself."""
        rollout, steps = self.rollout, self.rollout.means.shape[1]
        rows = [
            self.environment.action(rollout.states[i : i + 1, k], k, rollout.condition[i : i + 1])
            for i in range(self.paths)
            for k in range(steps)
        ]
        return torch.cat(rows).view_as(rollout.means[: self.paths])

    @torch.no_grad()
    def half_precision(
        self, within: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> bool:
        """Whether most predictions stay as they are when the last bits of their states change.

        A network whose inputs are rounded to a half type does not see the last bit of a float32
        number, but for one number in 2^13 (float16) or 2^16 (bfloat16) that lies on an edge.
        """
        rollout, environment = self.rollout, self.environment
        k = rollout.means.shape[1] // 2
        states = rollout.states[:, k]
        changed = states.flatten(1).clone()
        some = changed[:, :_CHANGED]
        changed[:, :_CHANGED] = torch.nextafter(some, torch.full_like(some, math.inf))
        timestep = sent(environment.steps.timesteps[k], environment.device).expand(len(states))
        condition = environment.condition_of(rollout.condition)
        with within():
            before, after = (
                environment.model.prediction(x, timestep, condition).flatten(1)
                for x in (states, changed.view_as(states))
            )
        return bool((before == after).all(1).double().mean() > 0.5)

    def rounded_then(self, now: Tensor) -> torch.dtype | None:
        """The half type that the roll-out was computed in, if the update is not.

        The first thing that such a network does is to round its input. What that alone makes of the
        update's scores is then a part of the difference to the roll-out's; with a difference of
        another origin it has no correlation, but for 6 standard errors.
        """
        off = (self.rollout.means - now).flatten()
        for dtype in (torch.bfloat16, torch.float16):
            part = (self.together(rounded=dtype) - now).flatten()
            if torch.cosine_similarity(part, off, dim=0) > 6 / off.numel() ** 0.5:
                return dtype
        return None


def why_ratio(tried: Experiments) -> str:
    """Why the update's policy answers otherwise than the roll-out's; begins with the cause."""
    rollout, precision = tried.rollout, tried.environment.model.precision
    now = tried.together()
    if (gap := difference(tried.together(), now)) > tried.rounding:
        return _randomness(gap)
    half = precision == torch.float32 and tried.half_precision()
    changed = difference(now, rollout.means)
    if changed <= tried.rounding:
        return _batch(tried, half, now)
    if half:
        return _undeclared("the update's network", changed)
    if precision == torch.float32 and (dtype := tried.rounded_then(now)) is not None:
        return (
            f"dtype: the roll-out was computed in {str(dtype).removeprefix('torch.')}, the update "
            f"is in float32, and scores differ by {changed:.2g} of their size; use one precision"
        )
    pretrained, before = tried.together(tried.environment.pretrained), rollout.reference_scores
    if before is not None and difference(pretrained, before) > tried.rounding:
        return (
            "weights: the same rows, asked for in the same way, have scores that differ from the "
            f"roll-out's by {changed:.2g} of their size, and without the adapter too: other "
            "weights than the adapter's were changed in between"
        )
    if difference(pretrained, rollout.means) <= tried.rounding:
        return (
            "adapter: the roll-out was the pretrained model's, but with the adapter scores differ "
            f"from it by {changed:.2g} of their size: it was off, or was changed since"
        )
    which = "adapter, or other weights" if before is None else "adapter"
    return (
        f"{which}: scores differ from the roll-out's by {changed:.2g} of their size, and the "
        f"adapter now changes them by {difference(now, pretrained):.2g}: something was switched "
        "or changed in between"
    )


def why_path_kl(tried: Experiments) -> str:
    """Why a fresh adapter's path KL is not 0; begins with the cause."""
    own, pretrained = tried.together(), tried.together(tried.environment.pretrained)
    if (gap := difference(tried.together(), own)) > tried.rounding:
        return _randomness(gap)
    half = tried.environment.model.precision == torch.float32 and tried.half_precision()
    changed = difference(own, pretrained)
    if changed <= tried.rounding:
        return _batch(tried, half, own)
    other = tried.half_precision(tried.environment.pretrained)
    if half != other and tried.environment.model.precision == torch.float32:
        return _undeclared("one of policy and pretrained model", changed)
    return (
        f"adapter: switched on it changes scores by {changed:.2g} of their size, in one and the "
        "same batch: it is not fresh, or the pretrained model is another one"
    )


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest |difference| / |answer| of a row."""
    gap, size = (x.flatten(2).norm(dim=2) for x in (ours - theirs, theirs))
    return float((gap / size.clamp(min=torch.finfo(size.dtype).tiny)).max())


def _randomness(gap: float) -> str:
    return (
        f"dropout: two calls with the same rows differ by {gap:.2g} of their size: a module is in "
        "training mode, or random in another way; call eval() on the network"
    )


def _batch(tried: Experiments, half: bool, together: Tensor) -> str:
    gap = difference(tried.alone(), together[: tried.paths])
    if half:
        return _undeclared("the network", gap)
    return (
        f"batch: rows that are asked for alone and together with others differ by {gap:.2g} of "
        "their size: something in the network mixes rows, as batch normalisation in training mode "
        "does, or its kernels round more than is allowed for"
    )


def _undeclared(what: str, gap: float) -> str:
    return (
        f"dtype: {what} computes in a half type though precision is float32, and rounds "
        f"{gap:.2g} of a score's size away; say precision='bfloat16', or load it in float32"
    )
