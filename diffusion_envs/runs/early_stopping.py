"""When to stop: a judge falls while the reward still rises, or the path KL passes a limit.

The model is looked at every few updates, on held-out seeds that neither training nor the last
evaluation uses; so the choice of the best look does not flatter the final numbers. The pretrained
model is the first look.

A judge has fallen when the mean of its paired differences (same seeds) between the newest look and
that judge's best one is below -z standard errors. Choosing the best of k looks is k chances to be
wrong, so by the union bound, if nothing changes between looks and the differences are normal,

    P(stop within K looks) <= judges K (K + 1) / 2 P(T > z),   T Student's with samples - 1 degrees

however the looks depend on each other (``StopRule.false_stop_bound``). The bound is about the
noise of looking: where training itself makes the model fluctuate, a fall of its judge is real.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from scipy.special import stdtr
from torch import Tensor

from ctrl import Estimate
from diffusion_envs.runs.evaluation import Evaluation


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen after some updates: one number per held-out sample, of the same seeds."""

    update: int
    rewards: Float[Tensor, " n"]
    judged: Mapping[str, Float[Tensor, " n"]]
    path_kl: Float[Tensor, " n"]  # nats

    @classmethod
    def of(cls, update: int, seen: Evaluation) -> "Look":
        """An evaluation, without its pictures."""
        return cls(update, seen.rewards, dict(seen.judged), seen.path_kl)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; ``Look(**state)`` is the look again."""
        return {
            "update": self.update,
            "rewards": self.rewards,
            "judged": dict(self.judged),
            "path_kl": self.path_kl,
        }


@dataclass(frozen=True)
class Decision:
    """What the looks so far say.

    Attributes:
        best: update of the look whose model is worth keeping.
        reason: to stop, in words; None to go on.
    """

    best: int
    reason: str | None = None


@dataclass(frozen=True)
class StopRule:
    """Stop when reward is bought from the judges, or too far from the pretrained model.

    Attributes:
        z: standard errors by which a judge must have fallen from its best look. None: judges choose
            the best look, but end nothing.
        max_path_kl: nats; the mean path KL beyond which to stop. None for no limit.
        every: updates between looks.
        samples: held-out samples of a look.
    """

    z: float | None = 3.5
    max_path_kl: float | None = None
    every: int = 10
    samples: int = 64

    def __post_init__(self) -> None:
        for name, value in (("z", self.z), ("max_path_kl", self.max_path_kl)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        for name, least in (("every", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def decide(self, looks: Sequence[Look]) -> Decision:
        """Stop or go on, and which look is best.

        Best is the highest mean over judges, each in units of its spread over the pretrained
        model's samples; the reward itself where there is no judge. Looks beyond ``max_path_kl``
        are not eligible; of equals the earliest is best.

        Args:
            looks: oldest first; the first is the pretrained model.

        Raises:
            ValueError: there is no look.
        """
        if not looks:
            raise ValueError("looks must hold at least one, the pretrained model")
        eligible = [look for look in looks if not self._too_far(look)] or list(looks[:1])
        best = max(eligible, key=lambda look: _merit(look, looks[0])).update
        now = looks[-1]
        reasons = [
            words
            for name in now.judged
            if (words := self._fallen(name, looks[:-1], now)) is not None
        ]
        if self._too_far(now):
            nats = Estimate.of(now.path_kl)
            reasons.append(f"the path KL, {nats} nats, passed its limit of {self.max_path_kl:g}")
        return Decision(best, "; ".join(reasons) or None)

    def false_stop_bound(self, updates: int, judges: int) -> float:
        """Bound on the probability that noise alone stops a run through its judges."""
        looks = updates // self.every
        pairs = looks * (looks + 1) / 2
        if self.z is None:
            return 0.0
        return min(1.0, judges * pairs * float(stdtr(self.samples - 1, -self.z)))

    def _too_far(self, look: Look) -> bool:
        return self.max_path_kl is not None and look.path_kl.mean().item() > self.max_path_kl

    def _fallen(self, name: str, before: Sequence[Look], now: Look) -> str | None:
        """Words, if this judge has fallen from its best look while the reward rose."""
        if not before or self.z is None:
            return None
        best = max(before, key=lambda look: look.judged[name].double().mean().item())
        fall = Estimate.of(now.judged[name] - best.judged[name])
        rise = Estimate.of(now.rewards - best.rewards)
        if not (fall.mean < -self.z * fall.standard_error and rise.mean > 0):
            return None
        errors = -fall.mean / fall.standard_error if fall.standard_error else math.inf
        return (
            f"judge {name} had fallen by {-fall.mean:.3g} ({errors:.1f} standard errors) from its "
            f"best, at update {best.update}, while the reward rose by {rise.mean:.3g}"
        )


def _merit(look: Look, pretrained: Look) -> float:
    """Mean over judges in units of their spread, or the reward."""
    if not look.judged:
        return look.rewards.double().mean().item()
    parts = []
    for name, values in look.judged.items():
        spread = pretrained.judged[name].double().std().item()
        parts.append(values.double().mean().item() / (spread or 1.0))
    return sum(parts) / len(parts)


class Watch:
    """The looks of a run: made on time, kept with its checkpoints, the best model beside them.

    Args:
        rule: when to look, and when to stop.
        look: (updates done, the pretrained model instead?) -> what is seen.
        keep: stores the model as the best of this many updates.
    """

    def __init__(
        self,
        rule: StopRule,
        look: Callable[[int, bool], Look],
        keep: Callable[[int], None],
    ) -> None:
        self.rule, self._look, self._keep = rule, look, keep
        self.looks: list[Look] = []

    @property
    def decision(self) -> Decision:
        """Of the looks so far."""
        return self.rule.decide(self.looks)

    def begin(self) -> None:
        """Look at the pretrained model, unless a checkpoint brought that look back."""
        if not self.looks:
            self.looks.append(self._look(0, True))
            self._keep(0)

    def after(self, update: int) -> Decision | None:
        """Look if it is time; None if it is not."""
        if update % self.rule.every:
            return None
        self.looks.append(self._look(update, False))
        decision = self.decision
        if decision.best == update:
            self._keep(update)
        return decision

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [look.state() for look in self.looks]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a checkpoint."""
        self.looks = [Look(**look) for look in state]


def check(rule: StopRule, judges: Mapping[str, Any]) -> None:
    """Refuse a rule that has nothing to watch.

    Raises:
        ValueError: no judge is watched, and there is no limit of the path KL.
    """
    if rule.max_path_kl is None and (not judges or rule.z is None):
        raise ValueError(
            "stop needs a judge to watch (and a z), or a max_path_kl; there is neither"
        )
