"""Figure 2: the value of the pretrained model, learned by value networks of several designs.

Every design is V = c_skip(s) first + c_out(s) F, with s the noising time, ``first`` the reward of
the denoised image or of the noisy one, and F a small network of one of the two. The authors'
configurations have four: cosine and sine, linear, and both terms denoised or both noisy with
weights cos and 1 - cos. Added: the network alone, r(x0_hat) + F, and r(x0_hat) without a network.
Their F begins as a copy of the reward model; here it is the library's network, and begins at the
mean reward.

Each is fitted to the same roll-outs by the library's critic, and evaluated on held-out paths: the
excess E|V_hat - V|^2 over the irreducible loss E Var(r | X). V is known exactly on two problems
(Gaussian data and quadratic reward; a mixture and a cosine). On the image model it is not: from
held-out states several paths are continued, and with mean m and variance v of K rewards
(V_hat - m)^2 - v / K is an unbiased estimate. Both are averaged over the nodes as the critic
weighs them, and told as a share of the reward's variance.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from matplotlib.figure import Figure as Picture
from torch import Tensor

from benchmarks import compared_methods, exact_laws
from benchmarks.figures.figure import Figure, Interval, Kept, interval, paired, row, table
from ctrl import DeterministicPolicy
from ctrl.noise import stream
from diffusion_envs import exact, rewards
from diffusion_envs import objectives as o
from diffusion_envs.environment import Environment
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.rollout import Rollout
from diffusion_envs.runs.evaluation import HELD_OUT
from diffusion_envs.runs.method_names import CLASS_PROMPTS
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import value_network as v
from diffusion_envs.training.critic import Critic
from diffusion_envs.training.update_size import UpdateSize

Seen = Literal["denoised", "noisy"]


@dataclass(frozen=True)
class Design:
    """A value network.

    Attributes:
        first: what the reward is applied to; None for no such term.
        second: what the network sees; None for no network.
        weights: of the two.
    """

    first: Seen | None
    second: Seen | None
    weights: v.Weights | None = None


PAPER = "cos, sin"
DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        PAPER: Design("denoised", "noisy", v.skip_weights),
        "linear": Design("denoised", "noisy", v.linear_weights),
        "both denoised": Design("denoised", "denoised", v.cosine_weights),
        "both noisy": Design("noisy", "noisy", v.cosine_weights),
        "network alone": Design(None, "noisy"),
        "r(x0_hat) + F": Design("denoised", "noisy", v.constant_weights),
        "r(x0_hat) alone": Design("denoised", None),
    }
)


@dataclass(frozen=True)
class Budget:
    """How much the figure may spend.

    Attributes:
        seeds: of roll-outs, initial weights and held-out paths.
        parts: some of gaussian, mixture, images.
        passes: over the roll-outs after which a network is evaluated, increasing.
        steps: of DDIM, eta 1, on the exact problems.
        paths: to learn from, there.
        held_out: paths to be evaluated on, there.
        image_steps: of DDIM, eta 1, on the image model.
        image_paths: to learn from, there.
        image_held_out: paths to be evaluated on, there.
        continuations: of each of their states.
        every: nodes between two that are continued.
        batch: paths that the critic learns from at once.
        device: of the image model.
    """

    seeds: int = 3
    parts: tuple[str, ...] = ("gaussian", "mixture", "images")
    passes: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    steps: int = 50
    paths: int = 128
    held_out: int = 512
    image_steps: int = 10
    image_paths: int = 96
    image_held_out: int = 32
    continuations: int = 3
    every: int = 2
    batch: int = 6
    device: str = "cpu"


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "cpu": Budget(),
        "gpu": Budget(
            seeds=8,
            passes=(0, 1, 2, 4, 8, 16, 32, 64, 128),
            paths=4096,
            held_out=4096,
            image_steps=50,
            image_paths=2048,
            image_held_out=512,
            continuations=8,
            every=5,
            device="cuda",
        ),
    }
)


@dataclass(frozen=True, eq=False)
class Fixed:
    """What networks of all designs learn from, and are evaluated on.

    Attributes:
        environment: the pretrained model.
        train: paths to learn from.
        held_out: paths to be evaluated on.
        first: rewards of denoised and of noisy states at every node, of both.
        nodes: that are evaluated.
        truth: V there, or the mean of its estimates.
        noise: variance of that mean; 0 where V is known.
        irreducible: E Var(r | X) at these nodes, estimated on the held-out paths.
    """

    environment: Environment
    train: Rollout
    held_out: Rollout
    first: Mapping[str, tuple[Tensor, Tensor]]
    nodes: list[int]
    truth: Float[Tensor, "paths chosen"]
    noise: Float[Tensor, "paths chosen"]
    irreducible: Float[Tensor, " chosen"]

    @property
    def weights(self) -> Float[Tensor, " chosen"]:
        """Of the evaluated nodes, as the critic weighs their steps; they sum to 1."""
        sizes = self.held_out.step_sizes.cpu().double()[self.nodes]
        return sizes / sizes.sum()

    def excess(self, values: Float[Tensor, "paths nodes"]) -> Float[Tensor, " chosen"]:
        """E|V_hat - V|^2 at the evaluated nodes; unbiased also where V is estimated."""
        gap = values.detach().cpu().double()[:, self.nodes] - self.truth
        return (gap.square() - self.noise).mean(0)


def run(budget: Budget, output: Path, seeds: int) -> Figure:
    """Fit and evaluate what is missing; then the figure.

    Args:
        budget: of ``BUDGETS``, or another.
        output: folder of the results, where single runs are kept.
        seeds: of everything that is drawn.
    """
    kept = Kept(output)
    results = {
        (problem, design, seed): result
        for problem in budget.parts
        for seed in range(seeds)
        for design, result in part(budget, kept, problem, seed).items()
    }
    return figure(budget, results, seeds)


def part(budget: Budget, kept: Kept, problem: str, seed: int) -> dict[str, dict[str, Any]]:
    """All designs on one problem; the paths are made once, if a run is missing."""
    made: list[Fixed] = []

    def fixed() -> Fixed:
        if not made:
            made.append(PROBLEMS[problem](budget, seed))
        return made[0]

    settings = dataclasses.asdict(budget)
    del settings["seeds"], settings["parts"]
    results = {}
    for name, design in DESIGNS.items():
        key = {"figure": 2, "part": problem, "method": name, "seed": seed} | settings
        results[name] = kept.get(key, lambda d=design: fitted(budget, fixed(), d))
    return results


def fitted(budget: Budget, fixed: Fixed, design: Design) -> dict[str, Any]:
    """Fit one design; its excess after every number of passes, at the nodes and over all."""
    objective = o.TDPO() if design.second == "denoised" else o.ScoreAsAction(kl_weight=0.0)
    train, held_out = fixed.train, fixed.held_out
    nodes = train.states.shape[1]
    size = UpdateSize(value_epochs=1, value_batch=budget.batch * nodes)
    critic = Critic(
        fixed.environment, objective, size, Accelerator(cpu=True), "value", design.weights
    )
    critic.network.calibrate(train.rewards)
    shown, asked = (None, None) if design.first is None else fixed.first[design.first]
    curve, done = [], 0
    for passes in budget.passes if design.second is not None else (0,):
        for update in range(done, passes):
            critic.improve(train, shown, update)
        done = passes
        with torch.no_grad():
            values = asked if design.second is None else critic.values(held_out, asked)
        assert values is not None  # without a network the first term is there
        curve.append(fixed.excess(values))
    return {
        "passes": list(budget.passes if design.second is not None else (0,)),
        "excess": [float(fixed.weights @ one) for one in curve],
        "equal_weights": [float(one.mean()) for one in curve],
        "by_node": curve[-1].tolist(),
        "irreducible": float(fixed.weights @ fixed.irreducible),
        "variance": float(held_out.rewards.double().var()),
        "queries": len(train.rewards) * (1 if design.first is None else nodes),
    }


# -- the problems ---------------------------------------------------------------------------------


def _rolled_out(environment: Environment, paths: int, name: str) -> tuple[Rollout, Tensor, Tensor]:
    """Paths of the pretrained model; rewards of denoised and of noisy states at every node."""
    condition = torch.arange(paths) % len(environment.prompts)
    sample = environment.sample(
        lambda mean, _: DeterministicPolicy(mean),
        range(paths),
        condition,
        stream=name,
        denoised=True,
        reference=False,
    )
    assert sample.denoised_rewards is not None
    rollout = sample.rollout
    noisy = [
        environment.score_images(
            environment.reward, environment.model.decode(states), sample.prompts
        )
        for states in rollout.states.unbind(1)
    ]
    return rollout, sample.denoised_rewards, torch.stack(noisy, dim=1).to(rollout.rewards)


def _known(
    environment: Environment, budget: Budget, value: Callable[[int, Tensor], Tensor]
) -> Fixed:
    """A problem whose V is known: ``value`` of (node, states)."""
    train, denoised, noisy = _rolled_out(environment, budget.paths, "train")
    held_out, asked, asked_noisy = _rolled_out(environment, budget.held_out, HELD_OUT)
    nodes = list(range(environment.steps.steps))
    states = held_out.states.double()
    truth = torch.stack([value(k, states[:, k]) for k in nodes], dim=1)
    return Fixed(
        environment,
        train,
        held_out,
        {"denoised": (denoised, asked), "noisy": (noisy, asked_noisy)},
        nodes,
        truth,
        torch.zeros_like(truth),
        (held_out.rewards.double()[:, None] - truth).square().mean(0),
    )


def gaussian(budget: Budget, seed: int) -> Fixed:
    """Gaussian data and a quadratic reward: V is quadratic."""
    problem, sampler = exact.GaussianProblem(), DDIM(eta=1.0).bind(exact.table(), budget.steps)
    none = exact.AffineCorrection(len(problem.mean))
    with torch.no_grad():
        values = exact_laws.affine_values(problem, sampler, none, kl_weight=0.0)
    return _known(problem.environment(sampler, seed), budget, lambda k, x: values[k](x))


def mixture(budget: Budget, seed: int) -> Fixed:
    """A scalar mixture and a cosine as reward: V is computed on a grid."""
    problem, sampler = exact.MixtureProblem(), DDIM(eta=1.0).bind(exact.table(), budget.steps)
    unchanged = torch.zeros(budget.steps, problem.points, dtype=torch.float64)
    values = problem.values_of(unchanged, sampler).numpy()
    grid = problem.grid.numpy()

    def value(node: int, states: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(states[:, 0].numpy(), grid, values[node]))

    return _known(problem.environment(sampler, seed), budget, value)


def images(budget: Budget, seed: int) -> Fixed:
    """The embedded image model, all classes: V is estimated from continued paths."""
    levels = compared_methods.TinyProblem().table
    environment = Environment(
        model=TextToImageUNet.load(guidance=1.0, seed=seed, device=budget.device),
        sampler=DDIM(eta=1.0).bind(levels, budget.image_steps),
        reward=rewards.PromptAlignment("reward"),
        prompts=CLASS_PROMPTS,
        seed=seed,
    )
    train, denoised, noisy = _rolled_out(environment, budget.image_paths, "train")
    held_out, asked, asked_noisy = _rolled_out(environment, budget.image_held_out, HELD_OUT)
    nodes = list(range(0, budget.image_steps, budget.every))
    draws = torch.stack(
        [continued(environment, held_out, node, budget.continuations) for node in nodes], dim=1
    )
    variance = draws.var(2)
    return Fixed(
        environment,
        train,
        held_out,
        {"denoised": (denoised, asked), "noisy": (noisy, asked_noisy)},
        nodes,
        draws.mean(2),
        variance / budget.continuations,
        variance.mean(0),
    )


@torch.no_grad()
def continued(
    environment: Environment, rollout: Rollout, node: int, count: int
) -> Float[Tensor, "paths count"]:
    """Rewards of ``count`` independent paths from each state at a node, float64."""
    steps = environment.steps
    condition = rollout.condition.repeat_interleave(count)
    states = rollout.states[:, node].repeat_interleave(count, 0)
    noise = stream(environment.seed, "continued", node)
    for k in range(node, steps.steps):
        which = torch.full((len(states),), k, device=states.device)
        drawn = torch.randn(states.shape, generator=noise).to(states)
        mean = steps.mean(which, states, environment.action(states, k, condition))
        states = mean + float(steps.std[k]) * drawn
    scores = [
        environment.score_images(
            environment.reward, environment.model.decode(part), environment.prompts_of(prompts)
        )
        for part, prompts in zip(states.split(64), condition.split(64), strict=True)
    ]
    return torch.cat(scores).double().cpu().view(-1, count)


PROBLEMS: Mapping[str, Callable[[Budget, int], Fixed]] = MappingProxyType(
    {"gaussian": gaussian, "mixture": mixture, "images": images}
)


# -- what is told ---------------------------------------------------------------------------------

Results = Mapping[tuple[str, str, int], Mapping[str, Any]]


def figure(budget: Budget, results: Results, seeds: int) -> Figure:
    """Picture and paragraph of these results.

    Args:
        budget: that they were made with.
        results: of ``fitted``, by problem, design and seed.
        seeds: how many.
    """
    problems = list(dict.fromkeys(problem for problem, _, _ in results))

    def shares(problem: str, design: str, at: int, what: str = "excess") -> dict[int, float]:
        every = {seed: results[problem, design, seed] for seed in range(seeds)}
        return {seed: one[what][at] / one["variance"] for seed, one in every.items()}

    rows: list[dict[str, Any]] = []
    curves: dict[tuple[str, str], list[tuple[int, Interval]]] = {}
    behind: dict[tuple[str, str], Interval] = {}
    early: dict[tuple[str, str], Interval] = {}
    for problem in problems:
        for design in DESIGNS:
            where = {"problem": problem, "design": design}
            curve = curves[problem, design] = []
            for at, passes in enumerate(results[problem, design, 0]["passes"]):
                told = interval(list(shares(problem, design, at).values()))
                curve.append((passes, told))
                rows.append(row("excess / variance", told, **where, passes=passes))
                told = interval(list(shares(problem, design, at, "equal_weights").values()))
                rows.append(row("excess / variance, equal weights", told, **where, passes=passes))
            if design != PAPER:
                last, paper = shares(problem, design, -1), shares(problem, PAPER, -1)
                behind[problem, design] = paired(last, paper)
                rows.append(row(f"less that of {PAPER}", behind[problem, design], **where))
                first = 0 if DESIGNS[design].second is None else 1
                told = paired(shares(problem, design, first), shares(problem, PAPER, 1))
                early[problem, design] = told
                rows.append(row(f"less that of {PAPER}, after one pass", told, **where))
        irreducible = [
            results[problem, PAPER, seed]["irreducible"] / results[problem, PAPER, seed]["variance"]
            for seed in range(seeds)
        ]
        rows.append(row("irreducible / variance", interval(irreducible), problem=problem))
    return Figure(
        title="Designs of the value network, pretrained",
        settings=dataclasses.asdict(budget) | {"seeds": seeds},
        data=rows,
        picture=_picture(curves, problems),
        paragraph=_paragraph(budget, curves, behind, early, rows, problems, seeds),
    )


def _picture(
    curves: Mapping[tuple[str, str], list[tuple[int, Interval]]], problems: list[str]
) -> Picture:
    picture = Picture(figsize=(4.2 * len(problems) + 1.5, 4.0), layout="constrained")
    panels = picture.subplots(1, len(problems), squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        last = max(passes for passes, _ in curves[problem, PAPER])
        for k, design in enumerate(DESIGNS):
            curve = curves[problem, design]
            if DESIGNS[design].second is None:
                curve = [(0, curve[0][1]), (last, curve[0][1])]
            x, told = [passes for passes, _ in curve], [one for _, one in curve]
            style = ":" if DESIGNS[design].second is None else "-"
            axes.plot(x, [t.mean for t in told], style, color=f"C{k}", label=design)
            low, high = [t.low for t in told], [t.high for t in told]
            axes.fill_between(x, low, high, color=f"C{k}", alpha=0.15, linewidth=0)
        least = min(t.mean for design in DESIGNS for _, t in curves[problem, design])
        if least > 0:
            axes.set(yscale="log", ylim=(0.5 * least, None))
        else:
            axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=1)
        ticks = [passes for passes, _ in curves[problem, PAPER]]
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set(xlabel="passes over the roll-outs", title=problem)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("excess loss / variance of the reward")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


def _paragraph(
    budget: Budget,
    curves: Mapping[tuple[str, str], list[tuple[int, Interval]]],
    behind: Mapping[tuple[str, str], Interval],
    early: Mapping[tuple[str, str], Interval],
    rows: list[dict[str, Any]],
    problems: list[str],
    seeds: int,
) -> str:
    irreducible = {
        row["problem"]: row["mean"] for row in rows if row["quantity"] == "irreducible / variance"
    }
    lines = [
        [design, *(str(curves[problem, design][-1][1]) for problem in problems)]
        for design in DESIGNS
    ]
    lines.append(["irreducible", *(f"{irreducible[problem]:.3f}" for problem in problems)])

    def against(intervals: Mapping[tuple[str, str], Interval], problem: str) -> str:
        told: dict[str, list[str]] = {"worse": [], "better": [], "not told apart": []}
        for design in DESIGNS:
            if design != PAPER:
                verdict = intervals[problem, design].verdict("worse", "better", "not told apart")
                told[verdict].append(design)
        return "; ".join(f"{k}: {', '.join(names)}" for k, names in told.items() if names)

    def best(problem: str) -> str:
        return min(DESIGNS, key=lambda design: curves[problem, design][-1][1].mean)

    plain = [p for p in problems if behind[p, "network alone"].above_zero]
    noisy = [p for p in problems if behind[p, "both noisy"].above_zero]
    ahead = [
        f"{design} ({problem})" for (problem, design), told in behind.items() if told.below_zero
    ]
    first, last = budget.passes[1], budget.passes[-1]
    beaten = f"it is beaten, with an interval that excludes 0, by {', '.join(ahead)}."
    where = f"{budget.paths} paths of {budget.steps} steps"
    if "images" in problems:
        where += f" ({budget.image_paths} of {budget.image_steps} on the image model)"
    return "\n\n".join(
        [
            f"""The paper pretrains V = c_skip r(x0_hat) + c_out F on roll-outs of the pretrained
model and compares designs. Its configurations name four, the first four rows (the numbers of its
curves are not known to us). Here these and three more learn from the same {where} with the
library's critic, {seeds} seeds. Excess over the irreducible loss on held-out paths, as a share of
the reward's variance, after {last} passes; V is known exactly on the first two problems, and on
the image model estimated without bias from {budget.continuations} continued paths a state:""",
            table(["V", *problems], lines),
            f"""Against the paper's choice, {PAPER}, after {last} passes: """
            + ". ".join(f"{problem}: {against(behind, problem)}" for problem in problems)
            + f". After {first}: "
            + ". ".join(f"{problem}: {against(early, problem)}" for problem in problems)
            + ".",
            "Lowest mean: "
            + "; ".join(f"{best(problem)} ({problem})" for problem in problems)
            + """. With a quadratic reward V differs from r(x0_hat) by a function of time alone, so
the Gaussian problem favours what keeps r(x0_hat) whole; other rewards do not.""",
            "**Agrees with the paper:** "
            + _list("r(x0_hat) helps, a network alone is worse than its choice", plain)
            + " "
            + _list("A design that never sees x0_hat is worse than its choice", noisy)
            + " **Does not:** "
            + (beaten if ahead else "nothing; no design beats its choice.")
            + """ A term r(x0_hat) asks the reward at every node of every path, a network alone
once a path: by queries the comparison is another one. F is a small network that begins at the mean
reward, not a copy of the reward model as there, and the critic weighs steps by int g^2, not equally
(with equal weights the excess is in the data).""",
        ]
    )


def _list(claim: str, problems: list[str]) -> str:
    where = ", ".join(problems) if problems else "on no problem, with an interval that excludes 0"
    return f"{claim} ({where})."
