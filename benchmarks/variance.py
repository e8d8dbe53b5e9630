"""How noisy is the gradient of one update, and where does it point?

On the Gaussian problem, at a fixed policy: the pretrained one, and one half way to the optimum.
Each method's own gradient with respect to the affine adapter, as the loop computes it, over many
independent batches of 64 paths, is compared with the exact gradient of the chain's
J = E[reward] - kl_weight path KL:

    relative variance    E|g - E g|^2 / |E g|^2: how many updates must be averaged until noise and
                         gradient are equally large; it does not depend on the gradient's scale
    cosine of the mean   of E g with grad J: 1 if the method ascends J, and less if it has another
                         aim (or a biased advantage)
    cosine of one        of g with grad J, median and quartiles over the batches
    queries, calls       relative variance times what an update costs

as functions of the number of steps. All in the Euclidean geometry of the adapter's coefficients.

    python -m benchmarks.variance

What was measured is kept in a JSON-lines file and not repeated; table, CSV and picture are made
anew from all of it.
"""

import csv
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.exact_laws import affine_objective, affine_values, change_coefficients
from diffusion_envs import objectives as o
from diffusion_envs.environment import Sample
from diffusion_envs.exact import AffineCorrection, GaussianProblem, table
from diffusion_envs.models.exact import legendre
from diffusion_envs.objectives import Rollout, Rows
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.samplers import DDIM, BoundDDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
POLICIES = ("pretrained", "half way")


@dataclass(frozen=True)
class RawDDPO(o.DDPOScoreFunction):
    """DDPO with the reward as it is: the plain score-function gradient."""

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """The reward, the same at every step."""
        return rollout.rewards[:, None].expand_as(rollout.costs)


@dataclass(frozen=True)
class ByClock(o.ScoreAsAction):
    """Score as Action on steps drawn in proportion to int g^2, with replacement; unbiased."""

    shares: tuple[float, ...] = ()

    def step_probabilities(self, steps: int) -> Float[Tensor, " steps"]:
        """Each step's share of int g^2."""
        return torch.tensor(self.shares)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Divided by how much more often than evenly the step is drawn."""
        often = len(self.shares) * rows.step_size / rows.horizon
        return o.ScoreAsAction.loss(self, rows) / often


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator.

    Attributes:
        objective: (kl_weight, sampler) -> the objective.
        value: what it knows of V: a "network" trained on its own roll-outs of this policy, the
            "exact" one, or "none", where V is 0 but for the reward at the end.
        quarter: whether a quarter of the steps carries the gradient, or all.
    """

    objective: Callable[[float, BoundDDIM], o.Objective]
    value: Literal["network", "exact", "none"] = "none"
    quarter: bool = False


def estimators() -> dict[str, Estimator]:
    """All of them, by name."""
    common: dict[str, Any] = {"clip": 1.0, "denoised": False}

    def transitions(**settings: Any) -> Callable[[float, BoundDDIM], o.Objective]:
        return lambda b, s: o.ScoreAsAction(kl_weight=b, **common | settings)

    def drawn(exploration: float, **settings: Any) -> Callable[[float, BoundDDIM], o.Objective]:
        return lambda b, s: o.ScoreAsActionSampled(
            kl_weight=b, exploration=exploration, **common | settings
        )

    def by_clock(b: float, s: BoundDDIM) -> o.Objective:
        shares = (s.integrated_g2 / s.integrated_g2.sum()).tolist()
        return ByClock(kl_weight=b, shares=tuple(shares), **common)

    return {
        "score-as-action": Estimator(transitions(), "network"),
        "score-as-action, exact V": Estimator(transitions(), "exact"),
        "score-as-action, exact V, dV": Estimator(transitions(gae_rate=math.inf), "exact"),
        "score-as-action, no V": Estimator(transitions(gae_rate=0.0)),
        "score-as-action, r(x0) in V": Estimator(transitions(denoised=True), "network"),
        "score-as-action, a quarter": Estimator(transitions(), "network", quarter=True),
        "score-as-action, a quarter by g^2": Estimator(by_clock, "network", quarter=True),
        "drawn 0.1, exact V": Estimator(drawn(0.1), "exact"),
        "drawn 0.3, exact V": Estimator(drawn(0.3), "exact"),
        "drawn 1, exact V": Estimator(drawn(1.0), "exact"),
        "drawn 0.3, exact V, dV": Estimator(drawn(0.3, gae_rate=math.inf), "exact"),
        "drawn 0.3": Estimator(drawn(0.3), "network"),
        "drawn 0.3, no V": Estimator(drawn(0.3, gae_rate=0.0)),
        "ddpo": Estimator(lambda b, s: o.DDPO()),
        "ddpo, raw reward": Estimator(lambda b, s: RawDDPO()),
        "dpok (exact KL)": Estimator(
            lambda b, s: o.DPOK(reward_weight=1.0, kl_weight=b, exact_kl=True), "network"
        ),
        "grpo": Estimator(lambda b, s: o.GRPO(kl_weight=b)),
        "tdpo": Estimator(lambda b, s: o.TDPO(), "network"),
        "adjoint-matching (path KL)": Estimator(
            lambda b, s: o.AdjointMatching(kl_weight=b, path_kl=True)
        ),
        "draft (all steps, KL)": Estimator(lambda b, s: o.DRaFT(last=1000, kl_weight=b)),
    }


@dataclass(frozen=True)
class Options:
    """Measure the gradients of single updates.

    Attributes:
        estimators: some of them; all, if none is given.
        steps: of the sampler.
        network_steps: of the sampler, for estimators that train a value network first.
        policies: where the gradient is taken, of pretrained and half way.
        batches: independent updates.
        samples: paths of an update.
        value_updates: roll-outs of ``samples`` paths that a value network is trained on first.
        seed: of all noise.
        runs: folder of what was measured; goes on from what is there.
        output: folder of the results.
    """

    estimators: tuple[str, ...] = ()
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    network_steps: tuple[int, ...] = (10, 50)
    policies: tuple[str, ...] = POLICIES
    batches: int = 60
    samples: int = 64
    value_updates: int = 40
    seed: int = 0
    runs: Path = ROOT / "runs" / "variance"
    output: Path = DOCS


# -- policies, and the truth ----------------------------------------------------------------------


def half_way(problem: GaussianProblem) -> list[Tensor]:
    """Half of the continuous-time optimum, fitted by the adapter in the clock of g^2."""
    abar = table().alphas_cumprod
    alpha = abar.sqrt()
    gain, shift = change_coefficients(problem, alpha)
    dim = shift.shape[1]
    wanted = torch.cat([gain.flatten(1), shift], dim=1)
    root = -torch.cat([abar.new_zeros(1), abar.log()]).diff()
    root = root.sqrt()[:, None]
    terms = len(AffineCorrection(dim).shift)
    solution = torch.linalg.lstsq(root * legendre(alpha, terms), root * wanted).solution
    return [0.5 * solution[:, : dim**2].reshape(-1, dim, dim), 0.5 * solution[:, dim**2 :]]


def exact_correction(weights: Sequence[Tensor]) -> AffineCorrection:
    """An affine correction with these weights, float64."""
    correction = AffineCorrection(weights[1].shape[1]).double()
    with torch.no_grad():
        for parameter, value in zip(correction.parameters(), weights, strict=True):
            parameter.copy_(value)
    return correction


def exact_gradient(
    problem: GaussianProblem, sampler: BoundDDIM, weights: Sequence[Tensor]
) -> Float[Tensor, " parameters"]:
    """Gradient of J on the sampler's chain."""
    correction = exact_correction(weights)
    affine_objective(problem, sampler, correction).backward()
    return flat([p.grad for p in correction.parameters()])


def flat(tensors: Sequence[Tensor | None]) -> Float[Tensor, " parameters"]:
    """One vector, float64."""
    return torch.cat([t.flatten() for t in tensors if t is not None]).double()


# -- gradients ------------------------------------------------------------------------------------


class Measured:
    """An estimator at a policy: what trains there, and the roll-outs that it uses.

    Args:
        problem: the Gaussian one.
        estimator: in question.
        steps: of the sampler.
        weights: of the policy.
        options: of the run.
    """

    def __init__(
        self,
        problem: GaussianProblem,
        estimator: Estimator,
        steps: int,
        weights: Sequence[Tensor],
        options: Options,
    ) -> None:
        self.problem, self.estimator, self.options = problem, estimator, options
        self.weights = weights
        self.sampler = DDIM(eta=1.0).bind(table(), steps)
        self.environment = problem.environment(self.sampler, options.seed)
        self.parameters = self.environment.model.parameters
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.copy_(value)
        self.objective = estimator.objective(problem.kl_weight, self.sampler)
        size = UpdateSize(
            samples=options.samples,
            batch=1_000_000,
            weight_decay=0.0,
            train_steps=max(1, steps // 4) if estimator.quarter else None,
            value_batch=6 * (steps + 1),
        )
        self.trainer = Trainer(
            self.environment,
            self.objective,
            size,
            accelerator=Accelerator(cpu=True),
        )

    @property
    def denoised(self) -> bool:
        """Whether values start from rewards of denoised states."""
        return isinstance(self.objective, o.PathObjective) and self.objective.denoised_rewards

    def sample(self) -> Sample:
        """Roll-outs of all batches."""
        paths = self.options.batches * self.options.samples
        return self.environment.sample(
            self.objective.policy,
            range(paths),
            torch.zeros(paths, dtype=torch.long),
            stream="variance",
            denoised=self.denoised,
        )

    def prepare(self, sample: Sample, critics: dict[Any, Any]) -> dict[str, float]:
        """Train the value network, where there is one; what an update costs.

        The loop itself does it, with a learning rate of 0 for the adapter, which stays.

        Args:
            sample: whose rewards set the network's scale.
            critics: networks that are trained already, by what they learn from and what they see;
                this one is added.
        """
        trainer, before = self.trainer, flat([p.detach() for p in self.parameters])
        critic = trainer.critic
        if critic is not None:
            critic.calibrate(sample.rollout.rewards)
        trainer.update = 1  # the first one checks that the adapter is fresh
        for group in trainer.optimiser.param_groups:
            group["lr"] = 0.0
        queries, calls = self.environment.reward_queries, self.environment.model.calls
        trainer.step()
        cost: dict[str, float] = {
            "queries": self.environment.reward_queries - queries,
            "calls": self.environment.model.calls - calls,
        }
        if self.estimator.value == "network":
            assert critic is not None
            if self.learns not in critics:
                for _ in range(self.options.value_updates - 1):
                    trainer.step()
                critics[self.learns] = critic.network.state_dict()
            critic.network.load_state_dict(critics[self.learns])
        assert bool((flat([p.detach() for p in self.parameters]) == before).all())
        return cost

    @property
    def acts(self) -> tuple[Any, ...]:
        """Everything that its roll-outs depend on."""
        return (getattr(self.objective, "exploration", 0.0), self.denoised)

    @property
    def learns(self) -> tuple[Any, ...]:
        """Everything that its value network depends on."""
        assert isinstance(self.objective, o.PathObjective)
        return (*self.acts, self.objective.cost_weight, self.objective.value_sees_denoised)

    def values(self, sample: Sample) -> Float[Tensor, "paths nodes"] | None:
        """V at every node, as the estimator knows it."""
        rollout = sample.rollout
        if not (isinstance(self.objective, o.PathObjective) and self.objective.needs_value):
            return None
        if self.estimator.value == "network":
            assert self.trainer.critic is not None
            return self.trainer.critic.values_along(rollout, sample.denoised_rewards)
        if self.estimator.value == "none":
            zeros = torch.zeros_like(rollout.states[:, :-1, 0])
            return torch.cat([zeros, rollout.rewards[:, None]], dim=1)
        action_std = self.objective.action_std(self.sampler.sigma[:-1])
        with torch.no_grad():
            values = affine_values(
                self.problem,
                self.sampler,
                exact_correction(self.weights),
                action_std,
                self.objective.cost_weight,
            )
            states = rollout.states.double()
            by_step = [value(states[:, k]) for k, value in enumerate(values)]
        return torch.stack(by_step, dim=1).to(rollout.rewards)

    def gradients(self, sample: Sample) -> Float[Tensor, "batches parameters"]:
        """Ascent direction of every batch: minus the gradient of the loss."""
        rollout = dataclasses.replace(sample.rollout, group=self.objective.group)
        rollout = dataclasses.replace(rollout, values=self.values(sample))
        size, gradients = self.options.samples, []
        for batch in range(self.options.batches):
            part = rollout.chosen(torch.arange(batch * size, (batch + 1) * size))
            update_losses = self.trainer.losses(part)
            generator = torch.Generator().manual_seed(batch)
            for parameter in self.parameters:
                parameter.grad = None
            for loss in update_losses.losses(torch.arange(size // self.objective.group), generator):
                loss.backward()
            gradients.append(-flat([p.grad for p in self.parameters]))
        return torch.stack(gradients)


# -- numbers --------------------------------------------------------------------------------------


def summary(
    gradients: Float[Tensor, "batches parameters"], truth: Float[Tensor, " parameters"]
) -> dict[str, Any]:
    """Noise and direction; standard errors by leaving out one of 20 blocks of batches at a time."""
    blocks = gradients.tensor_split(20)

    def with_error(number: Callable[[Tensor], float]) -> tuple[float, float]:
        left_out = torch.tensor(
            [number(torch.cat([*blocks[:k], *blocks[k + 1 :]])) for k in range(len(blocks))]
        )
        jackknife = (left_out - left_out.mean()).square().sum() * (len(blocks) - 1) / len(blocks)
        return number(gradients), float(jackknife.sqrt())

    single = torch.nn.functional.cosine_similarity(gradients, truth[None], dim=1)
    quartiles = torch.quantile(single, torch.tensor([0.25, 0.5, 0.75]).to(single))
    return {
        "relative_variance": with_error(relative_variance),
        "cosine_of_mean": with_error(lambda g: cosine_of_mean(g, truth)),
        "cosine_of_one": quartiles.tolist(),
        "norm": float(gradients.mean(0).norm() / truth.norm()),
    }


def relative_variance(gradients: Float[Tensor, "batches parameters"]) -> float:
    """E|g - E g|^2 / |E g|^2; the noise of the mean is taken off the denominator."""
    noise = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - noise / len(gradients)
    return float(noise / signal) if signal > 0 else math.inf


def cosine_of_mean(
    gradients: Float[Tensor, "batches parameters"], truth: Float[Tensor, " parameters"]
) -> float:
    """Cosine of E g with the truth; the noise of the mean is taken off its length, as above."""
    middle = gradients.mean(0)
    length = middle.square().sum() - gradients.var(0).sum() / len(gradients)
    return float(middle @ truth / length.sqrt() / truth.norm()) if length > 0 else math.nan


def main(options: Options) -> None:
    """Measure what is missing, then write everything."""
    torch.set_num_threads(1)
    console, entries = Console(width=170), estimators()
    if unknown := set(options.estimators) - set(entries):
        raise SystemExit(f"unknown estimators {sorted(unknown)}; there are {', '.join(entries)}")
    if unknown := set(options.policies) - set(POLICIES):
        raise SystemExit(f"unknown policies {sorted(unknown)}; there are {', '.join(POLICIES)}")
    options.runs.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    stored = options.runs / "gaussian.jsonl"
    runs = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    rows = []
    for policy in options.policies:
        for steps in options.steps:
            samples: dict[Any, Sample] = {}
            critics: dict[Any, Any] = {}
            for name in options.estimators or entries:
                if entries[name].value == "network" and steps not in options.network_steps:
                    continue
                key = {"policy": policy, "steps": steps, "estimator": name}
                key |= {k: getattr(options, k) for k in ("batches", "samples", "value_updates")}
                key |= {"seed": options.seed}
                done = [r for r in runs if all(r[k] == v for k, v in key.items())]
                if not done:
                    done = [key | _measure(entries[name], policy, steps, options, samples, critics)]
                    runs += done
                    with stored.open("a") as file:
                        file.write(json.dumps(done[0]) + "\n")
                    console.print(f"{policy}  {steps}  {name}  {done[0]['seconds']:.1f} s")
                rows.append(done[0])
    _write(rows, options, console)


def _measure(
    estimator: Estimator,
    policy: str,
    steps: int,
    options: Options,
    samples: dict[Any, Sample],
    critics: dict[Any, Any],
) -> dict[str, Any]:
    """One row; estimators that act alike share roll-outs, and those that learn alike critics."""
    problem, began = GaussianProblem(), time.perf_counter()
    weights = half_way(problem)
    if policy == "pretrained":
        weights = [torch.zeros_like(w) for w in weights]
    measured = Measured(problem, estimator, steps, weights, options)
    if measured.acts not in samples:
        samples[measured.acts] = measured.sample()
    sample = samples[measured.acts]
    cost = measured.prepare(sample, critics)
    gradients = measured.gradients(sample)
    summarised = summary(gradients, exact_gradient(problem, measured.sampler, weights))
    relative = summarised["relative_variance"][0]
    chain = problem.optimum(measured.sampler).objective
    with torch.no_grad():
        there, start = (
            float(affine_objective(problem, measured.sampler, exact_correction(w)))
            for w in (weights, [torch.zeros_like(w) for w in weights])
        )
    return (
        summarised
        | cost
        | {
            "queries_to_1": relative * cost["queries"],
            "calls_to_1": relative * cost["calls"],
            "share_of_j": (there - start) / (chain - start),
            "seconds": time.perf_counter() - began,
        }
    )


# -- what is written ------------------------------------------------------------------------------


def _write(rows: Sequence[dict[str, Any]], options: Options, console: Console) -> None:
    with (options.output / "variance.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        plain = ("queries", "calls", "queries_to_1", "calls_to_1", "norm")
        header = ["policy", "estimator", "steps", "relative variance", "standard error"]
        header += ["cosine of mean", "standard error", "cosine of one (lower quartile)", "median"]
        header += ["upper quartile", "queries an update", "calls an update", "queries to 1"]
        header += ["calls to 1", "length of the mean over that of grad J"]
        writer.writerow(header)
        for row in rows:
            numbers = [*row["relative_variance"], *row["cosine_of_mean"], *row["cosine_of_one"]]
            numbers += [row[key] for key in plain]
            writer.writerow(
                [row["policy"], row["estimator"], row["steps"]] + [f"{n:.6g}" for n in numbers]
            )
    record = {
        "options": dataclasses.asdict(options) | {"output": "", "runs": ""},
        "versions": versions(),
        "rows": [{k: _plain(v) for k, v in row.items() if k != "seconds"} for row in rows],
    }
    path = options.output / "variance.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    for policy in options.policies:
        own = [r for r in rows if r["policy"] == policy]
        console.print(_by_steps(own, policy, options))
        console.print(_details(own, policy, options))
    _picture(rows, options)


def _plain(value: Any) -> Any:
    """For JSON, which knows no infinity."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resolved(value: float, error: float) -> str:
    """A number with its standard error; none where the batches do not resolve it."""
    return f"{value:.3g}({error:.1g})" if error < 0.5 * abs(value) else "not resolved"


def _by_steps(rows: Sequence[dict[str, Any]], policy: str, options: Options) -> Table:
    """Relative variance of an update against the number of steps."""
    shown = Table(box=None, header_style="dim", title=f"{policy}: relative variance")
    shown.add_column("estimator", no_wrap=True)
    for steps in options.steps:
        shown.add_column(f"{steps} steps", justify="right", no_wrap=True)
    for name in dict.fromkeys(r["estimator"] for r in rows):
        pairs = {r["steps"]: r["relative_variance"] for r in rows if r["estimator"] == name}
        shown.add_row(name, *(_resolved(*pairs[k]) if k in pairs else "" for k in options.steps))
    return shown


def _details(rows: Sequence[dict[str, Any]], policy: str, options: Options) -> Table:
    """Direction and cost, at the largest number of steps that all were measured at."""
    middle = max(set(options.steps) & set(options.network_steps), default=options.steps[-1])
    shown = Table(box=None, header_style="dim", title=f"{policy}, {middle} steps")
    shown.add_column("estimator", no_wrap=True)
    for name in ("relative variance", "cos of mean", "cos of one", "queries to 1", "calls to 1"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in (r for r in rows if r["steps"] == middle):
        low, median, high = row["cosine_of_one"]
        shown.add_row(
            row["estimator"],
            _resolved(*row["relative_variance"]),
            _resolved(*row["cosine_of_mean"]),
            f"{median:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['queries_to_1']:.3g}",
            f"{row['calls_to_1']:.3g}",
        )
    return shown


def _picture(rows: Sequence[dict[str, Any]], options: Options) -> None:
    """Relative variance, and the cosine of a single update, against the number of steps."""
    figure = Figure(figsize=(13, 4.8 * len(options.policies)), layout="constrained")
    grid = figure.subplots(len(options.policies), 2, squeeze=False)
    for policy, (left, right) in zip(options.policies, grid, strict=True):
        own = [r for r in rows if r["policy"] == policy]
        for k, name in enumerate(dict.fromkeys(r["estimator"] for r in own)):
            seen = [r for r in own if r["estimator"] == name]
            style = {"color": f"C{k % 10}", "linestyle": "-" if k < 10 else "--", "linewidth": 1.3}
            steps = [r["steps"] for r in seen]
            style["marker"] = "."
            left.plot(steps, [r["relative_variance"][0] for r in seen], **style)
            right.plot(steps, [r["cosine_of_one"][1] for r in seen], label=name, **style)
        left.set(xscale="log", yscale="log", xlabel="steps", title=policy)
        left.set_ylabel("relative variance of one update")
        right.set(xscale="log", xlabel="steps", title=policy)
        right.set_ylabel("cosine of one update with grad J, median")
        for axes in (left, right):
            axes.set_xticks(list(options.steps), [str(k) for k in options.steps])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(options.output / "variance.png", dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
