"""Figure 1: trained at 50 steps and used at 25, 50 and 100; DDPO against Score as Action.

Exact part   The Gaussian problem of ``diffusion_envs.exact``. Both methods spend as many network
             calls; each trains two policies, one that is smooth in time (polynomials of the
             signal), and a table with an entry for each of the 50 steps. The table says nothing of
             other noise levels, so it is read there in three ways: the nearest entry, linearly
             between the two neighbours, or as the pretrained score (zero). What is generated is
             Gaussian, and evaluated without a random number (``benchmarks.exact_laws``).
Image part   The embedded Stable Diffusion model and one prompt, as in the paper; no KL is charged
             by either method. The fine-tuned models and the pretrained one see the same noise.

The gain is the mean reward over that of the pretrained model with as many steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure as Picture

from benchmarks import compared_methods, exact_laws, transfer
from benchmarks.compared_methods import Entry
from benchmarks.exact_laws import TableCorrection
from benchmarks.figures.figure import Figure, Interval, Kept, interval, paired, row, table
from ctrl import DeterministicPolicy
from diffusion_envs import exact, rewards
from diffusion_envs import objectives as o
from diffusion_envs.environment import Environment
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.runs.evaluation import HELD_OUT
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

DDPO, OURS = "DDPO", "Score as Action"
READINGS = ("nearest", "linear", "zero")
PROMPT = "a photo of a cat"


@dataclass(frozen=True)
class Budget:
    """How much the figure may spend.

    Attributes:
        seeds: of training.
        parts: some of exact, images.
        trained_at: steps of DDIM, eta 1, in training.
        used_at: steps of the evaluations.
        calls: of the network, for every training on the exact problem.
        samples: an update there.
        image_updates: of every training on the image model.
        image_samples: an update there.
        train_steps: of every path there that carry a gradient.
        held_out: samples of an evaluation there.
        device: of the image model.
    """

    seeds: int = 3
    parts: tuple[str, ...] = ("exact", "images")
    trained_at: int = 50
    used_at: tuple[int, ...] = (25, 50, 100)
    calls: int = 640_000
    samples: int = 64
    image_updates: int = 12
    image_samples: int = 16
    train_steps: int = 10
    held_out: int = 24
    device: str = "cpu"


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "cpu": Budget(),
        "gpu": Budget(
            seeds=8,
            calls=6_400_000,
            image_updates=200,
            image_samples=64,
            held_out=512,
            device="cuda",
        ),
    }
)

# learning rates: of short sweeps on seed 100, and of the leaderboard's for Score as Action
EXACT_METHODS: Mapping[str, tuple[Entry, float]] = MappingProxyType(
    {
        DDPO: (Entry(lambda b: o.DDPO()), 3e-3),
        OURS: (Entry(lambda b: o.ScoreAsAction(kl_weight=b, clip=1.0, denoised=False)), 3e-2),
    }
)
IMAGE_METHODS: Mapping[str, o.Objective] = MappingProxyType(
    {
        DDPO: o.DDPO(learning_rate=1e-2),
        OURS: o.ScoreAsAction(kl_weight=0.0, clip=1.0, learning_rate=1e-2),
    }
)

Gains = dict[str, float]  # by number of steps, as text


def run(budget: Budget, output: Path, seeds: int) -> Figure:
    """Train and evaluate what is missing; then the figure.

    Args:
        budget: of ``BUDGETS``, or another.
        output: folder of the results, where single runs are kept.
        seeds: of training.
    """
    kept = Kept(output)
    gains: dict[str, dict[int, Gains]] = {}
    for part in budget.parts:
        for seed in range(seeds):
            for name, values in PARTS[part](budget, kept, seed).items():
                gains.setdefault(name, {})[seed] = values
    return figure(budget, gains, seeds)


def exact_part(budget: Budget, kept: Kept, seed: int) -> dict[str, Gains]:
    """Gains on the exact problem: both methods, both policies, and the optimum as a table."""
    gains = {}
    for method, training in EXACT_METHODS.items():
        key: dict[str, Any] = {"figure": 1, "part": "exact", "method": method, "seed": seed}
        key |= {"training": _described(training), "calls": budget.calls, "samples": budget.samples}
        key |= {"trained_at": budget.trained_at, "used_at": budget.used_at}
        result = kept.get(key, lambda m=method: exact_gains(budget, m, seed))
        gains |= {f"exact, {method}, {policy}": values for policy, values in result.items()}
    problem, chain = exact.GaussianProblem(), _chains(budget)[budget.trained_at]
    for reading in READINGS:
        score = exact_laws.table_of_optimum(problem, chain, elsewhere=reading)
        gains[f"exact, optimum, table read as {reading}"] = _exact_gains_of(score, budget)
    return gains


def image_part(budget: Budget, kept: Kept, seed: int) -> dict[str, Gains]:
    """Gains on the image model, of both methods: means over samples with the same noise."""
    key: dict[str, Any] = {"figure": 1, "part": "images", "seed": seed}
    names = ("trained_at", "used_at", "image_updates", "image_samples", "train_steps", "held_out")
    key |= {name: getattr(budget, name) for name in (*names, "device")}
    before = kept.get(key | {"method": "pretrained"}, lambda: image_rewards(budget, None, seed))
    gains = {}
    for method, objective in IMAGE_METHODS.items():
        after = kept.get(
            key | {"method": method, "training": repr(objective)},
            lambda m=method: image_rewards(budget, m, seed),
        )
        gains[f"images, {method}"] = {
            steps: float((torch.tensor(after[steps]) - torch.tensor(before[steps])).mean())
            for steps in before
        }
    return gains


PARTS: Mapping[str, Callable[[Budget, Kept, int], dict[str, Gains]]] = MappingProxyType(
    {"exact": exact_part, "images": image_part}
)


def _described(method: tuple[Entry, float]) -> str:
    entry, rate = method
    return f"{entry.objective(exact.GaussianProblem().kl_weight)!r} at {rate:g}"


# -- the exact problem ----------------------------------------------------------------------------


def _chains(budget: Budget) -> dict[int, Any]:
    steps = {budget.trained_at, *budget.used_at}
    return {n: DDIM(eta=1.0).bind(exact.table(), n) for n in sorted(steps)}


def _exact_gains_of(score: exact.CorrectedScore, budget: Budget) -> Gains:
    problem, gains = exact.GaussianProblem(), {}
    pretrained = exact_laws.pretrained_score(problem, exact.table())
    for steps, chain in _chains(budget).items():
        outcomes = (exact_laws.evaluate(problem, which, chain) for which in (score, pretrained))
        after, before = outcomes
        gains[str(steps)] = after.reward - before.reward
    return gains


def exact_gains(budget: Budget, method: str, seed: int) -> dict[str, Gains]:
    """Gains of the smooth policy, and of the table for every way to read it.

    Raises:
        FloatingPointError: a training diverged.
    """
    problem = exact.GaussianProblem()
    entry, rate = EXACT_METHODS[method]
    chain, dim = _chains(budget)[budget.trained_at], len(problem.mean)
    spent = compared_methods.Budget(
        queries=10**12, calls=budget.calls, samples=budget.samples, steps=budget.trained_at
    )
    gains = {}
    for correction in (None, TableCorrection(chain, dim)):
        steps = budget.trained_at
        score, cost = transfer.train(problem, entry, spent, steps, rate, seed, correction)
        if cost["diverged"]:
            raise FloatingPointError(f"{method} diverged on seed {seed}; lower its learning rate")
        if correction is None:
            gains["smooth"] = _exact_gains_of(score, budget)
            continue
        for reading in READINGS:
            correction.elsewhere = reading
            gains[f"table read as {reading}"] = _exact_gains_of(score, budget)
    return gains


# -- the image model ------------------------------------------------------------------------------


def image_rewards(budget: Budget, method: str | None, seed: int) -> dict[str, list[float]]:
    """Rewards of the held-out samples, by number of steps; None is the pretrained model.

    Raises:
        FloatingPointError: the training diverged.
    """
    levels = compared_methods.TinyProblem().table
    environment = Environment(
        model=TextToImageUNet.load(guidance=1.0, seed=seed, device=budget.device),
        sampler=DDIM(eta=1.0).bind(levels, budget.trained_at),
        reward=rewards.PromptAlignment("reward"),
        prompts=[PROMPT],
        seed=seed,
    )
    if method is not None:
        _train(environment, IMAGE_METHODS[method], budget)
    scored = {}
    for steps in budget.used_at:
        other = dataclasses.replace(environment, sampler=DDIM(eta=1.0).bind(levels, steps))
        samples = torch.arange(budget.held_out).split(64)
        parts = [
            other.sample(
                lambda mean, _: DeterministicPolicy(mean),
                range(int(part[0]), int(part[-1]) + 1),
                torch.zeros(len(part), dtype=torch.long),
                stream=HELD_OUT,
                reference=False,
            ).rollout.rewards
            for part in samples
        ]
        scored[str(steps)] = torch.cat(parts).tolist()
    return scored


def _train(environment: Environment, objective: o.Objective, budget: Budget) -> None:
    size = UpdateSize(
        samples=budget.image_samples,
        train_steps=min(budget.train_steps, budget.trained_at),
        weight_decay=0.0,
    )
    accelerator = Accelerator(cpu=budget.device == "cpu")
    trainer = Trainer(environment, objective, size, accelerator=accelerator)
    for update in range(budget.image_updates):
        for group in trainer.optimiser.param_groups:
            group["lr"] = objective.learning_rate * (1 - update / budget.image_updates)
        trainer.step()


# -- what is told ---------------------------------------------------------------------------------


def figure(budget: Budget, gains: Mapping[str, Mapping[int, Gains]], seeds: int) -> Figure:
    """Picture and paragraph of these gains.

    Args:
        budget: that they were made with.
        gains: by part, method and policy; by seed; by number of steps.
        seeds: how many.
    """
    home = str(budget.trained_at)

    def at(name: str, steps: str) -> dict[int, float]:
        return {seed: values[steps] for seed, values in gains[name].items()}

    away = [str(n) for n in budget.used_at if n != budget.trained_at]
    rows: list[dict[str, Any]] = []
    summary: dict[str, dict[str, Interval]] = {}
    for name in gains:
        told = summary[name] = {}
        for steps in (str(n) for n in budget.used_at):
            told[steps] = interval(list(at(name, steps).values()))
            rows.append(row("gain", told[steps], policy=name, steps=steps))
        for steps in away:
            told[f"lost at {steps}"] = paired(at(name, home), at(name, steps))
            rows.append(row("gain lost", told[f"lost at {steps}"], policy=name, steps=steps))
            kept = [at(name, steps)[s] / at(name, home)[s] for s in gains[name]]
            told[f"kept at {steps}"] = interval(kept)
            rows.append(row("share kept", told[f"kept at {steps}"], policy=name, steps=steps))
    duels: dict[str, dict[str, Interval]] = {}
    for name, (first, second) in _rivals(gains).items():
        told = duels[name] = {}
        for steps in (str(n) for n in budget.used_at):
            told[steps] = paired(at(second, steps), at(first, steps))
            rows.append(row(f"gain, {OURS} - {DDPO}", told[steps], policy=name, steps=steps))
        for steps in away:
            lost = [
                {s: at(which, home)[s] - at(which, steps)[s] for s in gains[which]}
                for which in (first, second)
            ]
            told[f"lost at {steps}"] = paired(*lost)
            where = {"policy": name, "steps": steps}
            rows.append(row(f"gain lost, {DDPO} - {OURS}", told[f"lost at {steps}"], **where))
    return Figure(
        title=f"Trained at {home} steps, used at others",
        settings=dataclasses.asdict(budget) | {"seeds": seeds, "prompt": PROMPT},
        data=rows,
        picture=_picture(budget, summary),
        paragraph=_paragraph(budget, summary, duels, seeds),
    )


def _rivals(gains: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """(DDPO's, ours) of every part and policy that both have."""
    pairs = {name: (name, name.replace(DDPO, OURS)) for name in gains if DDPO in name}
    return {name.replace(f"{DDPO}, ", "").replace(f", {DDPO}", ""): p for name, p in pairs.items()}


_STYLE = {
    "smooth": "-",
    "table read as linear": "-.",
    "table read as nearest": "--",
    "table read as zero": ":",
}


def _picture(budget: Budget, summary: Mapping[str, Mapping[str, Interval]]) -> Picture:
    picture = Picture(figsize=(11, 4.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    colours = {DDPO: "C3", OURS: "C0"}
    for k, (name, told) in enumerate(summary.items()):
        part, method, *policy = name.split(", ")
        if method not in colours:
            continue
        axes = left if part == "exact" else right
        x = [n * (1 + 0.012 * (k % 5 - 2)) for n in budget.used_at]
        points = [told[str(n)] for n in budget.used_at]
        axes.errorbar(
            x,
            [p.mean for p in points],
            [[p.mean - p.low for p in points], [p.high - p.mean for p in points]],
            color=colours[method],
            linestyle=_STYLE[policy[0]] if policy else "-",
            marker="o",
            markersize=4,
            capsize=2,
            label=", ".join([method, *policy]),
        )
    for axes, title in ((left, "exact problem"), (right, f"image model, one prompt: {PROMPT}")):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(budget.trained_at, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="DDIM steps (eta 1)", title=title)
        axes.set_xticks(budget.used_at, [str(n) for n in budget.used_at])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
        else:
            axes.set_visible(False)  # a part that is not made
    left.set_ylabel("gain in reward over the pretrained model")
    return picture


def _paragraph(
    budget: Budget,
    summary: Mapping[str, Mapping[str, Interval]],
    duels: Mapping[str, Mapping[str, Interval]],
    seeds: int,
) -> str:
    home = str(budget.trained_at)
    away = [str(n) for n in budget.used_at if n != budget.trained_at]
    head = ["policy", *(f"gain at {n}" for n in budget.used_at), *(f"kept at {n}" for n in away)]
    lines = []
    for name, told in summary.items():
        exactly = "optimum" in name
        gains = [told[str(n)] for n in budget.used_at]
        cells = [f"{gain.mean:+.3f}" if exactly else str(gain) for gain in gains]
        for n in away:
            resolved = exactly or told[home].above_zero
            cells.append(_share(told[f"kept at {n}"], exactly) if resolved else "not resolved")
        lines.append([name, *cells])
    images = "images" in duels
    text = [
        f"""The paper's Figure 1 reports that a model which DDPO fine-tunes with {home} steps keeps
little of its gain with twice as many (ImageReward +0.046, and less than +0.016; one prompt, no
interval known to us): training in discrete time overfits its step count. Here DDPO and Score as
Action train at {home} steps with equal network calls, {seeds} seeds each."""
    ]
    last = away[-1]
    kept = {name: told[f"kept at {last}"] for name, told in summary.items()}
    on_exact = any(name.startswith("exact") for name in duels)
    if on_exact:
        text[0] += _ON_EXACT.format(calls=budget.calls)
    if images:
        text[0] += _ON_IMAGES.format(updates=budget.image_updates, samples=budget.image_samples)
    text.append(table(head, lines))
    if on_exact:
        text.append(_of_tables(kept, last))
    if images:
        text.append(_of_images(summary, duels["images"], home, last))
    return "\n\n".join(text)


_ON_EXACT = """ On the Gaussian problem ({calls:,} calls) the policy is smooth in time, or a table
with one entry a step, which is read at other noise levels as the nearest entry, linearly between
neighbours, or as the pretrained score (zero)."""

_ON_IMAGES = """ On the embedded image model there is one prompt, and neither method charges a KL:
{updates} updates of {samples} samples."""


def _of_tables(kept: Mapping[str, Interval], last: str) -> str:
    """What is told of the exact problem, from shares kept at ``last`` steps, by policy."""

    def trained(policy: str) -> list[Interval]:
        return [kept[f"exact, {method}, {policy}"] for method in (DDPO, OURS)]

    text = f"""On the exact problem, with {last} steps, a smooth policy keeps
{_range(trained("smooth"))} of its gain; a table keeps
{_range(trained("table read as nearest"))} if the nearest entry is read,
{_range(trained("table read as linear"))} between neighbours, and
{_range(trained("table read as zero"))} where unseen times get the pretrained score (the optimum of
the chain, so read, keeps {kept["exact, optimum, table read as zero"].mean:.2f})."""
    smooth, zero = trained("smooth"), trained("table read as zero")
    if min(one.low for one in smooth) > max(one.high for one in zero):
        return (
            text
            + """ All intervals of the smooth policies lie above all of those tables, whichever
method trained them: how the policy depends on time decides. **Agrees with the paper:** what is
learned in discrete time can be lost at other step counts. **Does not:** a table that Score as
Action trained loses it as well, and a smooth policy that DDPO trained keeps it; a policy that says
nothing between its steps explains a loss of the size that the paper reports, the integrator's bias
does not."""
        )
    return text + " The intervals of smooth policies and tables overlap: nothing follows from them."


def _of_images(
    summary: Mapping[str, Mapping[str, Interval]],
    duel: Mapping[str, Interval],
    home: str,
    last: str,
) -> str:
    theirs, ours = summary[f"images, {DDPO}"], summary[f"images, {OURS}"]
    better = duel[home].verdict(f"{OURS} gains more", f"{DDPO} gains more", "not resolved")
    lost = duel[f"lost at {last}"]
    claim = lost.verdict("confirmed", "refuted", "neither confirmed nor refuted by these seeds")
    return f"""On the image model, whose network is smooth in time, the gain at {home} steps is
{theirs[home]} (DDPO) and {ours[home]} (Score as Action); difference {duel[home]}: {better}. From
{home} to {last} steps DDPO loses {theirs[f"lost at {last}"]} of it and Score as Action
{ours[f"lost at {last}"]}. That DDPO loses more ({lost}) is {claim}. Calls of the network are
matched; of the reward Score as Action asks more, as its values begin with the denoised image of
every step."""


def _share(kept: Interval, exactly: bool) -> str:
    return f"{kept.mean:.2f}" + ("" if exactly else f" [{kept.low:.2f}, {kept.high:.2f}]")


def _range(shares: list[Interval]) -> str:
    means = [share.mean for share in shares]
    return f"{min(means):.2f} to {max(means):.2f}"
