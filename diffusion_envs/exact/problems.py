"""Fine-tuning problems whose optimum is known: what a method reaches is computed exactly.

Data of a known law, its exact noised score (on a rectified flow its exact expected data) as the
pretrained model, a reward of the generated vector, and reward per nat of path KL. For any policy
``evaluate`` gives, without a random number,
    J = E[reward] - kl_weight * path KL
of the sampler's own chain, and the KL of what it generates from what the optimum of that chain
generates. The optimum itself comes from dynamic programming on the chain: in closed form for
Gaussian data and quadratic rewards, on a fine grid for scalar mixtures.
"""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.exact import gaussian
from diffusion_envs.exact.gaussian import Affine, Gaussian, Quadratic
from diffusion_envs.exact.linear_policy import Steps, kl_cost
from diffusion_envs.exact.rewards import CosineReward, QuadraticReward
from diffusion_envs.models.exact import (
    AffineCorrection,
    Corrected,
    CorrectedDenoiser,
    CorrectedScore,
    NeuralCorrection,
    legendre,
)
from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.samplers import BoundBlackBox, BoundDDIM, GaussianSteps

BoundSampler: TypeAlias = GaussianSteps | BoundBlackBox


def table(steps: int = 1000, least: float = 0.1, most: float = 20.0) -> DDPMTable:
    """The usual variance-preserving table: beta from 0.1 to 20 over noising time 1."""
    s = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return DDPMTable(torch.exp(-(least * s + 0.5 * (most - least) * s.square())))


@dataclass(frozen=True)
class Outcome:
    """What a policy reaches on a sampler's chain, exactly.

    Attributes:
        reward: expected.
        path_kl: from the pretrained model, nats.
        objective: reward - kl_weight path_kl.
        kl_to_optimum: of the generated law from that of the chain's optimum, nats.
    """

    reward: float
    path_kl: float
    objective: float
    kl_to_optimum: float


@runtime_checkable
class Problem(Protocol):
    """Data, reward and kl_weight, with the answer."""

    kl_weight: float

    def environment(
        self, sampler: BoundSampler, seed: int, device: torch.device | str = "cpu"
    ) -> Environment:
        """A fresh model to fine-tune."""
        ...

    def evaluate(self, score: CorrectedScore, sampler: BoundDDIM) -> Outcome:
        """How good the score's policy is, exactly."""
        ...

    def optimum(self, sampler: BoundDDIM) -> Outcome:
        """The best that any policy reaches on this sampler's chain."""
        ...


def _table_of(sampler: BoundSampler) -> DDPMTable | FlowTable:
    return sampler.schedule if isinstance(sampler, GaussianSteps) else sampler.table


def _environment(
    model: Corrected,
    reward: QuadraticReward | CosineReward,
    sampler: BoundSampler,
    seed: int,
) -> Environment:
    return Environment(
        model=model,
        sampler=sampler,
        reward=reward,
        prompts=["-"],
        seed=seed,
        score_images=lambda reward, states, prompts: reward(states, prompts).detach(),
    )


# -- Gaussian data, quadratic reward -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GaussianProblem:
    """Data N(m, S) in two dimensions, quadratic reward; the optimal score is affine.

    The defaults are asymmetric on purpose; curvature 0 is the linear reward.
    """

    mean: tuple[float, ...] = (0.4, -0.3)
    covariance: tuple[tuple[float, float], ...] = ((0.7, 0.2), (0.2, 0.35))
    curvature: tuple[tuple[float, float], ...] = ((0.5, 0.1), (0.1, 0.3))
    slope: tuple[float, ...] = (0.6, 0.9)
    kl_weight: float = 0.5

    @cached_property
    def data(self) -> Gaussian:
        """The law of the data."""
        return Gaussian(_double(self.mean), _double(self.covariance))

    @cached_property
    def quadratic(self) -> Quadratic:
        """The reward."""
        return Quadratic(_double(self.curvature), _double(self.slope), _double(0.0))

    def environment(
        self, sampler: BoundSampler, seed: int, device: torch.device | str = "cpu"
    ) -> Environment:
        """The exact model with an affine correction of the score, on a flow of x0_hat."""
        correction = AffineCorrection(len(self.mean)).to(device)
        data = self.data
        mean = data.mean.to(device)
        values, vectors = (v.float().to(device) for v in data.spectrum)

        def exact(states: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            variance = alpha.square()[:, None] * values + sigma.square()[:, None]
            gap = (states - alpha[:, None] * mean.to(states)) @ vectors.to(states)
            return -(gap / variance) @ vectors.to(states).T

        def denoised(states: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            gained = (alpha[:, None] * values) * (exact(states, alpha, sigma) @ vectors.to(states))
            return mean.to(states) - gained @ vectors.to(states).T

        table, where = _table_of(sampler), torch.device(device)
        if isinstance(table, FlowTable):
            model = CorrectedDenoiser(denoised, correction, table, len(self.mean), where)
        else:
            model = CorrectedScore(exact, correction, table, len(self.mean), where)
        reward = QuadraticReward(self.quadratic)
        return _environment(model, reward, sampler, seed)

    def evaluate(self, score: Corrected, sampler: GaussianSteps) -> Outcome:
        """By recursions of means and covariances."""
        assert isinstance(score.correction, AffineCorrection)
        with torch.no_grad():
            basis = legendre(sampler.alpha[:-1], len(score.correction.shift))
            gain, shift = score.correction.coefficients(basis)
        return self.outcome_of(gain, shift, sampler)

    def optimum(self, sampler: GaussianSteps) -> Outcome:
        """By dynamic programming: the best correction at every step is affine."""
        return self.outcome_of(*self.best_correction(sampler), sampler)

    def outcome_of(
        self,
        gain: Float[Tensor, "steps dim dim"],
        shift: Float[Tensor, "steps dim"],
        sampler: GaussianSteps,
    ) -> Outcome:
        """Outcome of the pretrained action plus gain x + shift at every step; float64."""
        steps = Steps.of(sampler)
        law, paid = self._start(), 0.0
        pretrained = self._pretrained(sampler)
        for k in range(len(steps.std)):
            paid -= float(_paid(steps.cost[k], gain[k], shift[k]).expectation(law))
            law = _controlled_step(pretrained, steps, k, gain[k], shift[k]).after(law)
        reward = float(self.quadratic.expectation(law))
        objective = reward - self.kl_weight * paid
        return Outcome(reward, paid, objective, gaussian_kl(law, self.best_law(sampler)))

    def _start(self) -> Gaussian:
        dim = len(self.mean)
        return Gaussian(_double([0.0] * dim), torch.eye(dim, dtype=torch.float64))

    def _pretrained(self, sampler: GaussianSteps) -> tuple[Tensor, Tensor]:
        """(matrices, shifts) of the pretrained model's action at the left of every step."""
        coefficients = (
            gaussian.score_coefficients
            if sampler.action == "score"
            else gaussian.denoised_coefficients
        )
        return coefficients(self.data, sampler.schedule, sampler.noising_times[:-1])

    def best_correction(
        self, sampler: GaussianSteps
    ) -> tuple[Float[Tensor, "steps dim dim"], Float[Tensor, "steps dim"]]:
        """(gain, shift) of the chain's optimum: the action changes by u = gain x + shift.

        u maximises V_{k+1} after the step with action + u, less kl_weight cost |u|^2 / 2.
        """
        steps, pretrained = Steps.of(sampler), self._pretrained(sampler)
        unit = torch.eye(len(self.mean), dtype=torch.float64)
        value, gains, shifts = self.quadratic, [], []
        for k in reversed(range(len(steps.std))):
            free = _controlled_step(pretrained, steps, k, 0 * unit, 0 * unit[0])
            b, price = steps.score_gain[k], self.kl_weight * steps.cost[k]
            # gradient in u: b (slope - Q (mean + b u)) - price u = 0
            hessian = price * unit + b**2 * value.curvature
            gain = -b * torch.linalg.solve(hessian, value.curvature @ free.matrix)
            shift = b * torch.linalg.solve(hessian, value.slope - value.curvature @ free.shift)
            gains.append(gain)
            shifts.append(shift)
            step = _controlled_step(pretrained, steps, k, gain, shift)
            value = value.before(step) + _paid(price, gain, shift)
        return torch.stack(gains[::-1]), torch.stack(shifts[::-1])

    def best_law(self, sampler: GaussianSteps) -> Gaussian:
        """Law that the chain's optimum generates."""
        return self.law_of(*self.best_correction(sampler), sampler)

    def law_of(
        self,
        gain: Float[Tensor, "steps dim dim"],
        shift: Float[Tensor, "steps dim"],
        sampler: GaussianSteps,
    ) -> Gaussian:
        """What the pretrained action plus gain x + shift generates; float64."""
        steps, pretrained, law = Steps.of(sampler), self._pretrained(sampler), self._start()
        for k in range(len(steps.std)):
            law = _controlled_step(pretrained, steps, k, gain[k], shift[k]).after(law)
        return law


def _controlled_step(
    pretrained: tuple[Tensor, Tensor], steps: Steps, k: int, gain: Tensor, shift: Tensor
) -> Affine:
    """Step k under the pretrained action plus gain x + shift."""
    slope, offset = (v[k] for v in pretrained)
    unit = torch.eye(len(shift)).to(shift)
    return Affine(
        steps.state_gain[k] * unit + steps.score_gain[k] * (slope + gain),
        steps.score_gain[k] * (offset + shift),
        steps.std[k].square() * unit,
    )


def _paid(price: Tensor, gain: Tensor, shift: Tensor) -> Quadratic:
    """Minus price / 2 |gain x + shift|^2."""
    cost = kl_cost(price.view(1), gain, shift)
    return Quadratic(cost.curvature[0], cost.slope[0], cost.constant[0])


def gaussian_kl(law: Gaussian, reference: Gaussian) -> float:
    """KL(law || reference), nats."""
    gap = reference.mean - law.mean
    inverse = torch.linalg.inv(reference.covariance)
    trace = torch.trace(inverse @ law.covariance) - len(gap)
    logs = torch.logdet(reference.covariance) - torch.logdet(law.covariance)
    return float(0.5 * (trace + gap @ inverse @ gap + logs))


# -- scalar mixtures, any reward -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MixtureProblem:
    """A scalar mixture of normals and any reward, solved on a grid of states.

    Values are interpolated linearly, expectations over a step are Gauss-Hermite sums, and the law
    of the state is carried by the transpose of the same matrices; so E[V(X)] is consistent to
    round-off, and the grid's own error is O(spacing^2).
    """

    weights: tuple[float, ...] = (0.55, 0.45)
    means: tuple[float, ...] = (-1.1, 0.8)
    stds: tuple[float, ...] = (0.35, 0.45)
    reward: QuadraticReward | CosineReward = field(default_factory=CosineReward)
    kl_weight: float = 0.5
    points: int = 801
    reach: float = 5.0
    rule: int = 16
    _solved: dict[tuple[float, ...], Tensor] = field(default_factory=dict, repr=False, init=False)

    @cached_property
    def grid(self) -> Float[Tensor, " points"]:
        """The states of the grid, evenly spaced."""
        return torch.linspace(-self.reach, self.reach, self.points, dtype=torch.float64)

    @cached_property
    def rewards(self) -> Float[Tensor, " points"]:
        """Rewards of the grid's states."""
        return self.reward(self.grid[:, None], ["-"] * self.points)

    def exact_score(self, states: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Score of the noised mixture; states [n, 1], levels [n]."""
        means, stds, weights = (
            as_like(torch.tensor(v), states) for v in (self.means, self.stds, self.weights)
        )
        centre = alpha[:, None] * means
        variance = alpha[:, None].square() * stds.square() + sigma[:, None].square()
        gap = states - centre
        share = torch.softmax(
            weights.log() - 0.5 * variance.log() - 0.5 * gap.square() / variance, 1
        )
        return -(share * gap / variance).sum(1, keepdim=True)

    def environment(
        self, sampler: BoundSampler, seed: int, device: torch.device | str = "cpu"
    ) -> Environment:
        """The exact model with a neural correction.

        Raises:
            TypeError: the sampler is on a rectified flow.
        """
        table = _table_of(sampler)
        if not isinstance(table, DDPMTable):
            raise TypeError(
                "sampler must be on a variance-preserving table (DDPMTable), got one on "
                f"{type(table).__name__}: use GaussianProblem for a flow"
            )
        correction = NeuralCorrection(1, generator=stream(seed, "correction")).to(device)
        model = CorrectedScore(self.exact_score, correction, table, 1, torch.device(device))
        return _environment(model, self.reward, sampler, seed)

    def evaluate(self, score: CorrectedScore, sampler: BoundDDIM) -> Outcome:
        """By carrying the law of the state over the grid."""
        calls = score.calls
        with torch.no_grad():
            changes = []
            correction = copy.deepcopy(score.correction).cpu()  # the grid's answers are there
            for k in range(sampler.steps):
                alpha = sampler.alpha[k].expand(self.points)
                changes.append(correction(self.grid[:, None].float(), alpha.float())[:, 0])
        score.calls = calls
        return self.outcome_of(torch.stack(changes).double(), sampler)

    def optimum(self, sampler: BoundDDIM) -> Outcome:
        """By dynamic programming on the grid."""
        return self.outcome_of(self.best_correction(sampler), sampler)

    def _free_mean(self, sampler: BoundDDIM, k: int) -> Float[Tensor, " points"]:
        alpha, sigma = (v[k].expand(self.points) for v in (sampler.alpha, sampler.sigma))
        score = self.exact_score(self.grid[:, None], alpha, sigma)[:, 0]
        return sampler.state_gain[k] * self.grid + sampler.score_gain[k] * score

    def _step(self, means: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lower neighbour, its share, and weight of every (point, node) after a step."""
        nodes, masses = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(self.rule))
        after = means[:, None] + std * nodes
        place = (after + self.reach) / (2 * self.reach) * (self.points - 1)
        place = place.clamp(0, self.points - 1 - 1e-9)
        low = place.floor()
        return low.long(), 1 - (place - low), (masses / masses.sum()).expand_as(place)

    def _expected(self, values: Tensor, means: Tensor, std: Tensor) -> Tensor:
        low, share, weight = self._step(means, std)
        return (weight * (share * values[low] + (1 - share) * values[low + 1])).sum(1)

    def _carried(self, law: Tensor, means: Tensor, std: Tensor) -> Tensor:
        low, share, weight = self._step(means, std)
        mass = weight * law[:, None]
        carried = torch.zeros_like(law)
        carried.index_add_(0, low.flatten(), (mass * share).flatten())
        return carried.index_add_(0, (low + 1).flatten(), (mass * (1 - share)).flatten())

    def _costs(self, sampler: BoundDDIM) -> Tensor:
        return sampler.kl_factor * sampler.integrated_g2

    def law_of(
        self, changes: Float[Tensor, "steps points"], sampler: BoundDDIM
    ) -> tuple[Float[Tensor, " points"], float]:
        """Masses of the grid's points at the end, and the path KL in nats, of a changed score.

        Args:
            changes: of the pretrained score at every point of the grid, float64.
            sampler: the chain.
        """
        law = torch.exp(-0.5 * self.grid.square())
        law, paid = law / law.sum(), 0.0
        for k in range(sampler.steps):
            paid += float(0.5 * self._costs(sampler)[k] * (law @ changes[k].square()))
            means = self._free_mean(sampler, k) + sampler.score_gain[k] * changes[k]
            law = self._carried(law, means, sampler.std[k])
        return law, paid

    def values_of(
        self, changes: Float[Tensor, "steps points"], sampler: BoundDDIM
    ) -> Float[Tensor, "nodes points"]:
        """Expected reward, no KL charged, from every point of the grid at every node; float64.

        Args:
            changes: of the pretrained score at every point of the grid, float64.
            sampler: the chain.
        """
        values = [self.rewards]
        for k in reversed(range(sampler.steps)):
            means = self._free_mean(sampler, k) + sampler.score_gain[k] * changes[k]
            values.append(self._expected(values[-1], means, sampler.std[k]))
        return torch.stack(values[::-1])

    def outcome_of(self, changes: Float[Tensor, "steps points"], sampler: BoundDDIM) -> Outcome:
        """Outcome of the pretrained score plus these changes, as in ``law_of``."""
        law, paid = self.law_of(changes, sampler)
        best, _ = self.law_of(self.best_correction(sampler), sampler)
        reward = float(law @ self.rewards)
        kl = float((law * (law.clamp(min=1e-300) / best.clamp(min=1e-300)).log()).sum())
        return Outcome(reward, paid, reward - self.kl_weight * paid, kl)

    def best_correction(self, sampler: BoundDDIM) -> Float[Tensor, "steps points"]:
        """u_k(x) that maximises E V_{k+1} less kl_weight cost |u|^2 / 2; kept for each chain."""
        key = (sampler.eta, *sampler.alpha.tolist())
        if key not in self._solved:
            self._solved[key] = _solve(self, sampler)
        return self._solved[key]


def _solve(problem: MixtureProblem, sampler: BoundDDIM) -> Float[Tensor, "steps points"]:
    """Backwards: W = E V_{k+1}(mean + std z) on the grid of means, then the best mean of each x."""
    value, changes = problem.rewards, []
    grid, spacing = problem.grid, float(problem.grid[1] - problem.grid[0])
    for k in reversed(range(sampler.steps)):
        smoothed = problem._expected(value, grid, sampler.std[k])
        free = problem._free_mean(sampler, k)
        price = problem.kl_weight * problem._costs(sampler)[k]
        rate = 0.5 * price / sampler.score_gain[k].square()
        gain = smoothed - rate * (grid - free[:, None]).square()  # [x, mean of the next state]
        at = gain.argmax(1).clamp(1, problem.points - 2)
        rows = torch.arange(problem.points)
        left, middle, right = (gain[rows, at + j] for j in (-1, 0, 1))
        bend = left - 2 * middle + right  # a parabola through three points: error O(spacing^4)
        offset = (0.5 * (left - right) / bend).nan_to_num(0.0).clamp(-1, 1)
        best = grid[at] + spacing * offset
        change = (best - free) / sampler.score_gain[k]
        paid = 0.5 * price * change.square()
        value = problem._expected(value, best, sampler.std[k]) - paid
        changes.append(change)
    return torch.stack(changes[::-1])


def _double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def log_normaliser(problem: MixtureProblem) -> float:
    """kl_weight log E exp(reward / kl_weight) under the data law: the memoryless optimum."""
    density = torch.zeros_like(problem.grid)
    for w, m, s in zip(problem.weights, problem.means, problem.stds, strict=True):
        gap = (problem.grid - m) / s
        density = density + w / s * torch.exp(-0.5 * gap.square())
    density = density / density.sum()
    scaled = problem.rewards / problem.kl_weight
    return problem.kl_weight * float(torch.logsumexp(scaled + density.clamp(min=1e-300).log(), 0))
