"""Figure 3: DxMI against continuous-time reinforcement learning on CIFAR-10 at ten steps.

Both fine-tune the small pixel-space network from the same weights, with the published schedule of
ten steps. Both learn the same energy from the same pictures, with as many steps of it and of the
value. They are compared at equal calls of the network and at equal updates. Rates are swept alike,
on a seed of their own; every method takes the one whose samples come nearest to the data.

Judged by samples on held-out noise, the same for all: the Frechet distance of the judge's features
from those of the test set (``frechet_classifier``; no Inception distance), and the judge's mean
confidence.
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Picture
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.figures.figure import Figure, Interval, Kept, interval, paired, row, table
from diffusion_envs import cifar10, objectives, rewards, samplers
from diffusion_envs.cifar10.data import load
from diffusion_envs.cifar10.measure import held_out
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import Objective
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.sample_quality import RealStatistics, classifier_features, sample_quality
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

STEPS = 10
SHOWN = 40  # pictures of a sheet
SWEEP_SEED = 1000
CALLS, UPDATES, APART = "network calls", "updates", "not told apart"
DISTANCE, CONFIDENCE = "Frechet distance (classifier)", "judge's confidence"


@dataclass(frozen=True)
class Budget:
    """How much is run.

    Attributes:
        seeds: of training.
        updates: of the policy in a run.
        sweep_updates: of a run of the sweep.
        samples: pictures an update.
        judged_every: updates between judgements.
        judged: samples a judgement.
        real: pictures of the test set that samples are compared with.
        energy_width: of the energy network; 128 as published.
        energy_rate: its learning rate; 1e-5 as published, for 78,000 updates.
        rates: of the policy, that are swept.
        kl_weight: energy per nat, of the continuous method with the path KL.
        model: what is fine-tuned.
        data: folder of CIFAR-10.
        processes: at once, of one thread each.
    """

    seeds: int = 3
    updates: int = 32
    sweep_updates: int = 10
    samples: int = 24
    judged_every: int = 16
    judged: int = 320
    real: int = 2000
    energy_width: int = 32
    energy_rate: float = 1e-4
    rates: tuple[float, ...] = (1e-5, 1e-4)
    kl_weight: float = 0.01
    model: str = "small"
    data: Path = Path("../shared/data/cifar10")
    processes: int = 2


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "cpu": Budget(),
        "gpu": Budget(
            updates=4000,
            sweep_updates=1000,
            samples=128,
            judged_every=500,
            judged=10_000,
            real=10_000,
            energy_width=128,
            energy_rate=1e-5,
            rates=(1e-7, 1e-6, 1e-5),
            model="google/ddpm-cifar10-32",
            processes=1,
        ),
    }
)

METHODS: Mapping[str, Callable[[float, Budget], Objective]] = MappingProxyType(
    {
        "DxMI": lambda rate, b: objectives.DxMIFromData(
            learning_rate=rate, std_rate=100 * rate, energy_width=b.energy_width
        ),
        "DxMI without entropy and moves": lambda rate, b: objectives.DxMIFromData(
            learning_rate=rate,
            std_rate=100 * rate,
            entropy_weight=0.0,
            move_weight=0.0,
            energy_width=b.energy_width,
        ),
        "continuous, as released": lambda rate, b: objectives.ContinuousDxMIReleasedFromData(
            learning_rate=rate, energy_width=b.energy_width
        ),
        "continuous, path KL": lambda rate, b: objectives.ContinuousDxMIFromData(
            learning_rate=rate, kl_weight=b.kl_weight, energy_width=b.energy_width
        ),
    }
)
OURS = ("continuous, as released", "continuous, path KL")
THEIRS = ("DxMI", "DxMI without entropy and moves")


# -- one run --------------------------------------------------------------------------------------


def trained(method: str, rate: float, seed: int, updates: int, budget: Budget) -> dict[str, Any]:
    """Curves of one run, and the sheet of its last samples as a PNG in base64."""
    torch.set_num_threads(1)
    objective = METHODS[method](rate, budget)
    trainer = Trainer(
        environment(budget, seed, learned_std=objective.learns_std),
        objective,
        UpdateSize(
            samples=budget.samples,
            train_steps=1,
            batch=budget.samples,
            weight_decay=0.0,
            value_epochs=1,
            value_learning_rate=budget.energy_rate,
        ),
        accelerator=parallel.start(),
        data=cifar10.Pictures(budget.data),
    )
    lines: list[dict[str, float]] = []
    pictures = torch.empty(0)
    for line in trainer.updates(updates):
        done = line["update"]
        if done % budget.judged_every and done != updates:
            continue
        pictures = sampled(trainer.environment, budget)
        lines.append(
            {
                "update": done,
                "network_calls": line["network_calls"],
                "energy_of_data": line["energy_of_data"],
                "energy_of_samples": line["energy_of_samples"],
                **judged(pictures, budget),
            }
        )
    std = trainer.environment.steps.std.detach().tolist()
    return {"lines": lines, "std": std, "sheet": sheet(pictures[:SHOWN])}


def pretrained(budget: Budget) -> dict[str, Any]:
    """The same judgement of the model that all runs begin with."""
    pictures = sampled(environment(budget, 0, learned_std=False), budget)
    return {"lines": [judged(pictures, budget)], "sheet": sheet(pictures[:SHOWN])}


def environment(budget: Budget, seed: int, *, learned_std: bool) -> Environment:
    """The model at ten steps; nothing is learned from its reward."""
    model = cifar10.Cifar10Model(budget.model).load(
        device=parallel.start().device, batch=256, seed=seed
    )
    return make_environment(
        model,
        sampler=samplers.QuadraticVariances(learned_std=learned_std),
        steps=STEPS,
        reward=rewards.ClassConfidence("judge"),
        prompts=["a picture"],
        seed=seed,
    )


def sampled(of: Environment, budget: Budget) -> Tensor:
    """Held-out pictures; their noise is the same whatever the run."""
    return held_out(dataclasses.replace(of, seed=0), budget.judged)


@cache
def _real(folder: Path, real: int) -> RealStatistics:
    images = load(folder, "test", limit=real).images
    return RealStatistics.of(images, classifier_features())


def judged(pictures: Tensor, budget: Budget) -> dict[str, float]:
    """Distance and confidence, and the rest of ``runs.sample_quality``."""
    quality = sample_quality(pictures, _real(budget.data, budget.real), classifier_features())
    renamed = {"frechet_classifier": DISTANCE, "judge_confidence": CONFIDENCE}
    return {renamed.get(name, name): value for name, value in quality.items()}


def sheet(pictures: Tensor, columns: int = 10) -> str:
    """Pictures in rows, as a PNG in base64."""
    framed = functional.pad(pictures, (1, 1, 1, 1), value=1.0)
    rows = [torch.cat(list(part), dim=-1) for part in framed.split(columns)]
    pixels = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shown(axes: Any, of: str, title: str) -> None:
    """Draw a sheet."""
    axes.imshow(np.asarray(Image.open(io.BytesIO(base64.b64decode(of)))))
    axes.set_title(title, fontsize="medium")
    axes.set_axis_off()


# -- all runs -------------------------------------------------------------------------------------


def _kept(arguments: tuple[Path, dict[str, Any], Budget]) -> dict[str, Any]:
    """One run, in a process of its own."""
    output, key, budget = arguments

    def make() -> dict[str, Any]:
        if key["method"] == "pretrained":
            return pretrained(budget)
        return trained(key["method"], key["rate"], key["seed"], key["updates"], budget)

    return Kept(output).get(key, make)


def runs(budget: Budget, output: Path, wanted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of runs, ``budget.processes`` at a time; those that are there are read."""
    common = dataclasses.asdict(dataclasses.replace(budget, seeds=0, processes=0))
    common = {k: str(v) for k, v in common.items() if k not in ("data", "updates")}
    work = [(output, {"figure": 3, **common, **key}, budget) for key in wanted]
    if budget.processes == 1 or all(Kept(output).path(w[1]).exists() for w in work):
        return [_kept(one) for one in work]
    with ProcessPoolExecutor(budget.processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_kept, work))


def swept(budget: Budget, output: Path) -> dict[str, float]:
    """The rate of each method: of those swept, the one whose samples are nearest to the data."""
    keys = [
        {"method": m, "rate": rate, "seed": SWEEP_SEED, "updates": budget.sweep_updates}
        for m in METHODS
        for rate in budget.rates
    ]
    best: dict[str, tuple[float, float]] = {}
    for key, result in zip(keys, runs(budget, output, keys), strict=True):
        distance = result["lines"][-1][DISTANCE]
        if key["method"] not in best or distance < best[key["method"]][0]:
            best[key["method"]] = distance, key["rate"]
    return {method: rate for method, (_, rate) in best.items()}


def everything(
    budget: Budget, output: Path, seeds: int
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, float]]:
    """The pretrained model's judgement, every method's runs by seed, and their rates."""
    rates = swept(budget, output)
    start = {"method": "pretrained", "seed": 0}
    keys = [
        {"method": m, "rate": rates[m], "seed": seed, "updates": budget.updates}
        for seed in range(seeds)
        for m in METHODS
    ]
    first, *rest = runs(budget, output, [start, *keys])
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in METHODS}
    for key, result in zip(keys, rest, strict=True):
        by_method[key["method"]].append(result)
    return first, by_method, rates


def run(budget: Budget, output: Path, seeds: int) -> Figure:
    """The figure: both measures against network calls, and differences at their end."""
    start, results, rates = everything(budget, output, seeds)
    begin = start["lines"][0]
    data: list[dict[str, Any]] = []
    for method, each in results.items():
        for k, line in enumerate(each[0]["lines"]):
            for measure in (DISTANCE, CONFIDENCE):
                values = [one["lines"][k][measure] for one in each]
                where = {"method": method, "rate": rates[method], "update": line["update"]}
                calls = {"network_calls": line["network_calls"]}
                data.append(row(measure, interval(values), **where, **calls))
    least = min(each[0]["lines"][-1]["network_calls"] for each in results.values())
    differences = {
        (budgeted, ours, theirs, measure): paired(
            _ends(results[ours], measure, calls), _ends(results[theirs], measure, calls)
        )
        for budgeted, calls in ((CALLS, least), (UPDATES, None))
        for ours in OURS
        for theirs in THEIRS
        for measure in (DISTANCE, CONFIDENCE)
    }
    for (budgeted, ours, theirs, measure), value in differences.items():
        quantity = f"{measure}, difference at equal {budgeted}"
        data.append(row(quantity, value, method=ours, against=theirs))
    return Figure(
        title="DxMI and continuous-time reinforcement learning on CIFAR-10, ten steps",
        settings={**settings(budget), "rates chosen": rates, "pretrained": begin},
        data=data,
        picture=_drawn(data, begin),
        paragraph=_told(begin, results, differences, rates, budget, seeds),
    )


def settings(budget: Budget) -> dict[str, Any]:
    """All but where the data lie."""
    return {k: v for k, v in dataclasses.asdict(budget).items() if k != "data"}


def _ends(
    each: Sequence[Mapping[str, Any]], measure: str, calls: int | None = None
) -> dict[int, float]:
    """The last judgement of every seed; or, linearly between judgements, that at so many calls."""
    ends = {}
    for seed, one in enumerate(each):
        values = [line[measure] for line in one["lines"]]
        spent = [line["network_calls"] for line in one["lines"]]
        ends[seed] = values[-1] if calls is None else float(np.interp(calls, spent, values))
    return ends


def _drawn(data: Sequence[Mapping[str, Any]], begin: Mapping[str, float]) -> Picture:
    picture = Picture(figsize=(10, 4), layout="constrained")
    for axes, measure in zip(picture.subplots(1, 2), (DISTANCE, CONFIDENCE), strict=True):
        for method in METHODS:
            points = [r for r in data if r["quantity"] == measure and r["method"] == method]
            calls = [0, *(p["network_calls"] for p in points)]
            means = [begin[measure], *(p["mean"] for p in points)]
            (line,) = axes.plot(calls, means, marker="o", label=method)
            axes.fill_between(
                calls,
                [begin[measure], *(p["low"] for p in points)],
                [begin[measure], *(p["high"] for p in points)],
                color=line.get_color(),
                alpha=0.15,
            )
        axes.set_xlabel("network calls")
        axes.set_title(measure)
        low, high = (
            f([r[k] for r in data if r["quantity"] == measure and r.get("update")])
            for f, k in ((min, "mean"), (max, "mean"))
        )
        room = 0.5 * (max(high, begin[measure]) - min(low, begin[measure])) or 1.0
        axes.set_ylim(min(low, begin[measure]) - room, max(high, begin[measure]) + room)
    picture.axes[0].legend(fontsize="small")
    return picture


def _told(
    begin: Mapping[str, float],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    differences: Mapping[tuple[str, str, str, str], Interval],
    rates: Mapping[str, float],
    budget: Budget,
    seeds: int,
) -> str:
    lines = []
    for method, each in results.items():
        change = {
            measure: interval([value - begin[measure] for value in _ends(each, measure).values()])
            for measure in (DISTANCE, CONFIDENCE)
        }
        calls = f"{each[0]['lines'][-1]['network_calls']:,}"
        shown = str(change[DISTANCE]), str(change[CONFIDENCE])
        lines.append([method, f"{rates[method]:g}", calls, *shown])
    head = ["method", "rate", "network calls", "change of the distance", "change of the confidence"]

    def claims(budgeted: str) -> str:
        told = []
        for ours in OURS:
            for theirs in THEIRS:
                near, sure = (
                    differences[budgeted, ours, theirs, m] for m in (DISTANCE, CONFIDENCE)
                )
                nearness = near.verdict("further from the data", "nearer to the data", APART)
                certainty = sure.verdict("more", "less", APART)
                told.append(
                    f"- {ours} less {theirs}: distance {near} ({nearness}), "
                    f"confidence {sure} ({certainty})."
                )
        return "\n".join(told)

    distances = [value for key, value in differences.items() if key[-1] == DISTANCE]
    if all(value.below_zero for value in distances):
        verdict = "is confirmed here"
    elif all(value.above_zero for value in distances):
        verdict = "is refuted here"
    elif any(value.below_zero or value.above_zero for value in distances):
        verdict = "is neither confirmed nor refuted here: it depends on the pair, as listed"
    else:
        verdict = (
            "is neither confirmed nor refuted here: no difference of distances excludes 0, with "
            f"{seeds} seeds and {budget.updates} updates"
        )
    rates_swept = ", ".join(f"{r:g}" for r in budget.rates)
    ends = [
        f"the {end} was taken for {', '.join(which)}"
        for end, rate in (("smallest", min(budget.rates)), ("largest", max(budget.rates)))
        if (which := [method for method, taken in rates.items() if taken == rate])
    ]
    edge = f" ({'; '.join(ends)}: the best may lie beyond)" if ends else ""
    return f"""
The {budget.model} network, {STEPS} steps of the published schedule, which starts at alpha-bar
0.0208; {budget.updates} updates of {budget.samples} pictures, an energy network of width
{budget.energy_width}, {seeds} seeds. The pretrained model is at a distance of
{begin[DISTANCE]:.2f} and a confidence of {begin[CONFIDENCE]:.3f} on the same noise
({budget.judged} samples against {budget.real} pictures of the test set; distances of so few samples
are biased upwards, alike for all). All methods take as many steps of energy, value and policy; the
path KL asks the pretrained network as well, at the step of a path that is used, so that it makes
some more calls of the network. Rates were swept over {rates_swept} on a seed of their own{edge}.

{table(head, lines)}

At equal network calls (those of the method that makes fewest; linearly between judgements), seed by
seed on the same noise:

{claims(CALLS)}

At equal updates:

{claims(UPDATES)}

That continuous-time reinforcement learning trains faster and to better samples than DxMI {verdict}.
The published comparison was with DxMI without its entropy and cost of moves, which is the second
line; both are shown.
"""
