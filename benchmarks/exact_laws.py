"""What a score generates with any sampler, exactly, on the problems of ``diffusion_envs.exact``.

Gaussian problem   The score is affine, so a step of DDIM is affine with Gaussian noise, and a
                   deterministic solver of diffusers an affine map of its start, whose matrix and
                   shift are read off by running it on 0 and on unit vectors: the law is Gaussian.
Mixture            DDIM with noise carries the law over the problem's grid; a deterministic solver
                   pushes a fine grid of starts, whose weights are normal and whose density changes
                   by the map's derivative.
Target             The law proportional to data exp(reward / kl_weight). For any law p,
                       kl_weight KL(p || target) = max F - F(p),  F(p) = E_p[reward] - kl_weight
                       KL(p || data),
                   so the KL is the regret of a law, whatever sampler it came from.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffusion_envs.exact import (
    AffineCorrection,
    CorrectedScore,
    GaussianProblem,
    MixtureProblem,
    gaussian,
    log_normaliser,
)
from diffusion_envs.exact.gaussian import Affine, Gaussian, Quadratic
from diffusion_envs.exact.linear_policy import Steps, kl_cost
from diffusion_envs.exact.problems import gaussian_kl
from diffusion_envs.models.exact import legendre
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.samplers import BoundBlackBox, BoundDDIM


@dataclass(frozen=True)
class ExactOutcome:
    """Reward and divergences of the law that a score generates with a sampler.

    Attributes:
        reward: expected.
        kl_to_target: of the generated law from data exp(reward / kl_weight), nats; NaN where the
            solver's map of the start folds, and has no density in closed form.
        path_kl: from the pretrained model, nats; None without noise in every step.
        kl_to_chain: of the generated law from that of the chain's own optimum, nats; None as above.
    """

    reward: float
    kl_to_target: float
    path_kl: float | None = None
    kl_to_chain: float | None = None


def in_float64(score: CorrectedScore) -> CorrectedScore:
    """The same score, with a correction that answers in the precision of its states."""
    correction = copy.deepcopy(score.correction).double()
    return dataclasses.replace(score, correction=correction)


def evaluate(
    problem: GaussianProblem | MixtureProblem,
    score: CorrectedScore,
    sampler: BoundDDIM | BoundBlackBox,
) -> ExactOutcome:
    """Evaluate the generated law of a score exactly; no random number enters."""
    score = in_float64(score)
    with torch.no_grad():
        if isinstance(problem, GaussianProblem):
            return _evaluate_gaussian(problem, score, sampler)
        return _evaluate_mixture(problem, score, sampler)


# -- Gaussian problem -----------------------------------------------------------------------------


def affine_map(
    function: Callable[[Tensor], Tensor], dim: int, rounding: float
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, " dim"]]:
    """Matrix and shift of an affine function of rows, from its values at 0 and the unit vectors.

    Args:
        function: of [n, dim].
        dim: of its argument.
        rounding: largest error allowed at a third point, relative to the values.

    Raises:
        ValueError: the function is not affine.
    """
    probe = torch.linspace(-1.7, 1.3, dim, dtype=torch.float64)
    points = torch.cat([torch.zeros(1, dim).to(probe), torch.eye(dim).to(probe), probe[None]])
    values = function(points).double()
    shift = values[0]
    matrix = (values[1:-1] - shift).T
    error = (matrix @ probe + shift - values[-1]).abs().max()
    if not error <= rounding * values.abs().max():
        raise ValueError(f"function must be affine; at a third point it is off by {error:.2g}")
    return matrix, shift


def generated(score: CorrectedScore, sampler: BoundDDIM | BoundBlackBox, dim: int) -> Gaussian:
    """Law of what an affine score generates from N(0, I); a black box computes in float32."""
    law = Gaussian(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    if isinstance(sampler, BoundBlackBox):
        matrix, shift = affine_map(lambda x: run_black_box(score, sampler, x), dim, 1e-5)
        return Affine(matrix, shift, 0 * matrix).after(law)
    for k in range(sampler.steps):
        law = affine_step(score, sampler, k, dim).after(law)
    return law


def run_black_box(score: CorrectedScore, sampler: BoundBlackBox, start: Tensor) -> Tensor:
    """Run the scheduler from these starts."""
    return sampler.sample(lambda x, t: score.prediction(x, t.expand(len(x))), start)


def affine_step(score: CorrectedScore, sampler: BoundDDIM, k: int, dim: int) -> Affine:
    """Step k of DDIM under an affine score."""
    matrix, shift = affine_map(lambda x: ddim_mean(score, sampler, k, x), dim, 1e-9)
    return Affine(matrix, shift, sampler.std[k].square() * torch.eye(dim).to(matrix))


def ddim_mean(score: CorrectedScore, sampler: BoundDDIM, k: int, states: Tensor) -> Tensor:
    """Mean of the next state after step k."""
    which = torch.full((len(states),), k)
    return sampler.mean(which, states, score(states, sampler.timesteps[which]))


def target_of(problem: GaussianProblem) -> Gaussian:
    """Data exp(reward / kl_weight), normalised."""
    return gaussian.tilt(problem.data, problem.quadratic, problem.kl_weight)


def _evaluate_gaussian(
    problem: GaussianProblem, score: CorrectedScore, sampler: BoundDDIM | BoundBlackBox
) -> ExactOutcome:
    dim = len(problem.mean)
    law = generated(score, sampler, dim)
    reward = float(problem.quadratic.expectation(law))
    to_target = gaussian_kl(law, target_of(problem))
    if not (isinstance(sampler, BoundDDIM) and sampler.eta > 0):
        return ExactOutcome(reward, to_target)
    steps, paid, law = Steps.of(sampler), 0.0, _standard(problem)
    for k in range(sampler.steps):
        alpha = sampler.alpha[k]
        gain, shift = affine_map(
            lambda x, a=alpha: score.correction(x, a.expand(len(x))), dim, 1e-9
        )
        cost = kl_cost(steps.cost[k : k + 1], gain, shift)
        paid -= float(
            Quadratic(cost.curvature[0], cost.slope[0], cost.constant[0]).expectation(law)
        )
        law = affine_step(score, sampler, k, dim).after(law)
    return ExactOutcome(reward, to_target, paid, gaussian_kl(law, _best_gaussian(problem, sampler)))


@functools.cache
def _best_gaussian(problem: GaussianProblem, sampler: BoundDDIM) -> Gaussian:
    """Law that the chain's own optimum generates."""
    return generated(table_of_optimum(problem, sampler), sampler, len(problem.mean))


# -- scalar mixture -------------------------------------------------------------------------------


def log_target(problem: MixtureProblem, x: Tensor) -> Tensor:
    """Log density of data exp(reward / kl_weight), normalised."""
    normaliser = log_normaliser(problem) / problem.kl_weight
    reward = problem.reward(x[:, None], ["-"] * len(x))
    return _log_data(problem, x) + reward / problem.kl_weight - normaliser


def _log_data(problem: MixtureProblem, x: Tensor) -> Tensor:
    weights, means, stds = (
        torch.tensor(v).to(x) for v in (problem.weights, problem.means, problem.stds)
    )
    gap = (x[:, None] - means) / stds
    return torch.logsumexp((weights / stds / math.sqrt(2 * math.pi)).log() - 0.5 * gap**2, 1)


def _evaluate_mixture(
    problem: MixtureProblem, score: CorrectedScore, sampler: BoundDDIM | BoundBlackBox
) -> ExactOutcome:
    if isinstance(sampler, BoundDDIM) and sampler.eta > 0:
        states = problem.grid[:, None]
        changes = torch.stack(
            [
                score.correction(states, sampler.alpha[k].expand(len(states)))[:, 0]
                for k in range(sampler.steps)
            ]
        )
        law, paid = problem.law_of(changes, sampler)
        best = _best_mixture(problem, sampler)
        tiny = 1e-300
        log_density = (law.clamp(min=tiny) / (problem.grid[1] - problem.grid[0])).log()
        return ExactOutcome(
            reward=float(law @ problem.rewards),
            kl_to_target=float(law @ (log_density - log_target(problem, problem.grid))),
            path_kl=paid,
            kl_to_chain=float(law @ (law.clamp(min=tiny) / best.clamp(min=tiny)).log()),
        )
    return _evaluate_deterministic(problem, score, sampler)


@functools.cache
def _best_mixture(problem: MixtureProblem, sampler: BoundDDIM) -> Tensor:
    """Law on the grid that the chain's own optimum generates."""
    return problem.law_of(problem.best_correction(sampler), sampler)[0]


def _evaluate_deterministic(
    problem: MixtureProblem, score: CorrectedScore, sampler: BoundDDIM | BoundBlackBox
) -> ExactOutcome:
    start = torch.linspace(-5.5, 5.5, 2201, dtype=torch.float64)
    states = start[:, None]
    if isinstance(sampler, BoundBlackBox):
        end = run_black_box(score, sampler, states)[:, 0]
    else:
        for k in range(sampler.steps):
            states = ddim_mean(score, sampler, k, states)
        end = states[:, 0]
    return _pushed(problem, start, end)


def _pushed(problem: MixtureProblem, start: Tensor, end: Tensor) -> ExactOutcome:
    """A standard normal start, mapped to ``end``: trapezoidal sums, central differences."""
    log_start = -0.5 * start.square() - 0.5 * math.log(2 * math.pi)
    weight = log_start.exp() * (start[1] - start[0])
    reward = float(weight @ problem.reward(end[:, None], ["-"] * len(end)))
    (slope,) = torch.gradient(end, spacing=(start,), edge_order=2)
    inside = start.abs() < 4.5  # further out lie 7e-6 of the starts, where the map may fold
    if not bool((slope[inside] > 0).all()):
        return ExactOutcome(reward, math.nan)
    log_density = log_start - slope.clamp(min=1e-12).log()
    gap = (log_density - log_target(problem, end)) * weight
    return ExactOutcome(reward, float(gap[inside].sum()))


# -- policies that are known, not trained ---------------------------------------------------------


class NoCorrection(nn.Module):
    """The pretrained model."""

    def forward(self, states: Tensor, alpha: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(states)


class Correction(nn.Module):
    """A correction that is a function of states [n, dim] and signals [n]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, states: Tensor, alpha: Tensor) -> Tensor:
        """Its value."""
        return self.function(states, alpha)


def pretrained_score(problem: GaussianProblem | MixtureProblem, table: DDPMTable) -> CorrectedScore:
    """The exact score of the noised data."""
    sampler = BoundDDIM(1.0, table, 2)
    environment = problem.environment(sampler, 0)
    score = environment.model
    assert isinstance(score, CorrectedScore)
    return dataclasses.replace(score, correction=NoCorrection())


def optimal_score(problem: GaussianProblem | MixtureProblem, table: DDPMTable) -> CorrectedScore:
    """The optimum in continuous time: the exact score of the noised target."""
    score = pretrained_score(problem, table)
    if isinstance(problem, GaussianProblem):
        function = _gaussian_change(problem)
    else:
        function = _mixture_change(problem)
    return dataclasses.replace(score, correction=Correction(function))


def _gaussian_change(problem: GaussianProblem) -> Callable[[Tensor, Tensor], Tensor]:
    def change(states: Tensor, alpha: Tensor) -> Tensor:
        gain, shift = change_coefficients(problem, alpha)
        return torch.einsum("nij,nj->ni", gain, states.double()) + shift

    return change


def change_coefficients(
    problem: GaussianProblem, alpha: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n dim dim"], Float[Tensor, "n dim"]]:
    """(D, c) of the optimal score less the pretrained one, D x + c, at these signals."""
    alpha = alpha.double()[:, None]
    coefficients = []
    for law in (target_of(problem), problem.data):
        values, vectors = law.spectrum
        precision = 1 / (alpha.square() * values + 1 - alpha.square())
        inverse = (vectors * precision[:, None, :]) @ vectors.mT
        coefficients.append((-inverse, alpha * torch.einsum("nij,j->ni", inverse, law.mean)))
    (gain, shift), (gain_before, shift_before) = coefficients
    return gain - gain_before, shift - shift_before


def _mixture_change(problem: MixtureProblem) -> Callable[[Tensor, Tensor], Tensor]:
    """alpha / sigma^2 (E[x0 | x] under the target less that under the data), by Gauss-Hermite.

    Given the noised state the data is again a mixture of normals, one for each component.
    """
    nodes, masses = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(48))

    def change(states: Tensor, alpha: Tensor) -> Tensor:
        x, a = states.double(), alpha.double()[:, None]
        weights, means, stds = (
            torch.tensor(v).to(x) for v in (problem.weights, problem.means, problem.stds)
        )
        noise = 1 - a.square()
        variance = a.square() * stds.square() + noise
        gap = x - a * means
        share = weights.log() - 0.5 * variance.log() - 0.5 * gap.square() / variance
        middle = means + a * stds.square() * gap / variance
        width = (stds.square() * noise / variance).sqrt()
        data = middle[..., None] + width[..., None] * nodes  # [n, components, nodes]
        log_mass = share[..., None] + masses.log().to(x)
        reward = problem.reward(data.reshape(-1, 1), ["-"] * data.numel()).view(data.shape)
        guesses = []
        for logs in (log_mass + reward / problem.kl_weight, log_mass):
            chance = torch.softmax(logs.flatten(1), 1)
            guesses.append((chance * data.flatten(1)).sum(1, keepdim=True))
        return a / noise * (guesses[0] - guesses[1])

    return change


Elsewhere: TypeAlias = Literal["nearest", "linear", "zero"]


class TableCorrection(nn.Module):
    """D_k x + c_k, one for each step of a chain: no other noise level has an entry of its own.

    Args:
        sampler: the chain.
        dim: of the state.
        elsewhere: at noise levels that are not the chain's: the "nearest" entry, "linear" between
            the two neighbours (in the signal; beyond the ends the nearest), or "zero".
    """

    known: Tensor

    def __init__(self, sampler: BoundDDIM, dim: int, *, elsewhere: Elsewhere = "nearest") -> None:
        super().__init__()
        self.elsewhere: Elsewhere = elsewhere
        self.register_buffer("known", sampler.alpha[:-1].clone(), persistent=False)
        self.gain = nn.Parameter(torch.zeros(sampler.steps, dim, dim))
        self.shift = nn.Parameter(torch.zeros(sampler.steps, dim))

    def entries(self, alpha: Float[Tensor, " n"]) -> Float[Tensor, "n steps"]:
        """How much of each entry is read at these signals."""
        gap = (alpha.double()[:, None] - self.known.double()).abs()
        nearest = functional.one_hot(gap.argmin(1), gap.shape[1]).double()
        match self.elsewhere:
            case "nearest":
                return nearest
            case "zero":  # neighbours in the table differ by more than 1e-6
                return nearest * (gap.amin(1, keepdim=True) < 5e-7)
            case "linear":
                known = self.known.double()
                right = torch.searchsorted(known, alpha.double().contiguous()).clamp(
                    1, len(known) - 1
                )
                share = (alpha.double() - known[right - 1]) / (known[right] - known[right - 1])
                share = share.clamp(0, 1)[:, None]
                one, other = (functional.one_hot(k, len(known)) for k in (right - 1, right))
                return (1 - share) * one + share * other

    def forward(
        self, states: Float[Tensor, "n dim"], alpha: Float[Tensor, " n"]
    ) -> Float[Tensor, "n dim"]:
        """The correction at every state."""
        entries = self.entries(alpha).to(self.gain)
        gain = torch.einsum("nk,kij->nij", entries, self.gain)
        return torch.einsum("nij,nj->ni", gain, states.to(gain)) + entries @ self.shift


def table_of_optimum(
    problem: GaussianProblem, sampler: BoundDDIM, *, elsewhere: Elsewhere = "nearest"
) -> CorrectedScore:
    """The optimum of a chain, one correction for each of its steps, as a table.

    Args:
        problem: that it belongs to.
        sampler: the chain.
        elsewhere: at noise levels that are not the chain's, as in ``TableCorrection``.
    """
    gains, shifts = problem.best_correction(sampler)
    correction = TableCorrection(sampler, len(problem.mean), elsewhere=elsewhere).double()
    with torch.no_grad():
        correction.gain.copy_(gains)
        correction.shift.copy_(shifts)
    score = pretrained_score(problem, sampler.table)
    return dataclasses.replace(score, correction=correction)


# -- affine policies, differentiably --------------------------------------------------------------


def affine_objective(
    problem: GaussianProblem, sampler: BoundDDIM, correction: AffineCorrection
) -> Float[Tensor, ""]:
    """J of the chain, differentiable in the correction's parameters (float64)."""
    return affine_values(problem, sampler, correction)[0].expectation(_standard(problem))


def affine_values(
    problem: GaussianProblem,
    sampler: BoundDDIM,
    correction: AffineCorrection,
    action_std: Float[Tensor, " steps"] | None = None,
    kl_weight: float | None = None,
) -> list[Quadratic]:
    """V at every node of the chain: E[reward - kl_weight path KL to go], quadratic in the state.

    Args:
        problem: whose reward it is.
        sampler: DDIM with eta > 0.
        correction: the policy.
        action_std: standard deviation of the score at every step, if it is drawn around its mean.
        kl_weight: charged along the path; the problem's, if not given.
    """
    weight = problem.kl_weight if kl_weight is None else kl_weight
    steps, dim = Steps.of(sampler), len(problem.mean)
    gain, shift = correction.coefficients(legendre(sampler.alpha[:-1], len(correction.shift)))
    slope, offset = gaussian.score_coefficients(
        problem.data, sampler.table, sampler.noising_times[:-1]
    )
    unit, values = torch.eye(dim, dtype=torch.float64), [problem.quadratic]
    for k in reversed(range(sampler.steps)):
        b, variance = steps.score_gain[k], steps.std[k].square()
        if action_std is not None:
            variance = variance + (b * action_std[k]).square()
        step = Affine(
            steps.state_gain[k] * unit + b * (slope[k] + gain[k]),
            b * (offset[k] + shift[k]),
            variance * unit,
        )
        cost = kl_cost(weight * steps.cost[k : k + 1], gain[k], shift[k])
        paid = Quadratic(cost.curvature[0], cost.slope[0], cost.constant[0])
        values.append(values[-1].before(step) + paid)
    return values[::-1]


def _standard(problem: GaussianProblem) -> Gaussian:
    dim = len(problem.mean)
    return Gaussian(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
