"""Gaussian steps on a rectified flow, from pure noise on.

Steps on a rectified flow are affine in the expected data x0_hat, with finite gains and
densities from pure noise on. Their log-ratio is that of the Gaussian densities; the path KL
of the SDE, x0_hat held over a step, is half the increase of the signal-to-noise ratio times
|change of x0_hat|^2 (times the factor of eta), and for exact posteriors (DDIM with eta = 1)
that of the chain too.

    x = (1 - s) x0 + s eps,   SNR = ((1 - s) / s)^2,   0 at s = 1
There the score is -x whatever the network says, and g^2 infinite. In terms of the expected data
x0_hat everything is finite: transitions, their ratios and KL, and the path KL of the SDE. The
reference writes the published steps with the network's velocity v = (x - x0_hat) / s in numpy, and
integrates the path KL by quadrature.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad

import ctrl
from diffusion_envs.exact import GaussianProblem
from diffusion_envs.noise_schedules import FlowTable
from diffusion_envs.objectives.path_steps import transition_kl, transition_log_ratio
from diffusion_envs.samplers import CPS, DDIM, FlowSDE
from verification.claim import Check, Setting, array, expectation, pathwise, stated
from verification.closed_form.gaussian_law import independent_log_density
from verification.problems.losses import rows_of_steps

SOURCE = "arXiv 2505.05470 equations 8, 9; 2509.05952; 2107.00630 (KL by the SNR); 2010.02502"

NOISE, ETA, PRESERVING, STEPS = 0.83, 0.6, 0.47, 4
TABLE = FlowTable(shift=1.6, end=0.08)
STEP = np.array([0, 3, 1, 2, 0])  # of each row: mixed, pure noise among them
STATES = np.array([[0.4, -0.9], [-1.3, 0.25], [1.1, 0.7], [0.1, 1.2], [-0.6, -0.35]])
NORMALS = np.array([[-0.4, 0.65], [1.15, -0.8], [0.25, -1.7], [0.8, 0.3], [-1.2, 0.5]])
OLD = 0.4 * STATES + np.array([0.3, -0.2])  # expected data that sampled
NEW = OLD + 0.35 * np.sin(STATES) + np.array([0.15, 0.4])  # those in question


def nodes() -> np.ndarray:
    """Noising times: equally spaced ones, shifted."""
    u = np.linspace(1.0, 0.08 / (1.6 - 0.6 * 0.08), STEPS + 1)
    return 1.6 * u / (1 + 0.6 * u)


def law(name: str, step: np.ndarray, x: np.ndarray, x0: np.ndarray) -> tuple[Any, Any]:
    """Mean and standard deviation of each row's next state, as published."""
    at = nodes()
    s, u = at[step][:, None], at[step + 1][:, None]
    velocity = (x - x0) / s
    data, eps = x - s * velocity, x + (1 - s) * velocity
    if name == "Flow-GRPO":  # arXiv 2505.05470 equation 9, and its code at s = 1
        rate = NOISE**2 * s / (1 - np.where(s == 1, at[1], s))
        drift = velocity + rate / (2 * s) * (x + (1 - s) * velocity)
        return x - (s - u) * drift, np.sqrt(rate * (s - u))
    if name == "CPS":
        std = u * np.sin(PRESERVING * np.pi / 2)
    else:  # noise in x_u given x_s and x0
        std = ETA * u * np.sqrt(1 - ((1 - s) * u / ((1 - u) * s)) ** 2)
    return (1 - u) * data + np.sqrt(u**2 - std**2) * eps, std


def half_increases(eta: float) -> np.ndarray:
    """Path KL of the eta family's SDE for a unit change of x0_hat, held; by quadrature, [steps]."""

    def rate(s: float) -> float:  # g^2 (alpha / sigma^2)^2
        return 2 * s * (1 - s) / s**4

    factor = ((1 + eta**2) / (2 * eta)) ** 2
    each = [quad(rate, u, s, epsabs=0, epsrel=1e-12)[0] for s, u in pairwise(nodes())]
    return 0.5 * factor * np.array(each)


def _rollout(setting: Setting) -> Iterator[Check]:
    """States and costs of the exact Gaussian model with a correction of its expected data."""
    problem = GaussianProblem()
    sampler = FlowSDE(NOISE).bind(TABLE, STEPS)
    environment = problem.environment(sampler, 7, setting.device)
    with torch.no_grad():
        for parameter in environment.model.parameters:
            wave = 0.1 * torch.cos(torch.arange(1.0, 1 + parameter.numel()))
            parameter.copy_(wave.view_as(parameter))
    rollout = environment.sample(
        lambda mean, level: ctrl.DeterministicPolicy(mean),
        range(6),
        torch.zeros(6, dtype=torch.long),
        stream="claim",
    ).rollout
    states, noises = (array(v) for v in (rollout.states, rollout.noises))
    gain, shift = (array(p) for p in environment.model.parameters)
    covariance, mean = np.array(problem.covariance), np.array(problem.mean)
    halves, now, costs = half_increases(NOISE / np.sqrt(2)), states[:, 0], []
    for k, s in enumerate(nodes()[:-1]):
        basis = np.polynomial.legendre.legvander(np.array([1 - 2 * s]), len(shift) - 1)[0]
        noised = (1 - s) ** 2 * covariance + s**2 * np.eye(2)
        regression = (1 - s) * covariance @ np.linalg.inv(noised)
        change = now @ np.einsum("k,kij->ij", basis, gain).T + basis @ shift
        x0 = mean + (now - (1 - s) * mean) @ regression.T + change
        costs.append(halves[k] * np.sum(change**2, axis=-1))
        after, std = law("Flow-GRPO", np.full(6, k), now, x0)
        now = after + std * noises[:, k]
        name = f"state of the exact model after step {k}"
        yield stated(pathwise(name, rollout.states[:, k + 1], now), precision=torch.float32)
    found = pathwise("path KL of its roll-out", rollout.costs, np.array(costs).T)
    yield stated(found, precision=torch.float32)


def checks(setting: Setting) -> Iterator[Check]:
    """Rows of mixed steps, path KL by quadrature, and a roll-out of the exact model."""
    step = torch.as_tensor(STEP)
    x, z, old, new = (setting.tensor(v) for v in (STATES, NORMALS, OLD, NEW))
    for name, sampler in (
        ("Flow-GRPO", FlowSDE(NOISE).bind(TABLE, STEPS)),
        ("CPS", CPS(PRESERVING).bind(TABLE, STEPS)),
        ("DDIM", DDIM(ETA).bind(TABLE, STEPS)),
    ):
        mean, std = law(name, STEP, STATES, OLD)
        other = law(name, STEP, STATES, NEW)[0]
        after = mean + std * NORMALS
        yield pathwise(f"{name}: mean of the next state", sampler.mean(step, x, old), mean)
        ratio = independent_log_density(after, other, std**2) - independent_log_density(
            after, mean, std**2
        )
        rows = rows_of_steps(sampler, step, z, new, old)
        yield pathwise(f"{name}: log-ratio", transition_log_ratio(rows), ratio)
        kl = np.sum(((other - mean) / std) ** 2, axis=-1) / 2
        yield pathwise(f"{name}: KL of rows", transition_kl(rows), kl)

    change = np.stack([NEW - OLD, OLD - 0.3])[:, :STEPS]
    for name, sampler, eta in (
        ("Flow-GRPO", FlowSDE(NOISE), NOISE / np.sqrt(2)),
        ("DDIM", DDIM(ETA), ETA),
        ("reversal", DDIM(1.0), 1.0),
    ):
        bound = sampler.bind(TABLE, STEPS)
        gaps = setting.tensor(change)
        found = bound.path_kl(gaps, 0 * gaps)
        exact = half_increases(eta) * np.sum(change**2, axis=-1)
        yield expectation(f"{name}: path KL, half the increase of the SNR", found, exact)
    reversal = DDIM(1.0).bind(TABLE, STEPS)
    chain = (reversal.gain / reversal.std).square()
    yield expectation("path KL of the reversal's chain", chain, 2 * half_increases(1.0))

    yield from _rollout(setting)


MISTAKES = """
diffusion_envs.samplers.flow_sde._OnFlow.snr_increase
    SNR without square | .square().diff() => .diff()
    SNR of the noise alone | (self.alpha / self.sigma) => (1 / self.sigma)
diffusion_envs.samplers.flow_sde.BoundFlowSDE.eta
    a taken for eta | self.noise_level / math.sqrt(2) => self.noise_level
diffusion_envs.samplers.gaussian_steps.GaussianSteps.path_kl
    path KL without 1/2 | 0.5 * as_like => 1.0 * as_like
diffusion_envs.samplers.flow_sde.BoundFlowSDE.std
    variance for standard deviation | * self.grid.steps).sqrt() => * self.grid.steps)
    standard deviation without the step (issue of the code's KL) | (self._variance_rate * self.grid.steps)
        => self._variance_rate
diffusion_envs.samplers.flow_sde.BoundFlowSDE._variance_rate
    second node's level at every node | torch.where(s == 1, s[1], s) => s[1]
diffusion_envs.samplers.flow_sde.BoundFlowSDE._velocity_gain
    drift not corrected for the noise: velocity | 1 + self._variance_rate * (1 - s) / (2 * s)
        => 1 + 0 * self._variance_rate
diffusion_envs.samplers.flow_sde.BoundFlowSDE.state_gain
    drift not corrected for the noise: state | `- self._variance_rate * h / (2 * s) ` => ``
diffusion_envs.samplers.flow_sde._Preserving._kept
    noise not taken out of the direction | ` - self.std.square()` => ``
diffusion_envs.samplers.flow_sde._Preserving.gain
    signal of the step before | self.alpha[1:] - => self.alpha[:-1] -
diffusion_envs.samplers.flow_sde.BoundFlowDDIM.std
    eta ignored | `self.eta * ` => ``
diffusion_envs.samplers.flow_sde.BoundCPS.std
    CPS: angle of a half turn | 0.5 * math.pi => math.pi
diffusion_envs.environment.Environment._act
    score asked for where it says nothing | self.model.denoised( => self.model(
shared
    shift of the nodes forgotten
    KL of the time reversal
    KL of rows without 1/2
    log-ratio of transitions: 1/2 dropped
"""
