"""Noise schedules: signal, noise, and the coefficients of the SDE that makes them.

Y = alpha Y_0 + sigma eps is the solution of dY = k Y ds + g dB: alpha' = k alpha and
(sigma^2)' = 2 k sigma^2 + g^2; hence d log(alpha^2 / sigma^2) = -g^2 / sigma^2 ds. Only
where variance is preserved is k = -g^2 / 2, and int g^2 the change of log(alpha^2).

Each schedule's alpha and sigma are compared with its source's formula, and with what its own drift
and diffusion make of a point: the two belong together, or generation reverses another process.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from diffusion_envs.noise_schedules import (
    VE,
    Cosine,
    DDPMTable,
    NoiseSchedule,
    RectifiedFlow,
    VPLinear,
)
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, array, expectation, pathwise
from verification.closed_form import schedules as exact

SOURCE = "arXiv 2011.13456 appendix B, 2102.09672 eq. 17, 2209.03003; Kingma et al. 2107.00630"

TIMES = np.array([0.2113, 0.5237, 0.8061])  # inside the table's pieces
ALPHA_BARS = np.array([0.96, 0.85, 0.69, 0.52, 0.34, 0.17, 0.06])
ENTRIES = len(ALPHA_BARS)
LOW, HIGH, LONG = 0.3, 4.1, 1.3  # of beta, and the horizon of its schedule


def everyone() -> dict[str, tuple[NoiseSchedule, tuple[np.ndarray, np.ndarray]]]:
    """Name -> the schedule, and alpha and sigma by its source."""
    table = DDPMTable(torch.tensor(ALPHA_BARS, dtype=torch.float64))
    return {
        "linear beta": (VPLinear(LOW, HIGH, LONG), exact.vp_linear(TIMES, LOW, HIGH, LONG)),
        "cosine": (Cosine(offset=0.03), exact.cosine(TIMES, 0.03)),
        "variance exploding": (VE(0.4, 7.0), exact.exploding(TIMES, 0.4, 7.0)),
        "rectified flow": (RectifiedFlow(), exact.flow(TIMES)),
        "table": (table, exact.table(TIMES, ALPHA_BARS)),
    }


def checks(setting: Setting) -> Iterator[Check]:
    """Five schedules: levels, coefficients, integrals; and the timesteps of a table's sampler."""
    s = setting.tensor(TIMES)
    for name, (schedule, (alpha, sigma)) in everyone().items():
        cuts = np.arange(1, ENTRIES) / ENTRIES if name == "table" else ()

        def k(u: np.ndarray, of: NoiseSchedule = schedule) -> np.ndarray:
            return array(of.drift_coefficient(setting.tensor(u)))

        def g2(u: np.ndarray, of: NoiseSchedule = schedule) -> np.ndarray:
            return array(of.g2(setting.tensor(u)))

        yield pathwise(f"{name}: signal", schedule.alpha(s), alpha)
        yield pathwise(f"{name}: noise", schedule.sigma(s), sigma)
        levels = np.array([exact.of_sde(k, g2, float(u), cuts) for u in TIMES])
        yield expectation(f"{name}: signal that the drift leaves", levels[:, 0], alpha)
        yield expectation(f"{name}: noise that drift and diffusion make", levels[:, 1], sigma)
        change = [exact.integral(g2, a, b, cuts) for a, b in pairwise(TIMES)]
        integral = schedule.integrated_g2(s[:-1], s[1:])
        yield expectation(f"{name}: integral of g^2", integral, change)
        yield pathwise(f"{name}: log of the SNR", schedule.log_snr(s), 2 * np.log(alpha / sigma))

    bars = torch.tensor(ALPHA_BARS, dtype=torch.float64)
    for spacing, steps, visited, end in (
        ("leading", 3, (5, 3, 1), ALPHA_BARS[0]),
        ("leading", 6, (6, 5, 4, 3, 2, 1), ALPHA_BARS[0]),
        ("trailing", 3, (6, 4, 1), 1.0),
    ):
        table = DDPMTable(bars, spacing=spacing, final_is_one=spacing == "trailing")
        sampler = DDIM(1.0).bind(table, steps)
        levels = np.append(ALPHA_BARS[list(visited)], end)
        name = f"a table's sampler, {steps} steps, {spacing}: "
        if steps == 3:
            yield pathwise(name + "timesteps", sampler.timesteps, visited)
        yield pathwise(name + "alpha-bar at its nodes", sampler.alpha_bar, levels)
        yield pathwise(name + "int g^2", sampler.integrated_g2, np.diff(np.log(levels)))


MISTAKES = r"""
diffusion_envs.noise_schedules._VariancePreserving.sigma
    sigma^2 for sigma | .expm1()).sqrt() => .expm1())
diffusion_envs.noise_schedules._VariancePreserving.drift_coefficient
    drift of the other sign | return -0.5 => return 0.5
    drift without 1/2 | -0.5 * self => -1.0 * self
diffusion_envs.noise_schedules._VariancePreserving.log_snr
    log-SNR of the other sign | return -self => return self
    log of alpha / sigma | return -self => return -0.5 * self
diffusion_envs.noise_schedules._VariancePreserving.integrated_g2
    int g^2 from 0 | - self.integrated_beta(s0) => ``
    int g for int g^2 | beta(s1) - => beta(s1).sqrt() -
diffusion_envs.noise_schedules.VPLinear.integrated_beta
    beta's slope without 1/2 | 0.5 * ( => 1.0 * (
diffusion_envs.noise_schedules.VPLinear.g2
    horizon of 1 taken for granted | / self.horizon * s => * s
diffusion_envs.noise_schedules.Cosine.g2
    cosine: half the rate | return math.pi => return 0.5 * math.pi
diffusion_envs.noise_schedules.Cosine.integrated_beta
    cosine: square forgotten | return -2 => return -1
    cosine: data already noised | ` - self._angle(torch.zeros_like(s)).cos().log()` => ``
diffusion_envs.noise_schedules.VE._rate
    exploding: rate of sigma, not of sigma^2 | 2 * math => math
diffusion_envs.noise_schedules.VE.g2
    exploding: g for g^2 | low**2 * self._rate => low * self._rate**0.5
diffusion_envs.noise_schedules.VE.integrated_g2
    exploding: int g^2 from 0 | (s1 - s0) => s1
diffusion_envs.noise_schedules.RectifiedFlow.drift_coefficient
    flow: drift of the other sign | -1 / (1 - s)\n => 1 / (1 - s)\n
diffusion_envs.noise_schedules.RectifiedFlow.g2
    flow: d sigma^2 alone | 2 * s / (1 - s)\n => 2 * s\n
diffusion_envs.noise_schedules.RectifiedFlow.sigma
    flow: variance preserved | return s\n => return (2 * s - s**2).sqrt()\n
diffusion_envs.noise_schedules.RectifiedFlow.integrated_g2
    flow: int g^2 without the drift's part | `2 * (s0 - s1) + ` => ``
diffusion_envs.noise_schedules.RectifiedFlow.log_snr
    flow: log of alpha / sigma | return 2 * => return
diffusion_envs.noise_schedules.DDPMTable._nodes
    table of alpha, not of alpha-bar | -self.alphas_cumprod.log() => -2 * self.alphas_cumprod.log()
diffusion_envs.noise_schedules.DDPMTable.g2
    table: beta of a step, not of time | len(self.alphas_cumprod) * => 1.0 *
diffusion_envs.noise_schedules.DDPMTable._piece
    table: one entry late | .sub(1) => .sub(2)
diffusion_envs.noise_schedules.DDPMTable.integrated_beta
    table: constant between entries | - piece\n => - piece + 0 * s.frac() - s * len(self.alphas_cumprod) + piece\n
diffusion_envs.noise_schedules.VE.alpha
    exploding: scaled to variance 1 | return torch.ones_like(s) => return (1 + self.sigma(s)**2).rsqrt()
diffusion_envs.noise_schedules.RectifiedFlow.alpha
    flow: signal of a preserved variance | return 1 - s => return (1 - s**2).sqrt()
diffusion_envs.samplers.BoundDDIM.noising_times
    sampler: level of the timestep before | self.timesteps.double() + 1 => self.timesteps.double() + 2
diffusion_envs.noise_schedules.DDPMTable.last_noising_time
    sampler: one step too far | (beyond + 1) => (beyond + 0)
diffusion_envs.noise_schedules.DDPMTable.timesteps
    leading timesteps one late [ValueError] | ratio + self.steps_offset\n => ratio + self.steps_offset + 1\n
    trailing timesteps counted from 1 | int(mark) - 1 => int(mark)
shared
    alpha-bar for alpha
    exploding: data already noised
    exploding: drift of a variance-preserving process
"""
