"""All methods on the embedded image model with equal network calls, judged by the frontier.

Every method starts from the same pretrained model with the same adapter (LoRA of rank 8), samples
prompts in turn with DDIM, eta 1 and 10 steps, and ends when its network calls are spent. Its
learning rate falls linearly to 0; where it begins is the best of a few on a seed of its own. Then
it runs on the seeds that are reported, each judged on held-out samples by

    share     (J - J_pretrained) / (J* - J_pretrained),  J = E[reward] - kl_weight path KL, where J*
              is the best that any policy can have at that weight (``diffusion_envs.frontier``)
    chain     the same with the KL of the chain that was sampled, for which J* is a bound
    at equal KL   gain in reward as a share of the frontier's gain at the chain's KL
    held out  gain of a classifier that was not trained on
    diversity mean pixel distance of two pictures of a prompt, over the pretrained model's

The frontier comes from samples of the pretrained model, made once. Runs are appended to a file of
JSON lines and not repeated: several processes may share the work by ``--methods``, and the table is
made anew from all that is there.

    python -m benchmarks.image_leaderboard
    python -m benchmarks.image_leaderboard --methods ddpo grpo --kl-weights 1 0.1
"""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from benchmarks.compared_methods import Budget, Entry, TinyProblem, spend
from ctrl import Estimate
from diffusion_envs import objectives as o
from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.frontier import Frontier
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.runs.distances import mean_over_pairs, pixel_distances
from diffusion_envs.runs.evaluation import Evaluation, evaluate, sample_in_turn
from diffusion_envs.runs.method_names import CLASS_PROMPTS
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.optimisers import AdamW, NaturalGradient
from diffusion_envs.training.optimisers.protocol import Optimiser
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

DOCS = Path(__file__).parent.parent / "docs"
SEED, FRONTIER_SEED = 100, 12345  # of the sweep, of the frontier's samples: not of reported runs
STEPS = 10


@dataclass(frozen=True)
class Options:
    """Compare methods on images at equal network calls.

    Attributes:
        methods: some of them; all, if none is given.
        kl_weights: reward per nat; at the second and later ones only ``best`` methods run.
        best: methods that run at the later weights, the best at the first.
        calls: of the network, for every run.
        sweep_calls: the same for the runs that choose a learning rate.
        seeds: that are reported.
        samples: held out, of every evaluation.
        frontier_samples: of the pretrained model.
        table_only: make no run.
        runs: folder of the single runs.
        output: folder of the results.
    """

    methods: tuple[str, ...] = ()
    kl_weights: tuple[float, ...] = (0.3, 1.0, 0.1)
    best: int = 4
    calls: int = 12_000
    sweep_calls: int = 6_000
    seeds: int = 3
    samples: int = 200
    frontier_samples: int = 3000
    table_only: bool = False
    runs: Path = Path("runs") / "image_leaderboard"
    output: Path = DOCS


@dataclass(frozen=True)
class Contestant:
    """A method as it takes part on images.

    Attributes:
        entry: what it is.
        rates: that the sweep chooses from; no sweep, if there is one.
        optimiser: that makes steps of its gradients.
        adapter: what trains, as ``TextToImageUNet.load`` takes it; a LoRA of rank 8.
    """

    entry: Entry
    rates: tuple[float, ...] = (1e-3, 3e-3)
    optimiser: Optimiser = field(default_factory=AdamW)
    adapter: Mapping[str, Any] = field(default_factory=dict)


SMALL = {"samples": 40, "minibatches": 4}  # four optimiser steps a roll-out
GROUPS = {"samples": 40, "minibatches": 5}  # a group of 8 each; rates of GRPO's relatives are its
BASE = {"samples": 400, "minibatches": 40}  # of the pretrained model's samples: many for a prompt


def contestants() -> dict[str, Contestant]:
    """The methods that take part; groups are of 8, and there is one of each prompt in turn."""

    def of(
        objective: Callable[[float], o.Objective],
        *rates: float,
        size: Mapping[str, Any] = SMALL,
        optimiser: Optimiser | None = None,
        **adapter: Any,
    ) -> Contestant:
        entry = Entry(objective, size=tuple(size.items()))
        return Contestant(entry, rates or Contestant.rates, optimiser or AdamW(), adapter)

    natural = {"samples": 20}
    return {
        # the reward is a black box
        "score-as-action": of(lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0)),
        "score-as-action, natural gradient": of(
            lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0),
            1e-3,
            size=natural,
            optimiser=NaturalGradient(nats=0.05),
        ),
        "score-as-action, guidance": of(
            lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0), lora_rank=0, guidance_knots=4
        ),
        "score-as-action, LoRA and guidance": of(
            lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0), 3e-3, guidance_knots=4
        ),
        "adjoint-matching, zeroth order": of(
            lambda b: o.ZerothOrderAdjointMatching(kl_weight=b, path_kl=True)
        ),
        "ddpo": of(lambda b: o.DDPO(clip=1.0)),
        "dpok (path KL)": of(lambda b: o.DPOK(reward_weight=1.0, kl_weight=b, path_kl=True)),
        "grpo": of(lambda b: o.GRPO(group=8, kl_weight=b), size=GROUPS),
        "pcpo": of(lambda b: o.PCPO(group=8, kl_weight=b), 3e-3, size=GROUPS),
        "flow-dppo": of(lambda b: o.FlowDPPO(group=8, kl_weight=b), 3e-3, size=GROUPS),
        "flow-dppo (per path)": of(
            lambda b: o.FlowDPPO(group=8, kl_weight=b, per_path=True), 3e-3, size=GROUPS
        ),
        "grpo-guard": of(lambda b: o.GRPOGuard(group=8, kl_weight=b), 3e-3, size=GROUPS),
        "diffusion-dpo": of(lambda b: o.DiffusionDPO(beta=b)),
        "nft": of(lambda b: o.DiffusionNFT()),
        "tilted-regression": of(lambda b: o.TiltedRegression(kl_weight=b), size=BASE),
        "distributional": of(lambda b: o.DistributionalOptimisation(kl_weight=b), size=BASE),
        # its gradient is known
        "draft-1": of(lambda b: o.DRaFT(last=1)),
        "draft (all steps, KL)": of(lambda b: o.DRaFT(last=1000, kl_weight=b), 3e-3),
        "draft (all steps, KL), LoRA and guidance": of(
            lambda b: o.DRaFT(last=1000, kl_weight=b), 3e-3, guidance_knots=4
        ),
        "draft (all steps, KL), guidance": of(
            lambda b: o.DRaFT(last=1000, kl_weight=b), 3e-3, lora_rank=0, guidance_knots=4
        ),
        "adjoint-matching (path KL)": of(lambda b: o.AdjointMatching(kl_weight=b, path_kl=True)),
        "adjoint-matching, natural gradient": of(
            lambda b: o.AdjointMatching(kl_weight=b, path_kl=True),
            1e-3,
            size=natural,
            optimiser=NaturalGradient(nats=0.05),
        ),
    }


# -- single runs -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Setting:
    """The model, the samples that judge, and what is made once for all runs."""

    options: Options
    _starts: dict[int, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def levels(self) -> Any:
        """The model's noise schedule."""
        return TinyProblem().table

    @cached_property
    def _judge(self) -> rewards.Reward:
        return rewards.PromptAlignment("judge")

    def environment(self, seed: int, **adapter: Any) -> Environment:
        """A fresh adapter on the embedded model."""
        return Environment(
            model=TextToImageUNet.load(guidance=1.0, seed=seed, **adapter),
            sampler=DDIM(eta=1.0).bind(self.levels, STEPS),
            reward=rewards.PromptAlignment("reward"),
            prompts=CLASS_PROMPTS,
            seed=seed,
        )

    @cached_property
    def frontier(self) -> Frontier:
        """Of samples of the pretrained model, made once and kept beside the runs."""
        path = self.options.runs / f"frontier-{self.options.frontier_samples}.safetensors"
        if not path.exists():
            environment = self.environment(FRONTIER_SEED)
            parts: list[torch.Tensor] = []
            with environment.pretrained():
                for first in range(0, self.options.frontier_samples, 50):
                    indices = range(first, min(first + 50, self.options.frontier_samples))
                    drawn = sample_in_turn(environment, indices, "frontier", reference=False)
                    parts.append(drawn.rollout.rewards)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"rewards": torch.cat(parts)}, path)
        scores = load_file(path)["rewards"]
        groups = [i % len(CLASS_PROMPTS) for i in range(len(scores))]
        return Frontier(scores, groups, generator=torch.Generator().manual_seed(FRONTIER_SEED))

    def judged(self, environment: Environment, *, pretrained: bool = False) -> dict[str, float]:
        """What held-out samples say, with the sampler of all evaluations."""
        seen = evaluate(
            environment,
            self.options.samples,
            batch=50,
            judges={"judge": self._judge},
            pretrained=pretrained,
        )
        error = Estimate.of(seen.rewards).standard_error
        return {
            "reward": float(seen.rewards.mean()),
            "reward_error": float(error),
            "path_kl": float(seen.path_kl.mean()),
            "chain_kl": float(seen.chain_kl.mean()),
            "held_out": float(seen.judged["judge"].mean()),
            "diversity": _diversity(seen),
        }

    def start(self, seed: int, environment: Environment) -> dict[str, float]:
        """The pretrained model on a seed's held-out samples."""
        if seed not in self._starts:
            self._starts[seed] = self.judged(environment, pretrained=True)
        return self._starts[seed]

    def run(
        self, contestant: Contestant, kl_weight: float, rate: float, seed: int, calls: int
    ) -> dict[str, Any]:
        """One run to the end of its budget, and what its adapter is worth."""
        entry = contestant.entry
        environment = self.environment(seed, **contestant.adapter)
        objective = dataclasses.replace(entry.objective(kl_weight), learning_rate=rate)
        size = UpdateSize(**{"samples": 40, "weight_decay": 0.0, "batch": 64, **dict(entry.size)})
        trainer = Trainer(
            environment,
            objective,
            size,
            accelerator=Accelerator(cpu=True),
            optimiser=contestant.optimiser,
        )
        budget = Budget(queries=10**9, calls=calls)
        for _ in spend(trainer, budget):
            pass
        return {
            "updates": trainer.update,
            "diverged": budget.left(environment) > 0,
            "calls": environment.model.calls,
            "queries": environment.reward_queries,
            "seconds": trainer.seconds,
            "start": self.start(seed, environment),
            "end": self.judged(environment),
        }


def _diversity(seen: Evaluation) -> float:
    distances = pixel_distances(seen.images, seen.images)
    mean = mean_over_pairs(lambda rows: distances[rows][:, rows], seen.prompts)
    assert mean is not None  # every prompt has several samples
    return mean.mean


class Runs:
    """Single runs in a file of JSON lines; what is there is not made again."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.path = setting, setting.options.runs / "runs.jsonl"
        self.made: list[dict[str, Any]] = []
        if self.path.exists():
            self.made = [json.loads(line) for line in self.path.read_text().splitlines()]

    def get(
        self, name: str, kl_weight: float, rate: float, seed: int, *, make: bool, calls: int
    ) -> dict[str, Any] | None:
        """That run, from the file or made now; None if it may not be made."""
        key = {
            "method": name,
            "kl_weight": kl_weight,
            "rate": rate,
            "seed": seed,
            "calls_limit": calls,
            "samples": self.setting.options.samples,
        }
        for one in self.made:
            if all(one[k] == value for k, value in key.items()):
                return one
        if not make:
            return None
        contestant = contestants()[name]
        result = key | self.setting.run(contestant, kl_weight, rate, seed, calls)
        self.made.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        share = judgement(result, kl_weight, self.setting.frontier)["share"]
        print(f"{name}  b {kl_weight:g}  rate {rate:g}  seed {seed}  {share:.3f}", flush=True)
        return result


def judgement(one: Mapping[str, Any], kl_weight: float, frontier: Frontier) -> dict[str, float]:
    """What a run is worth; its worst if it diverged."""
    start, end = one["start"], one["end"]
    gain = end["reward"] - start["reward"]
    optimum = frontier.at_weight(kl_weight)
    gap = optimum.objective.mean - frontier.pretrained.mean
    at_equal = frontier.at_kl(end["chain_kl"]).reward.mean - frontier.pretrained.mean
    return {
        "share": (gain - kl_weight * end["path_kl"]) / gap,
        "chain_share": (gain - kl_weight * end["chain_kl"]) / gap,
        "gain": gain,
        "path_kl": end["path_kl"],
        "chain_kl": end["chain_kl"],
        "at_equal_kl": gain / at_equal if at_equal > 0 else math.nan,
        "held_out": end["held_out"] - start["held_out"],
        "diversity": end["diversity"] / start["diversity"],
    }


def chosen_rate(name: str, kl_weight: float, runs: Runs, *, make: bool) -> float | None:
    """The rate of the sweep whose run has the best share; None if some are not made."""
    rates, calls = contestants()[name].rates, runs.setting.options.sweep_calls
    if len(rates) == 1:
        return rates[0]
    scores = dict[float, float]()
    for rate in rates:
        one = runs.get(name, kl_weight, rate, SEED, make=make, calls=calls)
        if one is None:
            return None
        worth = judgement(one, kl_weight, runs.setting.frontier)["share"]
        scores[rate] = -math.inf if one["diverged"] or math.isnan(worth) else worth
    return max(scores, key=lambda rate: scores[rate])


# -- the table -------------------------------------------------------------------------------------

COLUMNS = (
    "share",
    "chain_share",
    "gain",
    "path_kl",
    "chain_kl",
    "at_equal_kl",
    "held_out",
    "diversity",
)


def row(
    name: str, kl_weight: float, rate: float, results: Sequence[dict[str, Any]], frontier: Frontier
) -> dict[str, Any]:
    """Means over seeds, with standard errors."""
    judged = [judgement(one, kl_weight, frontier) for one in results]

    def mean(values: Sequence[float]) -> tuple[float, float]:
        std = statistics.stdev(values) if len(values) > 1 else math.nan
        return statistics.fmean(values), std / math.sqrt(len(values))

    return {
        "method": name,
        "kl_weight": kl_weight,
        "rate": rate,
        "seeds": len(results),
        "diverged": sum(one["diverged"] for one in results),
        **{key: mean([one[key] for one in judged]) for key in COLUMNS},
        **{k: statistics.fmean(one[k] for one in results) for k in ("calls", "queries", "seconds")},
        "updates": statistics.fmean(one["updates"] for one in results),
    }


def table(options: Options, runs: Runs) -> list[dict[str, Any]]:
    """Rows of all methods at the first weight, and of the best of them at the others."""
    everyone, frontier = contestants(), runs.setting.frontier
    may = options.methods or tuple(everyone)
    rows: list[dict[str, Any]] = []
    for kl_weight in options.kl_weights:
        names = list(everyone)
        if kl_weight != options.kl_weights[0]:
            first = [one for one in rows if one["kl_weight"] == options.kl_weights[0]]
            first.sort(key=lambda one: -one["share"][0])
            names = [one["method"] for one in first[: options.best]]
        for name in names:
            make = name in may and not options.table_only
            rate = chosen_rate(name, options.kl_weights[0], runs, make=make)
            if rate is None:
                continue
            results = [
                runs.get(name, kl_weight, rate, seed, make=make, calls=options.calls)
                for seed in range(options.seeds)
            ]
            done = [one for one in results if one is not None]
            if len(done) == options.seeds:
                rows.append(row(name, kl_weight, rate, done, frontier))
    return sorted(rows, key=lambda one: (-one["kl_weight"], -one["share"][0]))


def _bracketed(pair: tuple[float, float], digits: int = 2) -> str:
    mean, error = pair
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}({round(error * 10**digits) if math.isfinite(error) else '-'})"


def markdown(rows: Sequence[dict[str, Any]], options: Options, frontier: Frontier) -> str:
    """The page."""
    lines = [
        "# Leaderboard on images",
        "",
        "The embedded image model, prompt alignment, LoRA of rank 8, DDIM with eta 1 and "
        f"{STEPS} steps, {options.calls:,} network calls a run (and the rest of the last update),",
        "a learning rate from a sweep on a seed of its own (GRPO's for its relatives, none for the "
        f"natural gradient), then {options.seeds} seeds (standard error in brackets),",
        f"{options.samples} held-out samples each. As far as it has been run, what is written by",
        "",
        "    python -m benchmarks.image_leaderboard",
        "",
        "*share*: of the gap in J = E[reward] - kl_weight path KL between the pretrained model and "
        "the best that any policy can have (the frontier,",
        f"{options.frontier_samples:,} samples of the pretrained model); *chain*: the same with "
        "the KL of the chain that was sampled, for which it is a bound; *equal KL*: gain in "
        "reward as a share of the frontier's at the chain's KL; *held out*: gain of a classifier "
        "that was not trained on; *diversity*: of pixels, over the pretrained model's. "
        "DRaFT and adjoint matching know the reward's gradient, the others do not; *guidance* "
        "trains the guidance scale at four knots instead of a LoRA.",
    ]
    for kl_weight in dict.fromkeys(one["kl_weight"] for one in rows):
        best = frontier.at_weight(kl_weight)
        lines += [
            "",
            f"## kl_weight {kl_weight:g}",
            "",
            f"The optimum: reward {best.reward}, {best.kl} nats, J {best.objective} (least "
            f"effective sample size {best.effective_samples:.0f}); the pretrained model's reward "
            f"is {frontier.pretrained}.",
            "",
            "| method | share | chain | gain | path KL | chain KL | equal KL | held out "
            "| diversity | updates | network calls | reward queries | rate |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for one in (row for row in rows if row["kl_weight"] == kl_weight):
            diverged = f" ({one['diverged']} diverged)" if one["diverged"] else ""
            cells = [one["method"] + diverged, *(_bracketed(one[key]) for key in COLUMNS)]
            cells += [f"{one['updates']:.0f}", *(f"{one[k]:,.0f}" for k in ("calls", "queries"))]
            lines.append("| " + " | ".join([*cells, f"{one['rate']:g}"]) + " |")
    lines += ["", "![gain in reward against the KL of the chain](leaderboard_images.png)", ""]
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], frontier: Frontier, path: Path) -> None:
    """Where the methods end, below the frontier."""
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    points = frontier.curve()
    nats, start = [p.kl.mean for p in points], frontier.pretrained.mean
    axes.plot(nats, [p.reward.mean - start for p in points], color="black", label="frontier")
    low, high = ([getattr(p.reward, end) - start for p in points] for end in ("low", "high"))
    axes.fill_between(nats, low, high, color="black", alpha=0.15, linewidth=0)
    names = list(dict.fromkeys(one["method"] for one in rows))
    for k, name in enumerate(names):
        mine = [one for one in rows if one["method"] == name]
        axes.errorbar(
            [one["chain_kl"][0] for one in mine],
            [one["gain"][0] for one in mine],
            [one["gain"][1] for one in mine],
            [one["chain_kl"][1] for one in mine],
            linestyle="none",
            marker="osD^vP*X<>p"[k % 11],  # with ten colours, 110 are told apart
            color=f"C{k % 10}",
            capsize=2,
            label=name,
        )
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_xticks([0, 0.1, 0.5, 1, 2, 3, 4, 5, 6, 8])
    axes.set(xlabel="KL of the chain from the pretrained model, nats", ylabel="gain in reward")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def main(options: Options) -> None:
    """Make what is missing, then write the table, its numbers and the picture."""
    torch.set_num_threads(1)
    if unknown := set(options.methods) - set(contestants()):
        raise SystemExit(f"methods: no {sorted(unknown)}; there are {sorted(contestants())}")
    setting = Setting(options)
    runs = Runs(setting)
    rows = table(options, runs)
    if not rows:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    frontier, stem = setting.frontier, options.output / "leaderboard_images"
    stem.with_suffix(".md").write_text(markdown(rows, options, frontier))
    record = {"options": dataclasses.asdict(options) | {"runs": "", "output": ""}}
    record |= {"versions": versions(), "rows": rows}
    record["frontier"] = [point.as_dict() for point in frontier.curve()]
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "kl_weight", "rate", "seed", *COLUMNS, "calls", "queries"])
        for one in sorted(runs.made, key=lambda one: (one["method"], one["kl_weight"])):
            worth = judgement(one, one["kl_weight"], frontier)
            numbers = [f"{worth[key]:.5g}" for key in COLUMNS]
            head = [one["method"], one["kl_weight"], one["rate"], one["seed"]]
            writer.writerow([*head, *numbers, one["calls"], one["queries"]])
    picture(rows, frontier, stem.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
