"""The natural gradient of the path KL: metric, direction, trust region, and Newton's step.

The path KL of the policy at theta + v from that at theta is v'Fv / 2 + O(|v|^3) with
F = E sum_k c_k J_k'J_k. Conjugate gradients solve (F + lambda) d = g,
lambda = damping g'Fg / g'g, after n products in the best way that n products allow. The
step -s d with s = sqrt(2 nats / d'Fd) has path KL nats, up to third order in s, and raises
J by sqrt(2 nats g'F^-1 g) to first order, at no damping: the most that so many nats can.
With a linear reward the step of rate 1 / kl_weight leads from the pretrained model to the
optimum.

The model of Gaussian data with affine changes of its score; states come from a rule that is exact
for their first two moments, of which alone the metric of affine policies is made.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator

from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.exact import GaussianProblem, table
from diffusion_envs.models.exact import CorrectedScore
from diffusion_envs.rollout import Rollout
from diffusion_envs.samplers import DDIM
from diffusion_envs.samplers.ddim import BoundDDIM
from diffusion_envs.training.optimisers import NaturalGradient
from diffusion_envs.training.optimisers.natural_gradient import natural_direction
from diffusion_envs.training.path_metric import PathMetric, flattened, unflattened
from verification.claim import Check, Setting, expectation, limit, rounding, stated
from verification.closed_form.affine_policies import AffinePolicies, krylov_solution
from verification.closed_form.linear_adapter import Sampler
from verification.problems.training_loop import Process

SOURCE = (
    'Kakade 2001, A natural policy gradient; "Score as Action", arXiv 2502.01819, Theorem '
    "4.4; Hestenes & Stiefel 1952"
)
WHY_DOUBLE = "errors of third order are compared at small steps"
COVERS = "several dimensions"

ETA, STEPS, TERMS = 0.7, 3, 6  # more parameters than policies: F is singular
DAMPING, MANY = 0.06, 40  # products, of 18 different actions' coefficients
LENGTHS = 2e-2, 1e-2, 5e-3  # of steps, each half as long as the one before, in root nats


@dataclass(eq=False)
class Case:
    """A problem and a policy, for our code and for the closed form."""

    setting: Setting
    problem: GaussianProblem
    theta: np.ndarray

    @cached_property
    def sampler(self) -> BoundDDIM:
        """DDIM with noise."""
        sampler = DDIM(ETA).bind(table(), STEPS)
        assert isinstance(sampler, BoundDDIM)
        return sampler

    @cached_property
    def exact(self) -> AffinePolicies:
        """The closed form."""
        alpha_bar = self.sampler.alpha_bar.numpy()
        mean, covariance = (np.array(v) for v in (self.problem.mean, self.problem.covariance))
        return AffinePolicies(Sampler(ETA, alpha_bar), mean, covariance, TERMS)

    @cached_property
    def environment(self) -> Environment:
        """The model of this policy."""
        environment = self.problem.environment(self.sampler, 3)
        model = environment.model
        assert isinstance(model, CorrectedScore)
        model.correction.to(self.setting.dtype)
        with torch.no_grad():
            parts = unflattened(self.setting.tensor(self.theta), model.parameters)
            for parameter, part in zip(model.parameters, parts, strict=True):
                parameter.copy_(part)
        return environment

    @cached_property
    def rollout(self) -> Rollout:
        """Four states a node, with the mean and covariance of the policy's own law."""
        nodes = []
        for mean, covariance in self.exact.laws(self.theta):
            root = math.sqrt(len(mean)) * np.linalg.cholesky(covariance).T
            nodes.append(np.concatenate([mean + root, mean - root]))
        states = self.setting.tensor(np.stack(nodes, axis=1))
        before, flat = states[:, :-1], states[:, :-1, 0]
        return Rollout(
            states=states,
            means=before,
            actions=before,
            noises=before,
            reference_scores=None,
            costs=flat,
            values=None,
            rewards=flat[:, 0],
            step_sizes=flat[0],
            condition=torch.zeros(len(states), dtype=torch.int64),
        )

    def metric(self, what: str, share: float, batch: int = 100) -> PathMetric:
        """Of all rows, in some order."""
        return PathMetric.of(
            self.environment,
            self.environment.model.parameters,
            self.rollout,
            share=share,
            generator=stream(7, what),
            batch=batch,
            accelerator=process(),
        )

    @property
    def slope(self) -> np.ndarray:
        """Gradient of J."""
        curvature, slope = np.array(self.problem.curvature), np.array(self.problem.slope)
        return self.exact.gradient(self.theta, curvature, slope, self.problem.kl_weight)

    def performance(self, theta: np.ndarray) -> float:
        """J."""
        curvature, slope = np.array(self.problem.curvature), np.array(self.problem.slope)
        return float(self.exact.performance(theta, curvature, slope, self.problem.kl_weight).real)

    def after(self, optimiser: NaturalGradient) -> tuple[np.ndarray, dict[str, float]]:
        """The policy after one step of the exact gradient, and what the optimiser said of it."""
        case = Case(self.setting, self.problem, self.theta)
        parameters = case.environment.model.parameters
        groups = [{"params": parameters}]
        steps = optimiser.start(groups, rate=1e-3, weight_decay=0.0, environment=case.environment)
        losses = unflattened(-self.setting.tensor(self.slope), parameters)
        for parameter, gradient in zip(parameters, losses, strict=True):
            parameter.grad = gradient.clone()
        numbers = steps.step(case.metric)
        return flattened([p.detach() for p in parameters]).double().cpu().numpy(), numbers


def process() -> Accelerator:
    """One process alone."""
    return Process()


def drawn(setting: Setting, name: str, size: int) -> np.ndarray:
    """Parameters or directions."""
    return torch.randn(size, generator=stream(setting.seed, name), dtype=torch.float64).numpy()


def _metric(case: Case) -> Iterator[Check]:
    exact, metric = case.exact, case.metric("pieces", 1.0, batch=5)
    F = exact.fisher(case.theta)
    one, other = (drawn(case.setting, f"direction {k}", exact.size) for k in range(2))
    for k, v in enumerate((one, other)):
        check = expectation(f"F v, direction {k}", metric.product(case.setting.tensor(v)), F @ v)
        yield stated(check, units=rounding(4 * STEPS * 2, 2.0))

    def even(h: float) -> float:
        there, back = (exact.path_kl(case.theta + s * other, case.theta).real for s in (h, -h))
        return (there + back) / (2 * h**2)

    nats = case.metric("all", 1.0).path_kl(case.setting.tensor(other))
    limiting = (4 * even(1e-3) - even(2e-3)) / 3
    yield limit("path KL of a small step, over its square", nats, limiting)


def _direction(case: Case) -> Iterator[Check]:
    F, g, metric = case.exact.fisher(case.theta), case.slope, case.metric("all", 1.0)
    damped = F + DAMPING * (g @ F @ g) / (g @ g) * np.eye(len(g))
    gradient = case.setting.tensor(g)
    for products in (2, 4):
        direction, _ = natural_direction(metric.product, gradient, products, DAMPING)
        best = krylov_solution(damped, g, products)
        yield expectation(f"direction of {products} products", direction, best)
    direction, _ = natural_direction(metric.product, gradient, MANY, DAMPING)
    yield expectation("direction", direction, np.linalg.solve(damped, g))


def _reported(case: Case) -> Iterator[Check]:
    """What the optimiser says of the shortest step."""
    nats = LENGTHS[-1] ** 2
    _, said = case.after(NaturalGradient(nats=nats, damping=DAMPING, share=1.0))
    yield expectation("path KL that is predicted", said["step_path_kl"], nats)
    yield expectation("path KL on the old states", said["measured_step_path_kl"], nats)


def _lengths(case: Case) -> Iterator[Check]:
    """Steps of three lengths: each half as long as the one before."""
    exact, g = case.exact, case.slope
    errors, gains = list[float](), list[float]()
    for h in LENGTHS:
        after, _ = case.after(NaturalGradient(nats=h**2, damping=DAMPING, share=1.0))
        errors.append(exact.path_kl(after, case.theta).real - h**2)
    order = math.log2(abs(errors[1] / errors[2]))
    curve = zip(LENGTHS, errors, strict=True)
    yield limit("path KL of a step less nats: third order", order, 3.0, curve=curve)
    for h in LENGTHS:
        after, _ = case.after(NaturalGradient(nats=h**2, damping=0.0, iterations=MANY, share=1.0))
        gains.append((case.performance(after) - case.performance(case.theta)) / h)
    steepest = math.sqrt(2 * g @ np.linalg.pinv(exact.fisher(case.theta), rcond=1e-10) @ g)
    rate = (8 * gains[2] - 6 * gains[1] + gains[0]) / 3
    yield limit("J gained per root of the nats", rate, steepest)


def checks(setting: Setting) -> Iterator[Check]:
    """Away from the pretrained model, with a quadratic reward; then from it, with a linear one."""
    size = TERMS * 6
    case = Case(setting, GaussianProblem(), 0.15 * drawn(setting, "policy", size))
    yield from _metric(case)
    yield from _direction(case)
    yield from _reported(case)
    free = GaussianProblem(curvature=((0.0, 0.0), (0.0, 0.0)))
    fresh = Case(setting, free, np.zeros(size))
    reached, _ = fresh.after(
        NaturalGradient(nats=1e3, rate=1 / free.kl_weight, damping=0.0, iterations=MANY, share=1.0)
    )
    best = free.optimum(fresh.sampler).objective
    gap = best - fresh.performance(fresh.theta)
    yield expectation("J of Newton's step", fresh.performance(reached), best, scale=gap)
    yield from _lengths(case)


MISTAKES = """
diffusion_envs.training.path_metric.PathMetric.of
    metric without g^2 | environment.steps.path_kl_gain[step] => torch.ones_like(environment.steps.path_kl_gain)[step]
    metric without the sampler's factor | path_kl_gain => step_sizes
    mean over steps for their sum | (steps / rows) => (1 / rows)
    sum over paths for their mean | (steps / rows) => steps
diffusion_envs.training.path_metric.PathMetric.product
    weight squared | piece.pushed(v) => self._weighted(rows, piece.pushed(v))
    weight left out | self._weighted(rows, piece.pushed(v)) => piece.pushed(v)
diffusion_envs.training.path_metric.PathMetric.path_kl
    KL not halved | 0.5 * (pushed => (pushed
diffusion_envs.training.path_metric.PathMetric._linearised
    steps not shuffled with their states | self.step[rows] => self.step.sort()[0][rows]
diffusion_envs.training.path_metric.PathMetric._pieces
    last partial batch left out | in every.split( => in every[: len(every) // self.batch * self.batch].split(
diffusion_envs.training.optimisers.natural_gradient.natural_direction
    damping forgotten in the products | ) + shift * p => ) + 0 * p
    damping in absolute units | damping * (g @ curvature) / first => damping
    directions not conjugate | residual + square / before * p => residual
    ratio of residuals upside down | square / before => before / square
    the gradient itself | return d, float => return g, float
diffusion_envs.training.optimisers.trust_region.TrustRegion.take
    length without the root | math.sqrt(self.nats / along) => self.nats / along
    twice the nats | math.sqrt(self.nats / along) => math.sqrt(2 * self.nats / along)
    uphill | parameter.sub_ => parameter.add_
    rate as the least length | min(edge, math.inf if => max(edge, 0.0 if
    reported KL to first order in the length | length**2 * along => length * along
diffusion_envs.training.path_metric.PathMetric.measured_kl
    KL measured over the rows' sum of squares | as_like(self.weight, gap) * gap => gap
"""
