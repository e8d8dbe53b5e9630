"""Samplers of few steps, from pure noise and on flows: their steps, clocks and path KLs.

Few steps: DDPM's posterior N(sqrt(a') b x0 / (1 - a) + sqrt(1 - b)(1 - a') x / (1 - a),
b (1 - a') / (1 - a)) with b = 1 - a / a', learned deviations s' costing 1/2 (s'^2 / s^2 - 1)
- log(s' / s) a coordinate; from pure noise x' = alpha' x0 + sqrt(sigma'^2 - c^2) (x - alpha x0) /
sigma + c z. Path KL: half the increase of the SNR times |x0 - x0_pre|^2, of CPS that of its
chain. The clock is the angle arctan(alpha / sigma), or int g^2.

Timesteps between a table's entries are those of the Gamma function that continues a product of
1 - beta with betas that grow linearly (Kong & Ping 2021, section 3.1).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from scipy.special import gammaln

from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.objectives.path_steps import path_kl_rate
from diffusion_envs.samplers import CPS, DDIM, BoundFewSteps, EqualAngles, FlowSDE, GaussianSteps
from diffusion_envs.samplers.few_steps import equal_angles, quadratic_variances
from verification.claim import Check, Setting, limit, pathwise, stated
from verification.problems.ddim_transitions import rows_of_steps
from verification.problems.losses import wave

SOURCE = "arXiv 2106.00132, section 3; 2407.00626; 2006.11239, equations 6 and 7; 2010.02502"

BETAS = np.linspace(1e-4, 0.02, 1000)
PUBLISHED = np.cumprod(1 - BETAS)
STEPS, ETA = 4, 0.6
X, OLD, NEW = (wave(STEPS, 3, size=0.9, phase=p) for p in (0.0, 1.0, 2.5))
EVERY = np.arange(STEPS)
STARTS_WITHOUT_SIGNAL = np.array([0.98, 0.9, 0.75, 0.5, 0.2, 1e-8])


def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|^2 of each row."""
    return np.sum((a - b) ** 2, axis=1)


def chain_of(a: np.ndarray, x: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DDPM's posterior between alpha-bars a_k and a_{k+1}, at the expected data."""
    before, after = a[:-1, None], a[1:, None]
    x0 = (x + (1 - before) * score) / np.sqrt(before)
    beta = 1 - before / after
    mean = np.sqrt(after) * beta * x0 + np.sqrt(1 - beta) * (1 - after) * x
    return mean / (1 - before), np.sqrt(beta * (1 - after) / (1 - before))


def _schedules(setting: Setting) -> Iterator[Check]:
    eta = quadratic_variances(10).numpy()
    growth = (np.sqrt(eta / 1e-4) - 1)[1:] / np.arange(1, 10)
    yield pathwise("published ten steps: growth 9.5", growth, np.full(9, 9.5))
    many = quadratic_variances(30, 0.003).numpy()
    ends = [many[0], np.prod(1 - many)]
    yield pathwise("thirty steps: ends", ends, [1e-4, 0.003])
    roots = np.sqrt(many)
    yield pathwise("thirty steps: quadratic", np.diff(roots, 2), np.zeros(28), scale=roots[-1])
    angles = np.arccos(np.sqrt(equal_angles(4).numpy()))
    start = np.arccos(np.sqrt(np.prod(1 - eta)))
    want = np.linspace(start, np.arccos(np.sqrt(1 - 1e-4)), 4)
    yield pathwise("equal angles", angles, want)
    table = DDPMTable(torch.as_tensor(PUBLISHED))
    between = np.array([3.4, 250.5, 616.73, 950.2])
    slope = BETAS[1] - BETAS[0]
    c = (1 - BETAS[0]) / slope
    want = (between + 1) * np.log(slope) + gammaln(c + 1) - gammaln(c - between)
    got = table.log_alpha_bar_at(torch.as_tensor(between))
    yield limit("alpha-bar between timesteps: the Gamma function's", got, want)
    back = table.timesteps_of(torch.as_tensor(want))
    yield limit("timesteps of alpha-bars", back, between)


def _few_steps(setting: Setting) -> Iterator[Check]:
    table = DDPMTable(torch.as_tensor(PUBLISHED))
    sampler = EqualAngles(learned_std=True).bind(table, STEPS)
    a = np.append(equal_angles(4).numpy(), 1.0)
    x, old = setting.tensor(X), setting.tensor(OLD)
    step = torch.as_tensor(EVERY)
    mean, std = chain_of(a, X, OLD)
    yield pathwise("few steps: mean", sampler.mean(step, x, old), mean)
    std[-1] = 0.001
    yield pathwise("few steps: deviations at first", sampler.std, std[:, 0])
    yield pathwise("few steps: signal", sampler.alpha, np.sqrt(a))
    yield pathwise("few steps: noise", sampler.sigma, np.sqrt(1 - a))
    nodes = np.append(0.0, -np.log(PUBLISHED))
    times = np.interp(-np.log(a), nodes, np.arange(1001) / 1000)
    yield pathwise("few steps: noising times", sampler.noising_times, times)
    logs = table.log_alpha_bar_at(sampler.timesteps).numpy()
    yield pathwise("few steps: timesteps have the levels", logs, np.log(a[:-1]))
    learned = std[:, 0] * np.exp([0.3, -0.2, 0.4, 0.0])
    yield from _learned(setting, sampler, a, learned, std[:, 0])


def _learned(
    setting: Setting, sampler: BoundFewSteps, a: np.ndarray, std: np.ndarray, initial: np.ndarray
) -> Iterator[Check]:
    x, old, new = (setting.tensor(v) for v in (X, OLD, NEW))
    assert sampler.log_std is not None
    with torch.no_grad():
        sampler.log_std.copy_(torch.as_tensor(np.log(std)))
    yield pathwise("learned deviations", sampler.std, std)
    sizes = np.log(a[1:] / a[:-1])
    yield pathwise("few steps: clock", sampler.step_sizes, sizes)
    ratio = (std / initial) ** 2
    widths = 1.5 * (ratio - 1 - np.log(ratio))
    with torch.no_grad():
        got = sampler.path_kl(new[None], old[None])[0]
        chain = sampler.chain_kl(new[None], old[None])[0]
        rate = path_kl_rate(rows_of_steps(sampler, torch.as_tensor(EVERY), x, new, old))
    means = 0.5 * sizes * squares(NEW, OLD)
    yield pathwise("learned deviations: path KL", got, means + widths)
    yield pathwise("few steps: path KL of rows", rate, means)
    shift = chain_of(a, X, NEW)[0] - chain_of(a, X, OLD)[0]
    want = widths + np.sum(shift**2, axis=1) / (2 * initial**2)
    yield pathwise("learned deviations: KL of the chain", chain, want)
    leave = sampler.log_std
    (slope,) = torch.autograd.grad(sampler.std.sum(), leave)
    yield pathwise("learned deviations: slope", slope, np.append(std[:-1], 0.0))


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
    """Schedules of few steps; their steps; steps from pure noise; flows."""
    yield from _schedules(setting)
    yield from _few_steps(setting)
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
diffusion_envs.samplers.few_steps.quadratic_variances
    growth at the other end of the search | return variances(edge)\n    growth => return variances(edge / 2)\n    growth
    search for another end | - math.log(last) => - 0.9 * math.log(last)
    growth in the variances, not their roots | (1 + growth * numbers).square() => (1 + growth**2 * numbers.square())
diffusion_envs.samplers.few_steps.equal_angles
    equal steps of the signal | torch.linspace(start, end, steps, dtype=torch.float64).cos().square()
        => torch.linspace(math.cos(start), math.cos(end), steps, dtype=torch.float64).square()
    alpha for alpha-bar | .cos().square() => .cos()
diffusion_envs.samplers.few_steps.BoundFewSteps.variances
    share of the step before | self.alpha_bar[:-1] / self.alpha_bar[1:] => self.alpha_bar[:-1]
diffusion_envs.samplers.few_steps.BoundFewSteps.gain
    gain of the score without the state's | self.state_gain * self.variances => self.variances
diffusion_envs.samplers.few_steps.BoundFewSteps.initial_std
    variance for standard deviation | self.variances.sqrt() => self.variances
diffusion_envs.samplers.few_steps.BoundFewSteps.std
    twice the log of a deviation | self.log_std[:-1].exp() => self.log_std[:-1].exp().square()
    last deviation learned too | torch.cat([self.log_std[:-1].exp(), self.initial_std[-1:]]) => self.log_std.exp()
diffusion_envs.samplers.few_steps.BoundFewSteps.std_kl
    KL of the deviations in the other direction | self.std / self.initial_std => self.initial_std / self.std
diffusion_envs.samplers.few_steps.BoundFewSteps.path_kl
    KL of the deviations once, not a coordinate | ` * gap.shape[2]` => ``
diffusion_envs.samplers.few_steps.BoundFewSteps.transition_kl
    KL of the chain in the new deviations | self.gain / self.initial_std => self.gain / self.std
diffusion_envs.samplers.few_steps.BoundFewSteps.step_sizes
    clock of the noise | self.alpha_bar.log().diff() => self.alpha_bar.diff()
diffusion_envs.samplers.few_steps.BoundFewSteps.alpha
    alpha-bar for signal | self.alpha_bar.sqrt() => self.alpha_bar
diffusion_envs.samplers.few_steps.BoundFewSteps.sigma
    variance for noise | (1 - self.alpha_bar).sqrt() => (1 - self.alpha_bar)
diffusion_envs.samplers.few_steps.BoundFewSteps.noising_times
    noising times of the signal | -self.alpha_bar.log() => -0.5 * self.alpha_bar.log()
diffusion_envs.noise_schedules.DDPMTable._bends
    straight between entries | 0.5 * mean, -limit => 0 * mean, -limit
diffusion_envs.noise_schedules.DDPMTable.timesteps_of
    share of a piece doubled | 2 * drop / (root - slope) => 4 * drop / (root - slope)
diffusion_envs.noise_schedules.DDPMTable.noising_times_of
    share of a piece forgotten | (piece + share) / len => (piece + 0 * share) / len
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
diffusion_envs.noise_schedules.FlowTable.nodes
    shift of the nodes forgotten | self.shift * u / (1 + (self.shift - 1) * u) => u
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
diffusion_envs.samplers.flow_sde.BoundFlowSDE.path_kl_gain
    flow SDE: KL of eta 1 | kl_factor(self.eta) * => ``
"""
