"""Samplers of few steps between chosen noise levels: levels, steps and both KLs.

DDPM's posterior N(sqrt(a') b x0 / (1 - a) + sqrt(1 - b)(1 - a') x / (1 - a), b (1 - a') /
(1 - a)) with b = 1 - a / a', the last deviation 0.001. Learned deviations s' cost 1/2 (s'^2 /
s^2 - 1) - log(s' / s) a coordinate, in the path KL and in the chain's. Variances are
1e-4 (1 + growth i)^2, or angles arccos(alpha) are equally spaced.

Timesteps between a table's entries are those of the Gamma function that continues a product of
1 - beta with betas that grow linearly (Kong & Ping 2021, section 3.1).
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.special import gammaln

from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives.path_steps import path_kl_rate
from diffusion_envs.samplers import BoundFewSteps, EqualAngles
from diffusion_envs.samplers.few_steps import equal_angles, quadratic_variances
from verification.claim import Check, Setting, limit, pathwise
from verification.problems.losses import rows_of_steps, wave

SOURCE = "arXiv 2106.00132, section 3; 2407.00626; 2006.11239, equations 6 and 7"

BETAS = np.linspace(1e-4, 0.02, 1000)
PUBLISHED = np.cumprod(1 - BETAS)
STEPS = 4
X, OLD, NEW = (wave(STEPS, 3, size=0.9, phase=p) for p in (0.0, 1.0, 2.5))
EVERY = np.arange(STEPS)


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


def checks(setting: Setting) -> Iterator[Check]:
    """Schedules of few steps, and their steps."""
    yield from _schedules(setting)
    yield from _few_steps(setting)


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
"""
