"""The problems of the claims, as users would write them.

Constants are chosen for sensitivity: no zero, no one, no two equal, no symmetric state, no
stationary start, an uneven grid. A mistake that is invisible at 0 or 1 is visible here.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

import ctrl
from diffusion_envs.exact import gaussian, linear_policy
from diffusion_envs.noise_schedules import DDPMTable, NoiseSchedule, VPLinear
from verification.claim import Setting, array
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.ornstein_uhlenbeck import OrnsteinUhlenbeck
from verification.closed_form.samplers import integrated_rates
from verification.closed_form.vp_gaussian import VPGaussian

NODES = (0.0, 0.1, 0.35, 0.5, 0.9)  # uneven
HORIZON = NODES[-1]
NoiseKind = Literal["diagonal", "scalar", "general"]
"""How Brownian motions drive the coordinates of a ``ctrl.ControlledSDE``."""


def grid(setting: Setting) -> ctrl.TimeGrid:
    """The uneven grid of four steps."""
    return ctrl.TimeGrid(setting.tensor(NODES))


def ornstein_uhlenbeck(
    p: OrnsteinUhlenbeck,
) -> tuple[ctrl.ControlProblem, ctrl.DeterministicPolicy, ctrl.DeterministicPolicy]:
    """dX = a dt + noise dW without reward, the policy of law 1 and that of the reference law."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: p.noise)
    policy = ctrl.DeterministicPolicy(lambda t, x: p.shift - p.pull * x)
    reference = ctrl.DeterministicPolicy(lambda t, x: p.reference_shift - p.reference_pull * x)
    return ctrl.ControlProblem(sde, HORIZON), policy, reference


def gaussian_data(setting: Setting, law: Normal) -> gaussian.Gaussian:
    """A normal law, for production code."""
    return gaussian.Gaussian(setting.tensor(law.mean), setting.tensor(law.covariance))


def normal(law: gaussian.Gaussian) -> Normal:
    """A normal law out of production code."""
    mean, covariance = (array(v) for v in (law.mean, law.covariance))
    return Normal(mean, covariance)


def vp_linear(model: VPGaussian) -> VPLinear:
    """The schedule of a closed form, for production code."""
    return VPLinear(model.beta_start, model.beta_end, model.horizon)


def table(model: VPGaussian, entries: int, **options: bool | int | str) -> DDPMTable:
    """The schedule of a closed form with horizon 1, as a trained model would store it."""
    s = torch.arange(1, entries + 1, dtype=torch.float64) / entries
    alpha_bar = torch.from_numpy(np.exp(-integrated_rates(model, s.numpy())))
    return DDPMTable(alpha_bar, **options)  # pyright: ignore[reportArgumentType]  # options by name


def generation(
    data: gaussian.Gaussian,
    schedule: NoiseSchedule,
    eta: float = 1.0,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[ctrl.ControlProblem, ctrl.DeterministicPolicy]:
    """Generation without reward, and the policy score + gain x + shift."""
    no_gain, no_shift = torch.zeros_like(data.covariance), torch.zeros_like(data.mean)
    reward = gaussian.Quadratic(no_gain, no_shift, no_shift.sum())
    score = linear_policy.linear_score(
        data, schedule, no_gain if gain is None else gain, no_shift if shift is None else shift
    )
    problem = linear_policy.problem(data, schedule, reward, eta=eta)
    return problem, ctrl.DeterministicPolicy(score)
