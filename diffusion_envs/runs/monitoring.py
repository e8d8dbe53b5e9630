"""What a run shows as it goes on: numbers, pictures, and what becomes of held-out seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl import Estimate
from diffusion_envs.environment import Environment
from diffusion_envs.runs import perceptual
from diffusion_envs.runs.callbacks import Callback
from diffusion_envs.runs.evaluation import Evaluation, evaluate, evaluate_pretrained
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.over_optimisation import embeddings, metrics
from diffusion_envs.runs.tracking import Tracker
from diffusion_envs.training.phase import phase
from diffusion_envs.training.trainer import Trainer

PICTURES = 32  # in the grid of a step


class Logging(Callback):
    """Every update's numbers, and its rewards by prompt where there are several.

    Args:
        tracker: where they go.
        trainer: that has the rewards of its last update.
        places: index of each of its prompts among all of the run.
    """

    def __init__(self, tracker: Tracker, trainer: Trainer, places: Sequence[int]) -> None:
        self._tracker, self._trainer, self._places = tracker, trainer, places

    def after(self, numbers: Mapping[str, Any]) -> None:
        """Log one line."""
        self._tracker.log(numbers)
        if len(self._places) > 1:
            rewards = self._trainer.rewards_by_prompt
            by_prompt = {self._places[k]: each for k, each in rewards.items()}
            self._tracker.by_prompt(numbers["update"], by_prompt)


class Evaluations(Callback):
    """Held-out seeds: the pretrained model, pictures and over-optimisation metrics on the way.

    Args:
        trainer: whose model is evaluated.
        environment: with the prompts of held-out samples.
        tracker: where pictures and numbers go.
        folder: of the run.
        options: judges, numbers of samples, and how often.
        batch: samples rolled out at once.
        total: updates after which the last evaluation is made, by ``last``.
    """

    def __init__(
        self,
        trainer: Trainer,
        environment: Environment,
        tracker: Tracker,
        folder: Path,
        options: RunOptions,
        batch: int,
        total: int,
    ) -> None:
        self._trainer, self._tracker, self._folder = trainer, tracker, folder
        self._environment = environment
        self._options, self._batch, self._total = options, batch, total
        self._embedders = embeddings(self._environment.reward, options.judges)
        self._stlpips = None
        if options.distance is not None:
            self._stlpips = perceptual.load(perceptual.weights_file())
        self.before: Evaluation | None = None

    @phase("evaluation")
    def begin(self) -> None:
        """Evaluate the pretrained model, or read what an earlier part of this run has stored."""
        self.before = evaluate_pretrained(
            self._environment,
            self._options.evaluation_samples,
            self._folder / "evaluation" / "before.safetensors",  # only the export lies at the top
            judges=self._options.judges,
            batch=self._batch,
            accelerator=self._trainer.accelerator,
        )
        if self._stlpips is not None:
            perceptual.require_pictures(self.before.images)
        if self._trainer.update == 0:
            self._show(0, self.before)

    @phase("evaluation")
    def after(self, numbers: Mapping[str, Any]) -> None:
        """Pictures and metrics of some held-out seeds, if it is time."""
        update = numbers["update"]
        if self.before is None or update % self._options.picture_every or update >= self._total:
            return
        now = self._evaluate(min(PICTURES, self._options.evaluation_samples))
        self._show(update, now)
        self._tracker.over_optimisation(update, self._metrics(self.before, now))

    @phase("evaluation")
    def last(self, *, finished: bool) -> tuple[Evaluation, Evaluation, dict[str, Estimate]]:
        """The pretrained model, the one to export, and the metrics of the latter.

        They are logged if the run is finished: not if an earlier model is exported.
        """
        before, after = self.before, self._evaluate(self._options.evaluation_samples)
        assert before is not None  # of ``begin``
        self._show(self._trainer.update, after, last=True)
        numbers = self._metrics(before, after)
        if finished:
            self._tracker.over_optimisation(self._trainer.update, numbers)
        return before, after, numbers

    def _metrics(self, before: Evaluation, after: Evaluation) -> dict[str, Estimate]:
        seconds = self._environment.reward_timeout
        world = self._trainer.accelerator
        return metrics(before, after, self._embedders, self._stlpips, seconds, world)

    def _evaluate(self, samples: int) -> Evaluation:
        judges = self._options.judges
        with self._trainer.averaged():
            return evaluate(
                self._environment,
                samples,
                judges=judges,
                batch=self._batch,
                accelerator=self._trainer.accelerator,
            )

    def _show(self, update: int, seen: Evaluation, *, last: bool = False) -> None:
        images, prompts = seen.images[:PICTURES], seen.prompts[:PICTURES]
        self._tracker.pictures(update, images, prompts, last=last)
