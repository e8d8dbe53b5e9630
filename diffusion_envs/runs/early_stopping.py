"""When to stop: a judge falls while the reward still rises, or the path KL passes a limit.

The model is evaluated every few updates, on held-out seeds that neither training nor the last
evaluation uses; so the choice of the best evaluation does not flatter the final numbers. The
pretrained model's is the first.

A judge has fallen when the mean of its paired differences (same seeds) between the newest
evaluation and that judge's best one is below -z standard errors. Choosing the best of k is k
chances to be wrong, so by the union bound, if nothing changes from one evaluation to the next and
the differences are normal,

    P(stop within K evaluations) <= judges K (K + 1) / 2 P(T > z)

with T of Student's law with samples - 1 degrees, however the evaluations depend on each other
(``StopRule.false_stop_bound``). The bound is about the noise of evaluation: where training itself
makes the model fluctuate, a fall of its judge is real.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from scipy.special import stdtr
from torch import Tensor

from ctrl import Estimate
from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.ranges import require_numbers
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.callbacks import Callback
from diffusion_envs.runs.evaluation import WATCHED, Evaluation, evaluate
from diffusion_envs.training.phase import phase
from diffusion_envs.training.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Scores:
    """A model's after some updates: one number per held-out sample, of the same seeds."""

    update: int
    rewards: Float[Tensor, " n"]
    judged: Mapping[str, Float[Tensor, " n"]]
    path_kl: Float[Tensor, " n"]  # nats

    @classmethod
    def of(cls, update: int, evaluation: Evaluation) -> "Scores":
        """Those of an evaluation, without its pictures."""
        return cls(update, evaluation.rewards, dict(evaluation.judged), evaluation.path_kl)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; ``Scores(**state)`` are the same again."""
        return {
            "update": self.update,
            "rewards": self.rewards,
            "judged": dict(self.judged),
            "path_kl": self.path_kl,
        }


@dataclass(frozen=True)
class Decision:
    """What follows from the evaluations so far.

    Attributes:
        best: update of the evaluation whose model is worth keeping.
        reason: to stop, in words; None to go on.
    """

    best: int
    reason: str | None = None


@dataclass(frozen=True)
class StopRule:
    """Stop when reward is bought from the judges, or too far from the pretrained model.

    Attributes:
        z: standard errors by which a judge must have fallen from its best evaluation, while the
            reward rises, to stop (3.5 is a good value). None: judges choose the best model, but end
            nothing.
        max_path_kl: nats; the mean path KL beyond which to stop. None for no limit.
        every: updates between evaluations.
        samples: held-out samples of an evaluation.
    """

    z: float | None = 3.5
    max_path_kl: float | None = None
    every: int = 10
    samples: int = 64

    def __post_init__(self) -> None:
        require_numbers(self)
        for name, value in (("z", self.z), ("max_path_kl", self.max_path_kl)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number, got {value}")
        for name, least in (("every", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def decide(self, scores: Sequence[Scores]) -> Decision:
        """Stop or go on, and which model is best.

        Best is the highest mean over judges, each in units of its standard deviation over the
        pretrained model's samples; the reward itself where there is no judge. Models beyond
        ``max_path_kl`` are not eligible; of equals the earliest is best.

        Args:
            scores: oldest first; the first are the pretrained model's.

        Raises:
            ValueError: there are none.
        """
        if not scores:
            raise ValueError("scores must hold at least one, the pretrained model's")
        eligible = [each for each in scores if not self._too_far(each)] or list(scores[:1])
        best = max(eligible, key=lambda each: _merit(each, scores[0])).update
        now = scores[-1]
        reasons = [
            words
            for name in now.judged
            if (words := self._fallen(name, scores[:-1], now)) is not None
        ]
        if self._too_far(now):
            nats = Estimate.of(now.path_kl)
            reasons.append(f"the path KL, {nats} nats, passed its limit of {self.max_path_kl:g}")
        return Decision(best, "; ".join(reasons) or None)

    def false_stop_bound(self, updates: int, judges: int) -> float:
        """Bound on the probability that noise alone stops a run through its judges."""
        evaluations = updates // self.every
        pairs = evaluations * (evaluations + 1) / 2
        if self.z is None:
            return 0.0
        return min(1.0, judges * pairs * float(stdtr(self.samples - 1, -self.z)))

    def _too_far(self, scores: Scores) -> bool:
        return self.max_path_kl is not None and scores.path_kl.mean().item() > self.max_path_kl

    def _fallen(self, name: str, before: Sequence[Scores], now: Scores) -> str | None:
        """Words, if this judge has fallen from its best mean while the reward rose."""
        if not before or self.z is None:
            return None
        best = max(before, key=lambda each: each.judged[name].double().mean().item())
        fall = Estimate.of(now.judged[name] - best.judged[name])
        rise = Estimate.of(now.rewards - best.rewards)
        if not (fall.mean < -self.z * fall.standard_error and rise.mean > 0):
            return None
        errors = -fall.mean / fall.standard_error if fall.standard_error else math.inf
        return (
            f"judge {name} had fallen by {-fall.mean:.3g} ({errors:.1f} standard errors) from its "
            f"best, at update {best.update}, while the reward rose by {rise.mean:.3g}"
        )


def _merit(scores: Scores, pretrained: Scores) -> float:
    """Mean over judges in units of their standard deviation, or the reward."""
    if not scores.judged:
        return scores.rewards.double().mean().item()
    parts = []
    for name, values in scores.judged.items():
        deviation = pretrained.judged[name].double().std().item()
        parts.append(values.double().mean().item() / (deviation or 1.0))
    return sum(parts) / len(parts)


class EarlyStopping(Callback):
    """Evaluates the model on time, keeps the best one, and ends the run when the rule says so.

    Args:
        rule: when to evaluate, and when to stop.
        measure: (updates done, the pretrained model instead?) -> its scores.
        keep: stores the model as the best of this many updates.
    """

    def __init__(
        self,
        rule: StopRule,
        measure: Callable[[int, bool], Scores],
        keep: Callable[[int], None],
    ) -> None:
        self.rule, self._measure, self._keep = rule, measure, keep
        self.scores: list[Scores] = []

    @classmethod
    def of(
        cls,
        rule: StopRule,
        trainer: Trainer,
        environment: Environment,
        folder: Path,
        judges: Mapping[str, rewards.Reward],
        batch: int,
    ) -> "EarlyStopping":
        """On seeds of its own; the state of the best model is kept in ``folder``.

        Args:
            rule: when to evaluate, and when to stop.
            trainer: whose model is evaluated.
            environment: with the prompts of held-out samples.
            folder: of the best model.
            judges: rewards that only judge, by name.
            batch: samples rolled out at once.
        """

        def measure(update: int, pretrained: bool) -> Scores:
            with trainer.averaged():
                evaluation = evaluate(
                    environment,
                    rule.samples,
                    judges=judges,
                    batch=batch,
                    pretrained=pretrained,
                    stream=WATCHED,
                    accelerator=trainer.accelerator,
                )
            return Scores.of(update, evaluation)

        def keep(update: int) -> None:
            state = trainer.state()  # of sharded weights all processes have to ask
            if trainer.accelerator.process_index == 0:
                # two, because the newest is written before the checkpoint that says it is the best
                checkpoint.save(folder, update, state, keep=2)

        return cls(rule, measure, keep)

    @property
    def decision(self) -> Decision:
        """The rule's decision on the scores so far."""
        return self.rule.decide(self.scores)

    @phase("evaluation")
    def begin(self) -> str | None:
        """Score the pretrained model, unless a checkpoint brought that back."""
        if not self.scores:
            self.scores.append(self._measure(0, True))
            self._keep(0)
        return self.decision.reason

    @phase("evaluation")
    def evaluate(self, update: int) -> Decision | None:
        """Score the model if it is time; None if it is not."""
        if update % self.rule.every:
            return None
        self.scores.append(self._measure(update, False))
        decision = self.decision
        if decision.best == update:
            self._keep(update)
        return decision

    def after(self, numbers: Mapping[str, Any]) -> str | None:
        """The reason to stop, if it is time and there is one."""
        decision = self.evaluate(numbers["update"])
        return None if decision is None else decision.reason

    def summary(self, update: int, reason: str | None, updates: int, judges: int) -> dict[str, Any]:
        """For the summary: when and why it stopped, and how often noise alone makes it stop."""
        when, bound = (
            None if reason is None else update,
            self.rule.false_stop_bound(updates, judges),
        )
        return {"update": when, "reason": reason, "false_stop_bound": bound}

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint holds: the scores so far."""
        return [scores.state() for scores in self.scores]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a checkpoint."""
        self.scores = [Scores(**scores) for scores in state]


def check(rule: StopRule, judges: Mapping[str, Any]) -> None:
    """Refuse a rule that has nothing to watch.

    Raises:
        ValueError: no judge is watched, and there is no limit of the path KL.
    """
    if rule.max_path_kl is None and (not judges or rule.z is None):
        raise ValueError(
            "stop needs a judge to watch (and a z), or a max_path_kl; there is neither"
        )
