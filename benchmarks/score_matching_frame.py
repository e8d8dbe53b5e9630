"""Each method as an estimator of a value's gradient: which value, with which weights, how noisy.

In the frame of reward score matching [R] a loss is, up to what its gradient does not see,
    E[C1(t) |score_th - (score_pre + gamma(t) Psi)|^2 + C2(t) |score_th - score_old|^2] / 2,
so that minus its gradient with respect to the score at a state x of time t has the mean
    w(t) grad V(t, x) - c(t) (score_th - score_pre)             given x, where th = old,
w = C1 gamma and c = C1. Both are measured on the Gaussian problem at the pretrained model, where
grad V is known exactly: autograd through the code that runs use gives minus the gradient for every
row of a roll-out; c is by how much it changes, on the same rows, when score_th - score_pre is
shifted: by the pretrained score, or by the policy's where data are the pretrained model's. C2 is
not seen.

    value     which fits best: E[r] given x under the policy (a policy gradient's, a step of the
              way), or V*, the optimum's (a regression on it has the optimum for its fixed point)
    cosine    of the mean with grad V, over rows; noise is taken out by halves of the rows
    weight    share of sum_t w(t) in the noisiest, the middle and the last third of times
    pull      c / (kl_weight w), summed over times: 1 where the fixed point is
              score_pre + grad V / kl_weight, 0 where nothing keeps the policy near
    rows      E|gradient - mean|^2 / E|mean|^2: rows of one time that make noise and mean alike

Rows are steps of paths, or re-noised states for what learns from data; critics are exact.

    python -m benchmarks.score_matching_frame --output docs

Sources  [R] Reward score matching 2026, arXiv 2604.17415.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float, Int64
from torch import Tensor

from benchmarks.compared_methods import methods
from benchmarks.exact_laws import affine_values
from ctrl.noise import stream
from diffusion_envs.exact import AffineCorrection, GaussianProblem, table
from diffusion_envs.exact.gaussian import Quadratic, score_coefficients
from diffusion_envs.objectives import NoisedObjective, Objective
from diffusion_envs.objectives.protocol import Update
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.samplers import DDIM, BoundDDIM

PROBLEM = GaussianProblem()
FINE = 999  # steps, that noised states are compared on: every timestep but the first
SHIFT = 0.03  # of every coordinate of score_th - score_pre, by which the pull is measured


@dataclass(frozen=True)
class Options:
    """Measure where each method's gradient points, and how noisy it is.

    Attributes:
        methods: some of ``compared_methods.methods``; all, if none is given.
        samples: paths, or data, of a roll-out.
        steps: of the sampler; of data, 5 times as many.
        output: folder of score_matching_frame.json; nothing is stored, if none is given.
    """

    methods: tuple[str, ...] = ()
    samples: int = 3840
    steps: int = 20
    output: Path | None = None


def slopes(sampler: BoundDDIM) -> dict[str, tuple[Tensor, Tensor]]:
    """grad V as (matrices, shifts) of the state, a step each, in continuous time's units.

    It is grad V_{k+1} at the next state's mean times score_gain / path_kl_gain: what the best
    change of the score is kl_weight times, where V is the optimum's.
    """
    b = sampler.score_gain
    slope, offset = score_coefficients(PROBLEM.data, sampler.table, sampler.noising_times[:-1])
    unit = torch.eye(2, dtype=torch.float64)
    matrix = sampler.state_gain[:, None, None] * unit + b[:, None, None] * slope
    values: Sequence[Quadratic] = affine_values(PROBLEM, sampler, AffineCorrection(2).double())[1:]
    factor = (b / sampler.path_kl_gain)[:, None]
    bent = factor[:, None] * torch.stack([v.curvature for v in values])
    shift = factor * torch.stack([v.slope for v in values])
    own = -bent @ matrix, shift - torch.einsum("kij,kj->ki", bent, b[:, None] * offset)
    gain, best = PROBLEM.best_correction(sampler)
    return {"E[r]": own, "V*": (PROBLEM.kl_weight * gain, PROBLEM.kl_weight * best)}


@dataclass(frozen=True, eq=False)
class Gradients:
    """Minus the gradient of a path's loss with respect to the score, in rows."""

    state: Float[Tensor, "rows 2"]
    alpha: Float[Tensor, " rows"]
    gradient: Float[Tensor, "rows 2"]
    shifted: Float[Tensor, "rows 2"]  # the same with score_th - score_pre larger by ``SHIFT``


def gradients(objective: Objective, sampler: BoundDDIM, samples: int) -> Gradients:
    """Of a roll-out of the pretrained model, which is a fresh adapter's policy too."""
    environment = PROBLEM.environment(sampler, 0)
    model: Any = environment.model
    correction = model.correction
    rollout = environment.sample(
        objective.policy,
        range(samples),
        torch.zeros(samples, dtype=torch.int64),
        stream="frame",
        group=objective.group,
        shared_start=objective.shared_start,
    ).rollout
    exact = affine_values(PROBLEM, sampler, AffineCorrection(2).double())
    curvature, slope, constant = (
        torch.stack([getattr(v, name) for v in exact]).detach().float()
        for name in ("curvature", "slope", "constant")
    )

    def values(
        node: Int64[Tensor, " rows"], states: Float[Tensor, "rows 2"], path: Int64[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        bent = torch.einsum("ni,nij,nj->n", states, curvature[node], states)
        return (slope[node] * states).sum(1) - 0.5 * bent + constant[node]

    nodes = torch.arange(sampler.steps + 1).repeat(samples)
    known = values(nodes, rollout.states.flatten(0, 1), nodes).view(samples, -1)
    rollout = dataclasses.replace(rollout, values=known, preferences=rollout.rewards)
    seen, found = list[tuple[Tensor, Tensor, Tensor]](), list[tuple[Tensor, ...]]()

    def look(module: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        if output.requires_grad:  # not where old or pretrained scores are asked for
            output.retain_grad()
            seen.append((*inputs, output))

    handle, pretrained = correction.register_forward_hook(look), model.exact
    for shift in (0.0, SHIFT):
        with torch.no_grad():
            correction.shift[0] = shift
        below = shift if objective.on_policy else 0.0  # the policy stays, or the pretrained model
        model.exact = lambda *inputs, below=below: pretrained(*inputs) - below
        assert rollout.reference_scores is not None
        used = dataclasses.replace(rollout, reference_scores=rollout.reference_scores - below)
        losses = objective.losses_of(
            Update(
                environment=environment,
                rollout=used,
                advantages=lambda function: function(rollout),
                values=values,
                usual_moves=None,
                stream=lambda *name: stream(0, *name),
                own_stream=lambda *name: stream(0, *name),
                old_policy=None,
                batch=1_000_000,
            )
        )
        seen.clear()
        for loss in losses.losses(torch.arange(samples // rollout.group), stream(0, "losses")):
            loss.backward()
        asked = [(x.detach(), alpha, out.grad) for x, alpha, out in seen if out.grad is not None]
        found.append(tuple(torch.cat(column).double() for column in zip(*asked, strict=True)))
    handle.remove()
    (state, alpha, gradient), (_, _, shifted) = found
    return Gradients(state, alpha, -samples * gradient, -samples * shifted)


def fit(
    gradient: Float[Tensor, "n 2"], slope: Float[Tensor, "n 2"], state: Float[Tensor, "n 2"]
) -> Float[Tensor, " 4"]:
    """Of one time: w, and per row the mean along the slope, the squares of mean and noise."""
    basis = torch.cat([torch.ones_like(state[:, :1]), state], dim=1)
    first, second = (
        basis @ torch.linalg.lstsq(basis[half], gradient[half]).solution
        for half in torch.arange(len(state)).chunk(2)
    )
    mean, size = 0.5 * (first + second), slope.square().sum(1).mean().sqrt()
    along = (mean * slope).sum(1).mean() / size
    power = (first * second).sum(1).mean().clamp(min=0)  # halves share no noise
    noise = (gradient - mean).square().sum(1).mean()
    return torch.stack([along / size, along, power, noise])


def summary(rows: Gradients, sampler: BoundDDIM, bins: int) -> dict[str, Any]:
    """What the module's docstring lists, of one method; times in so many bins."""
    levels = sampler.alpha[:-1]
    time = torch.searchsorted(0.5 * (levels[1:] + levels[:-1]), rows.alpha)
    part = time * bins // len(levels)
    count = part.bincount(minlength=bins)
    inside = [part == k for k in range(bins) if int(count[k]) > 8]
    count = count[count > 8].double()
    fits = dict[str, Tensor]()
    for name, (matrix, shift) in slopes(sampler).items():
        slope = torch.einsum("nij,nj->ni", matrix[time], rows.state) + shift[time]
        one = [fit(rows.gradient[k], slope[k], rows.state[k]) for k in inside]
        fits[name] = count * torch.stack(one, dim=1)
    cosines = {n: float(f[1].sum() / (count * f[2]).sqrt().sum()) for n, f in fits.items()}
    best = max(cosines, key=lambda name: cosines[name])
    w, _, power, noise = fits[best]
    change = (rows.gradient - rows.shifted).sum(1) / (2 * SHIFT)
    return {
        "value": best,
        "cosine": cosines[best],
        "other": min(cosines.values()),
        "weight": [float(x.sum() / w.sum()) for x in w.tensor_split(3)],
        "pull": float(change.sum() / w.sum() / PROBLEM.kl_weight),
        "rows": float(noise.sum() / power.sum()),
    }


def measured(objective: Objective, options: Options) -> dict[str, Any]:
    """One method's row."""
    data = isinstance(objective, NoisedObjective)
    steps = 5 * options.steps if data else options.steps
    rows = gradients(objective, DDIM(1.0).bind(table(), steps), options.samples)
    fine, bins = (FINE, 50) if data else (steps, steps)
    with torch.no_grad():
        return summary(rows, DDIM(1.0).bind(table(), fine), bins)


def main(options: Options) -> None:
    """Measure and print each row, and store all where that is asked for."""
    rows: dict[str, Any] = {}
    for name, entry in methods().items():
        if options.methods and name not in options.methods:
            continue
        objective = entry.objective(PROBLEM.kl_weight)
        order = "first" if objective.needs_reward_gradient else "zeroth"
        rows[name] = {"order": order} | measured(objective, options)
        print(name, json.dumps(rows[name]), flush=True)
    if options.output is not None:
        record = {
            "options": dataclasses.asdict(options) | {"output": ""},
            "versions": versions(),
            "rows": rows,
        }
        file = options.output / "score_matching_frame.json"
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
