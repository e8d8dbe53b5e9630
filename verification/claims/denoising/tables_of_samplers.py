"""Samplers from pure noise and on flows: their steps, clocks and path KLs.

From pure noise x' = alpha' x0 + sqrt(sigma'^2 - c^2) (x - alpha x0) / sigma + c z. Path KL: half
the increase of the SNR times |x0 - x0_pre|^2 and ((1 + eta^2) / (2 eta))^2; of CPS that of its
chain; the last step to clean data holds the score. The clock is the angle arctan(alpha / sigma).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.objectives.path_steps import path_kl_rate
from diffusion_envs.samplers import CPS, DDIM, FlowSDE, GaussianSteps
from verification.claim import Check, Setting, pathwise, stated
from verification.problems.losses import rows_of_steps, wave

SOURCE = "arXiv 2106.00132, section 3; 2407.00626; 2006.11239, equations 6 and 7; 2010.02502"

STEPS, ETA = 4, 0.6
X, OLD, NEW = (wave(STEPS, 3, size=0.9, phase=p) for p in (0.0, 1.0, 2.5))
EVERY = np.arange(STEPS)
STARTS_WITHOUT_SIGNAL = np.array([0.98, 0.9, 0.75, 0.5, 0.2, 1e-8])


def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|^2 of each row."""
    return np.sum((a - b) ** 2, axis=1)


def _denoised(
    setting: Setting, name: str, sampler: GaussianSteps, levels: np.ndarray, std: np.ndarray
) -> Iterator[Check]:
    """Where the action is x0_hat: levels [2, nodes] of signal and noise."""
    alpha, sigma = levels
    x, old, new = (setting.tensor(v) for v in (X, OLD, NEW))
    yield pathwise(f"{name}: signal and noise", torch.stack([sampler.alpha, sampler.sigma]), levels)
    angle = np.diff(np.arctan2(alpha, sigma))
    yield pathwise(f"{name}: clock", sampler.step_sizes, angle)
    if name == "CPS":
        kept = np.sqrt(sigma[1:] ** 2 - std**2)
        gain = alpha[1:] - kept * alpha[:-1] / sigma[:-1]
        increase = gain**2 / std**2
    else:
        eta = ETA if name == "from noise" else 0.8 / np.sqrt(2)
        increase = np.diff((alpha / sigma) ** 2) * ((1 + eta**2) / (2 * eta)) ** 2
    want = 0.5 * increase * squares(NEW, OLD)
    yield pathwise(f"{name}: path KL", sampler.path_kl(new[None], old[None])[0], want)
    rows = rows_of_steps(sampler, torch.as_tensor(EVERY), x, new, old)
    yield pathwise(f"{name}: path KL of rows", path_kl_rate(rows), want)
    kept = torch.stack([sampler.denoised(x[None], new[None])[0], sampler.denoised_at(1, x, new)])
    yield pathwise(f"{name}: x0_hat is the action", kept, np.stack([NEW, NEW]))


def checks(setting: Setting) -> Iterator[Check]:
    """Steps from pure noise; flows."""
    table = DDPMTable(torch.as_tensor(STARTS_WITHOUT_SIGNAL), spacing="trailing")
    sampler = DDIM(ETA).bind(table, STEPS)
    a = STARTS_WITHOUT_SIGNAL[[5, 3, 2, 1, 0]]  # six entries by four steps: 6, 4.5, 3, 1.5
    asked = np.array([5, 3, 2, 1])
    yield pathwise("from noise: timesteps", sampler.timesteps, asked)
    times = np.array([6, 4, 3, 2, 1]) / 6
    yield pathwise("from noise: noising times", sampler.noising_times, times)
    alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
    std = ETA * sigma[1:] / sigma[:-1] * np.sqrt(1 - a[:-1] / a[1:])
    yield pathwise("from noise: deviations", sampler.std, std)
    A, S, A2, S2, c = (v[:, None] for v in (alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], std))
    mean = A2 * OLD + np.sqrt(S2**2 - c**2) * (X - A * OLD) / S
    x, old = setting.tensor(X), setting.tensor(OLD)
    yield pathwise("from noise: mean", sampler.mean(torch.as_tensor(EVERY), x, old), mean)
    yield from _denoised(setting, "from noise", sampler, np.stack([alpha, sigma]), std)

    flow = FlowTable(shift=1.6, end=0.08)
    u = np.linspace(1.0, 0.08 / (1.6 - 0.6 * 0.08), STEPS + 1)
    s = 1.6 * u / (1 + 0.6 * u)
    levels = np.stack([1 - s, s])
    std = s[1:] * np.sin(0.47 * np.pi / 2)
    yield from _denoised(setting, "CPS", CPS(0.47).bind(flow, STEPS), levels, std)
    yield from _denoised(setting, "flow SDE", FlowSDE(0.8).bind(flow, STEPS), levels, std)
    bound = FlowSDE(0.8).bind(replace(flow, end=0.0), STEPS)
    u = np.linspace(1.0, 0.0, STEPS + 1)
    last = 1.6 * u / (1 + 0.6 * u)
    end = last[-2]
    exact = (-2 * end - 2 * np.log(1 - end)) * ((1 - end) / end**2) ** 2
    yield pathwise(
        "flow to clean data: the last step holds the score", bound.snr_increase[-1], exact
    )
    found = pathwise("flow: timesteps", bound.timesteps, 1000 * last[:-1])
    yield stated(found, precision=torch.float32)


MISTAKES = r"""
diffusion_envs.samplers.ddim.BoundDDIMFromNoise.state_gain
    noise not taken out | ` - self.std.square()` => ``
diffusion_envs.samplers.ddim.BoundDDIMFromNoise.gain
    x0 without what the state has of it | ` - self.state_gain * self.alpha[:-1]` => ``
diffusion_envs.samplers.ddim.BoundDDIMFromNoise.path_kl_gain
    SNR without square | (self.alpha / self.sigma).square().diff() => (self.alpha / self.sigma).diff()
    KL of eta 1 | kl_factor(self.eta) * => ``
diffusion_envs.samplers.ddim.BoundDDIM.std
    eta forgotten | self.eta * self.sigma => self.sigma
diffusion_envs.samplers.ddim.BoundDDIM.noising_times
    noising times half an entry early | (self.timesteps.double() + 1) => (self.timesteps.double() + 0.5)
diffusion_envs.noise_schedules.DDPMTable.timesteps
    trailing: counted from 1 | int(mark) - 1 => int(mark) - 1 * (mark > 5)
diffusion_envs.samplers.gaussian_steps.GaussianSteps.step_sizes
    clock: the complement of the angle | torch.atan2(self.alpha, self.sigma) => torch.atan2(self.sigma, self.alpha)
diffusion_envs.samplers.gaussian_steps.GaussianSteps.kl_factor
    KL per step, not per clock | self.path_kl_gain / self.step_sizes => self.path_kl_gain
diffusion_envs.samplers.gaussian_steps.GaussianSteps.denoised
    x0_hat of the action taken for a score | if self.action == "denoised": => if False:
diffusion_envs.samplers.gaussian_steps.GaussianSteps.denoised_at
    x0_hat of the action taken for a score | if self.action == "denoised": => if False:
diffusion_envs.samplers.flow_sde.BoundCPS.path_kl_gain
    CPS: KL not squared | (self.gain / self.std).square() => (self.gain / self.std)
diffusion_envs.samplers.flow_sde.BoundCPS.std
    CPS: a quarter turn forgotten | math.sin(0.5 * math.pi * self.noise_level) => self.noise_level
diffusion_envs.samplers.flow_sde._OnFlow.snr_increase
    last step holds x0_hat of the step before | * rate.square() => * rate
diffusion_envs.samplers.flow_sde._OnFlow.timesteps
    timesteps of the right end | self.noising_times[:-1] => self.noising_times[1:]
shared
    shift of the nodes forgotten
    KL of the time reversal
"""
