"""Noise schedules: signal, noise, and the coefficients of the SDE that makes them.

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
from verification.claim import Check, Setting, claim, expectation, pathwise, wrong
from verification.closed_form import schedules as exact

TIMES = np.array([0.2113, 0.5237, 0.8061])  # inside the table's pieces
ALPHA_BARS = np.array([0.96, 0.85, 0.69, 0.52, 0.34, 0.17, 0.06])
ENTRIES = len(ALPHA_BARS)
LOW, HIGH, LONG = 0.3, 4.1, 1.3  # of beta, and the horizon of its schedule
_VP = "diffusion_envs.noise_schedules._VariancePreserving"
_AT = "diffusion_envs.noise_schedules"


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


@claim(
    statement="""
        Y = alpha Y_0 + sigma eps is the solution of dY = k Y ds + g dB: alpha' = k alpha and
        (sigma^2)' = 2 k sigma^2 + g^2; hence d log(alpha^2 / sigma^2) = -g^2 / sigma^2 ds. Only
        where variance is preserved is k = -g^2 / 2, and int g^2 the change of log(alpha^2).
        """,
    source="arXiv 2011.13456 appendix B, 2102.09672 eq. 17, 2209.03003; Kingma et al. 2107.00630",
    wrongs=[
        wrong("alpha-bar for alpha", f"{_VP}.alpha", "-0.5 *", "-1.0 *"),
        wrong("sigma^2 for sigma", f"{_VP}.sigma", ".expm1()).sqrt()", ".expm1())"),
        wrong("drift of the other sign", f"{_VP}.drift_coefficient", "return -0.5", "return 0.5"),
        wrong("drift without 1/2", f"{_VP}.drift_coefficient", "-0.5 * self", "-1.0 * self"),
        wrong("log-SNR of the other sign", f"{_VP}.log_snr", "return -self", "return self"),
        wrong("log of alpha / sigma", f"{_VP}.log_snr", "return -self", "return -0.5 * self"),
        wrong("int g^2 from 0", f"{_VP}.integrated_g2", "- self.integrated_beta(s0)", ""),
        wrong("int g for int g^2", f"{_VP}.integrated_g2", "beta(s1) -", "beta(s1).sqrt() -"),
        wrong("beta's slope without 1/2", f"{_AT}.VPLinear.integrated_beta", "0.5 * (", "1.0 * ("),
        wrong("horizon of 1 taken for granted", f"{_AT}.VPLinear.g2", "/ self.horizon * s", "* s"),
        wrong(
            "cosine: half the rate", f"{_AT}.Cosine.g2", "return math.pi", "return 0.5 * math.pi"
        ),
        wrong(
            "cosine: square forgotten", f"{_AT}.Cosine.integrated_beta", "return -2", "return -1"
        ),
        wrong(
            "cosine: data already noised",
            f"{_AT}.Cosine.integrated_beta",
            " - self._angle(torch.zeros_like(s)).cos().log()",
            "",
        ),
        wrong("exploding: data already noised", f"{_AT}.VE.sigma", ".expm1()", ".exp()"),
        wrong("exploding: rate of sigma, not of sigma^2", f"{_AT}.VE._rate", "2 * math", "math"),
        wrong(
            "exploding: g for g^2", f"{_AT}.VE.g2", "low**2 * self._rate", "low * self._rate**0.5"
        ),
        wrong(
            "exploding: drift of a variance-preserving process",
            f"{_AT}.VE.drift_coefficient",
            "torch.zeros_like(s)",
            "-0.5 * self.g2(s)",
        ),
        wrong("exploding: int g^2 from 0", f"{_AT}.VE.integrated_g2", "(s1 - s0)", "s1"),
        wrong(
            "flow: drift of the other sign",
            f"{_AT}.RectifiedFlow.drift_coefficient",
            "-1 / (1 - s)\n",
            "1 / (1 - s)\n",
        ),
        wrong("flow: d sigma^2 alone", f"{_AT}.RectifiedFlow.g2", "2 * s / (1 - s)\n", "2 * s\n"),
        wrong(
            "flow: variance preserved",
            f"{_AT}.RectifiedFlow.sigma",
            "return s\n",
            "return (2 * s - s**2).sqrt()\n",
        ),
        wrong(
            "flow: int g^2 without the drift's part",
            f"{_AT}.RectifiedFlow.integrated_g2",
            "2 * (s0 - s1) + ",
            "",
        ),
        wrong("flow: log of alpha / sigma", f"{_AT}.RectifiedFlow.log_snr", "return 2 *", "return"),
        wrong(
            "table of alpha, not of alpha-bar",
            f"{_AT}.DDPMTable._nodes",
            "-self.alphas_cumprod.log()",
            "-2 * self.alphas_cumprod.log()",
        ),
        wrong(
            "table: beta of a step, not of time",
            f"{_AT}.DDPMTable.g2",
            "len(self.alphas_cumprod) *",
            "1.0 *",
        ),
        wrong("table: one entry late", f"{_AT}.DDPMTable._piece", ".sub(1)", ".sub(2)"),
        wrong(
            "table: constant between entries",
            f"{_AT}.DDPMTable.integrated_beta",
            "- piece\n",
            "- piece + 0 * s.frac() - s * len(self.alphas_cumprod) + piece\n",
        ),
        wrong(
            "exploding: scaled to variance 1",
            f"{_AT}.VE.alpha",
            "return torch.ones_like(s)",
            "return (1 + self.sigma(s)**2).rsqrt()",
        ),
        wrong(
            "flow: signal of a preserved variance",
            f"{_AT}.RectifiedFlow.alpha",
            "return 1 - s",
            "return (1 - s**2).sqrt()",
        ),
        wrong(
            "sampler: level of the timestep before",
            "diffusion_envs.samplers.BoundDDIM.noising_times",
            "self.timesteps.double() + 1",
            "self.timesteps.double() + 2",
        ),
        wrong(
            "sampler: one step too far",
            f"{_AT}.DDPMTable.last_noising_time",
            "(beyond + 1)",
            "(beyond + 0)",
        ),
        wrong(
            "leading timesteps one late",
            f"{_AT}.DDPMTable.timesteps",
            "ratio + self.steps_offset\n",
            "ratio + self.steps_offset + 1\n",
            raises=ValueError,
        ),
        wrong(
            "trailing timesteps counted from 1",
            f"{_AT}.DDPMTable.timesteps",
            "int(mark) - 1",
            "int(mark)",
        ),
    ],
)
def schedules(setting: Setting) -> Iterator[Check]:
    """Five schedules: levels, coefficients, integrals; and the timesteps of a table's sampler."""
    s = setting.tensor(TIMES)
    for name, (schedule, (alpha, sigma)) in everyone().items():
        cuts = np.arange(1, ENTRIES) / ENTRIES if name == "table" else ()

        def k(u: np.ndarray, of: NoiseSchedule = schedule) -> np.ndarray:
            return of.drift_coefficient(setting.tensor(u)).double().cpu().numpy()

        def g2(u: np.ndarray, of: NoiseSchedule = schedule) -> np.ndarray:
            return of.g2(setting.tensor(u)).double().cpu().numpy()

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
