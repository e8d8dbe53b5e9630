"""Where policy gradients come to rest on the exact Gaussian problem: recursions over the steps."""

import torch
from torch import Tensor

from diffusion_envs.exact import GaussianProblem, gaussian, linear_policy
from diffusion_envs.exact.gaussian import Affine, Quadratic
from diffusion_envs.samplers import BoundDDIM


def resting(
    problem: GaussianProblem, sampler: BoundDDIM, price: Tensor, charged: bool
) -> tuple[Tensor, Tensor, list[Quadratic]]:
    """Affine u_k that maximise E V_{k+1} - price_k |u_k|^2 / 2; V pays the prices or is E[r] only.

    Returns:
        the policy, and what it makes of the reward (and pays, if charged) from every node on.
    """
    slope, offset = gaussian.score_coefficients(
        problem.data, sampler.table, sampler.noising_times[:-1]
    )
    unit, value = torch.eye(2, dtype=torch.float64), problem.quadratic
    gains, shifts, values = [], [], [value]
    for k in reversed(range(sampler.steps)):
        a, b = sampler.state_gain[k], sampler.score_gain[k]
        free = a * unit + b * slope[k], b * offset[k]
        hessian = price[k] * unit + b.square() * value.curvature
        gain = -b * torch.linalg.solve(hessian, value.curvature @ free[0])
        shift = b * torch.linalg.solve(hessian, value.slope - value.curvature @ free[1])
        noise = sampler.std[k].square() * unit
        value = value.before(Affine(free[0] + b * gain, free[1] + b * shift, noise))
        if charged:
            running = linear_policy.kl_cost(price[k : k + 1], gain, shift)
            value = value + Quadratic(running.curvature[0], running.slope[0], running.constant[0])
        gains.append(gain)
        shifts.append(shift)
        values.append(value)
    return torch.stack(gains[::-1]), torch.stack(shifts[::-1]), values[::-1]


def resting_per_std(
    problem: GaussianProblem, sampler: BoundDDIM, price: Tensor
) -> tuple[float, Tensor, Tensor]:
    """The same where the prices are in standard deviations of the reward of the policy at rest.

    Returns:
        that standard deviation, and the policy.
    """
    steps, std = linear_policy.Steps.of(sampler), 1.0
    curvature, unit = problem.quadratic.curvature, torch.eye(2, dtype=torch.float64)
    gain = shift = torch.zeros(0)
    change = 1.0
    while change > 1e-6:
        gain, shift, _ = resting(problem, sampler, price * std, charged=False)
        law, pretrained = problem._start(), problem._pretrained(sampler)
        for k in range(sampler.steps):
            slope, offset = pretrained[0][k] + gain[k], pretrained[1][k] + shift[k]
            a, b = steps.state_gain[k], steps.score_gain[k]
            law = Affine(a * unit + b * slope, b * offset, steps.std[k].square() * unit).after(law)
        uphill, both = problem.quadratic.gradient(law.mean), curvature @ law.covariance
        variance = uphill @ law.covariance @ uphill + 0.5 * torch.trace(both @ both)
        change, std = abs(variance.sqrt().item() - std), variance.sqrt().item()
    return std, gain, shift


def gained(problem: GaussianProblem, sampler: BoundDDIM, gain: Tensor, shift: Tensor) -> float:
    """The share of what J can gain on this chain that a policy gains."""
    found = problem.outcome_of(gain, shift, sampler).objective
    start = problem.outcome_of(0 * gain, 0 * shift, sampler).objective
    return (found - start) / (problem.optimum(sampler).objective - start)
