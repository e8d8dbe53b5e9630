"""The compared methods, and one run of one of them.

Every run starts from the same pretrained model and gets the same adapter, optimiser and evaluation;
its learning rate falls linearly to 0 with the share of its budget that is spent. The policy is
evaluated on one sampler, whatever it was trained on.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from diffusion_envs import objectives as o
from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.exact import GaussianProblem, MixtureProblem, Outcome, table
from diffusion_envs.models.folders import tiny_folder
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.runs.method_names import CLASS_PROMPTS
from diffusion_envs.samplers import DDIM, BoundBlackBox, BoundDDIM, Sampler, Scheduler
from diffusion_envs.training.trainer import NonFiniteError, Trainer
from diffusion_envs.training.update_size import UpdateSize


@dataclass(frozen=True)
class Seen(Outcome):
    """Outcome on images: an estimate, and the held-out reward.

    Attributes:
        held_out: mean of that reward.
    """

    held_out: float


@dataclass(eq=False)
class TinyProblem:
    """The embedded image model and the reward of its demonstration; evaluated on held-out seeds.

    Attributes:
        kl_weight: reward per nat of path KL.
        samples: held-out samples of an evaluation.
    """

    kl_weight: float = 0.01
    samples: int = 100
    _environment: Environment | None = None

    @cached_property
    def _judge(self) -> rewards.Reward:
        return rewards.PromptAlignment("judge")

    @cached_property
    def table(self) -> DDPMTable:
        """The model's noise schedule."""
        scheduler = DDIMScheduler.from_pretrained(tiny_folder() / "scheduler")
        return DDPMTable.from_diffusers(scheduler)

    def environment(self, sampler: BoundDDIM | BoundBlackBox, seed: int) -> Any:
        """A fresh adapter on the embedded model."""
        model = TextToImageUNet.load(guidance=1.0, seed=seed)
        self._environment = Environment(
            model=model,
            sampler=sampler,
            reward=rewards.PromptAlignment("reward"),
            prompts=CLASS_PROMPTS,
            seed=seed,
        )
        return self._environment, model.parameters

    def evaluate(self, score: Any, sampler: BoundDDIM | BoundBlackBox) -> Outcome:
        """Means over held-out samples, of the environment that was made last.

        Raises:
            ValueError: the score is that of another environment.
        """
        assert self._environment is not None
        if score is not None and score is not self._environment.model:
            raise ValueError("score must be that of the environment that was made last")
        environment = dataclasses.replace(self._environment, sampler=sampler)
        judges = {"judge": self._judge}
        evaluation = evaluate(environment, self.samples, batch=50, judges=judges)
        reward, nats = float(evaluation.rewards.mean()), float(evaluation.path_kl.mean())
        held_out = float(evaluation.judged["judge"].mean())
        return Seen(reward, nats, reward - self.kl_weight * nats, math.nan, held_out)

    def optimum(self, sampler: BoundDDIM) -> Outcome:
        """Unknown: one unit of J above the pretrained model, so that shares are gains."""
        assert self._environment is not None
        with self._environment.model.pretrained():
            start = self.evaluate(None, sampler)
        return dataclasses.replace(start, objective=start.objective + 1)


PROBLEMS: dict[str, Callable[[], Any]] = {
    "gaussian": GaussianProblem,
    "mixture": MixtureProblem,
}


TWICE = (("minibatches", 2),)  # optimiser steps; at the first alone no trust region acts
ACCURATE = Scheduler("DPMSolverMultistepScheduler")  # what learns from data inherits its error


@dataclass(frozen=True)
class Entry:
    """A method as it takes part.

    Attributes:
        objective: kl_weight -> the objective; where it has no KL term, that is part of the method.
        size: what differs from the common ``UpdateSize``.
        aims: whether it should reach the KL-regularised optimum.
        sampler: of training; DDIM with eta 1, if not given. The evaluation's is always that.
        steps: of training; the evaluation's, if not given.
    """

    objective: Callable[[float], o.Objective]
    size: tuple[tuple[str, Any], ...] = ()
    aims: bool = True
    sampler: Sampler | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Budget:
    """Limits of what a run may spend, and how it is evaluated.

    Attributes:
        queries: of the reward.
        calls: of the network; whichever ends first.
        samples: an update.
        steps: of the evaluation's sampler.
        every: updates, between two evaluations.
    """

    queries: int = 12_800
    calls: int = 10**9
    samples: int = 64
    steps: int = 20
    every: int = 4

    def left(self, environment: Any) -> float:
        """Share that is not spent yet."""
        queries = environment.reward_queries / self.queries
        return 1 - max(queries, environment.model.calls / self.calls)


def methods() -> dict[str, Entry]:
    """Every method, with the settings that do not follow from the problem."""
    return {
        # continuous time
        "score-as-action": Entry(lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0, denoised=False)),
        "score-as-action (r(x0) in V)": Entry(
            lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0, denoised=True)
        ),
        "score-as-action (drawn)": Entry(
            lambda b: o.ScoreAsActionSampled(kl_weight=b, clip=1.0, denoised=False)
        ),
        "score-as-action (released)": Entry(
            lambda b: o.ScoreAsActionReleased(clip_per_pixel=0.1), aims=False
        ),
        # policy gradients in discrete time
        "ddpo": Entry(lambda b: o.DDPO(), aims=False),
        "ddpo-sf": Entry(lambda b: o.DDPOScoreFunction(), aims=False),
        "dpok": Entry(lambda b: o.DPOK(reward_weight=1.0, kl_weight=b), aims=False),
        "dpok (exact KL)": Entry(
            lambda b: o.DPOK(reward_weight=1.0, kl_weight=b, exact_kl=True), aims=False
        ),
        "dpok (path KL)": Entry(lambda b: o.DPOK(reward_weight=1.0, kl_weight=b, path_kl=True)),
        "grpo": Entry(lambda b: o.GRPO(kl_weight=b), aims=False),  # in units of the reward's std
        "pcpo": Entry(lambda b: o.PCPO(kl_weight=b), aims=False),
        "flow-dppo": Entry(lambda b: o.FlowDPPO(kl_weight=b), size=TWICE, aims=False),
        "flow-dppo (per path)": Entry(
            lambda b: o.FlowDPPO(kl_weight=b, per_path=True), size=TWICE, aims=False
        ),
        "grpo-guard": Entry(lambda b: o.GRPOGuard(kl_weight=b), size=TWICE, aims=False),
        "tdpo": Entry(lambda b: o.TDPO(), aims=False),
        "tdpo-r": Entry(lambda b: o.TDPOReset(), aims=False),
        # preferences
        "d3po": Entry(lambda b: o.D3PO(), aims=False),
        "dense-reward": Entry(lambda b: o.DenseReward(members=4), aims=False),
        "diffusion-dpo": Entry(lambda b: o.DiffusionDPO(beta=b), aims=False),
        # the reward's derivative
        "refl": Entry(lambda b: o.ReFL(enough=10.0, scale=1.0), aims=False),
        "draft-1": Entry(lambda b: o.DRaFT(last=1), aims=False),
        "draft (all steps, KL)": Entry(lambda b: o.DRaFT(last=1000, kl_weight=b)),
        "align-prop": Entry(lambda b: o.AlignProp(target=3.0, scale=1.0), aims=False),
        "adjoint-matching": Entry(lambda b: o.AdjointMatching(kl_weight=b), aims=False),  # chain KL
        "adjoint-matching (path KL)": Entry(lambda b: o.AdjointMatching(kl_weight=b, path_kl=True)),
        # a value's derivative
        "dxmi": Entry(lambda b: o.DxMI(), aims=False),
        "dxmi-continuous": Entry(lambda b: o.ContinuousDxMI(), aims=False),
        # the pretrained model's paths
        "tilted-regression": Entry(lambda b: o.TiltedRegression(kl_weight=b), aims=False),  # chain
        # data
        "nft": Entry(lambda b: o.DiffusionNFT(), aims=False),
        "ram": Entry(lambda b: o.ReinforceAdjointMatching(kl_weight=b), aims=False),
        "ram (path cost)": Entry(
            lambda b: o.ReinforceAdjointMatching(kl_weight=b, path_cost=True, draws=8),
            size=(("samples", 256), ("minibatches", 4), ("epochs", 2)),
            sampler=ACCURATE,
            steps=50,
        ),
        "distributional": Entry(
            lambda b: o.DistributionalOptimisation(kl_weight=b), sampler=ACCURATE, steps=50
        ),
    }


def run(name: str, entry: Entry, problem: Any, budget: Budget, rate: float, seed: int) -> Any:
    """One run: the curve of outcomes on the evaluation's sampler, and what it cost.

    A run that diverges (a gradient or a reward that is not finite) ends there, and says so.
    """
    images = isinstance(problem, TinyProblem)
    levels = problem.table if images else table()
    evaluation_sampler = DDIM(eta=1.0).bind(levels, budget.steps)
    sampler = (entry.sampler or DDIM(eta=1.0)).bind(levels, entry.steps or budget.steps)
    environment = problem.environment(sampler, seed)
    common: dict[str, Any] = {"samples": budget.samples, "weight_decay": 0.0}
    common["batch"] = 64 if images else 1_000_000
    size = UpdateSize(**common | dict(entry.size))
    objective = dataclasses.replace(entry.objective(problem.kl_weight), learning_rate=rate)
    trainer = Trainer(environment, objective, size, accelerator=Accelerator(cpu=True))
    score: Any = environment.model
    best, start = problem.optimum(evaluation_sampler), problem.evaluate(score, evaluation_sampler)
    gap = best.objective - start.objective
    curve: list[dict[str, float]] = []
    began, evaluating = time.perf_counter(), 0.0
    for _ in spend(trainer, budget):
        now = time.perf_counter()
        if trainer.update % budget.every == 0 or budget.left(environment) <= 0:
            outcome = problem.evaluate(score, evaluation_sampler)
            evaluating += time.perf_counter() - now
            curve.append(
                {
                    "queries": environment.reward_queries,
                    "calls": environment.model.calls,
                    "seconds": time.perf_counter() - began - evaluating,
                    "share": (outcome.objective - start.objective) / gap,
                    **dataclasses.asdict(outcome),
                }
            )
    return {
        "method": name,
        "rate": rate,
        "seed": seed,
        **dataclasses.asdict(budget),
        "training": training(entry, problem, budget),
        "updates": trainer.update,
        "diverged": budget.left(environment) > 0,
        "curve": curve,
        "optimum": dataclasses.asdict(best),
        "start": dataclasses.asdict(start),
    }


def spend(trainer: Trainer, budget: Budget) -> Iterator[None]:
    """Updates until the budget is spent, at a rate that falls linearly to 0 with it.

    A run that diverges (a gradient or a reward that is not finite) ends there, with budget left.
    """
    rate = trainer.objective.learning_rate
    while (left := budget.left(trainer.environment)) > 0:
        for group in trainer.optimiser.param_groups:
            group["lr"] = rate * left
        try:
            trainer.step()
        except (NonFiniteError, rewards.RewardError):
            return
        yield


def training(entry: Entry, problem: Any, budget: Budget) -> str:
    """Description of what is trained and how: a stored run of another one does not count."""
    objective = re.sub(r" at 0x[0-9a-f]+", "", repr(entry.objective(problem.kl_weight)))
    sampler, steps = entry.sampler or DDIM(eta=1.0), entry.steps or budget.steps
    changed = " ".join(f"{key}={value}" for key, value in entry.size)
    return f"{objective} on {sampler.label}, {steps} steps {changed}".rstrip()


class MissingRunError(LookupError):
    """A run is not stored, and may not be made."""


class Runs:
    """Single runs in a JSON-lines file; what is there is not made again.

    Args:
        path: of the file; made when the first run is stored.
        say: told of every new run.
    """

    def __init__(self, path: Path, say: Callable[[str], object] = print) -> None:
        self.path, self.say = path, say
        self.results: list[dict[str, Any]] = []
        if path.exists():
            self.results = [json.loads(line) for line in path.read_text().splitlines()]

    def get(
        self,
        name: str,
        entry: Entry,
        problem: Any,
        budget: Budget,
        rate: float,
        seed: int,
        *,
        make: bool = True,
    ) -> dict[str, Any]:
        """That run, from the file or made now.

        Raises:
            MissingRunError: it is not stored, and ``make`` is False.
        """
        wanted = {
            "method": name,
            "seed": seed,
            "training": training(entry, problem, budget),
            **dataclasses.asdict(budget),
        }
        for one in self.results:
            same = all(one[key] == value for key, value in wanted.items())
            if same and math.isclose(one["rate"], rate):
                return one
        if not make:
            raise MissingRunError(f"{name} at rate {rate:g}, seed {seed}")
        result = run(name, entry, problem, budget, rate, seed)
        self.results.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        self.say(f"{name}  rate {rate:g}  seed {seed}  share {final(result):.4f}")
        return result


def final(result: dict[str, Any]) -> float:
    """Share at the end of a run; minus infinity, if it diverged."""
    whole = result["curve"] and not result["diverged"]
    share = result["curve"][-1]["share"] if whole else -math.inf
    return share if math.isfinite(share) else -math.inf


def swept_score(result: dict[str, Any]) -> float:
    """Score of a run in a sweep: its final share, or its worst if that is below -1.

    A rate at which a run first loses more than the whole gap and then recovers is one at which
    another seed may not; the reported ones should not have to show that. At least -10.
    """
    worst = min((point["share"] for point in result["curve"]), default=-math.inf)
    score = worst if worst < -1 else final(result)
    return score if score > -10 else -10.0  # also where it is not a number


RATES = tuple(float(f"{m}e{k}") for k in range(-6, 1) for m in (1, 3))  # that a sweep may come to


def swept(score: Callable[[float], float], first: Sequence[float]) -> float:
    """The best learning rate, from a sweep that goes on while its best lies at an end of it."""
    places = [min(range(len(RATES)), key=lambda k: abs(math.log(RATES[k] / r))) for r in first]
    low, high = min(places), max(places)
    scores = {k: score(RATES[k]) for k in range(low, high + 1)}
    while True:
        best = max(scores, key=lambda k: scores[k])
        beyond = {low: low - 1, high: high + 1}.get(best)
        if beyond is None or not 0 <= beyond < len(RATES):
            return RATES[best]
        scores[beyond] = score(RATES[beyond])
        low, high = min(low, beyond), max(high, beyond)
