"""The diffusion model of Gaussian data with a quadratic reward, as users would write it.

Every number of it has a closed form (``closed_form.vp_gaussian``, ``closed_form.tilt``); no two are
equal, none is 0 or 1.
"""

import numpy as np

from ctrl import linear
from diffusion_envs.exact import gaussian
from diffusion_envs.noise_schedules import VPLinear
from verification.claim import Setting
from verification.closed_form import tilt
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.vp_gaussian import LONG, VPGaussian

DATA = Normal(LONG.mean, LONG.covariance)
START = Normal(np.array([0.3, -0.2]), np.array([[1.2, 0.1], [0.1, 0.7]]))  # no one's marginal
STANDARD = Normal(np.zeros(2), np.eye(2))
STATES = [[0.9, -0.4], [-1.1, 0.35], [0.15, 1.7]]


def normal(setting: Setting, law: Normal) -> gaussian.Gaussian:
    """A normal law, as diffusion_envs takes it."""
    return gaussian.Gaussian(setting.tensor(law.mean), setting.tensor(law.covariance))


def ctrl_normal(law: gaussian.Gaussian) -> linear.Gaussian:
    """The same, as ctrl takes it."""
    return linear.Gaussian(law.mean, law.covariance)


def quadratic(setting: Setting, function: tilt.Quadratic) -> gaussian.Quadratic:
    """A reward or value, as diffusion_envs takes it."""
    return gaussian.Quadratic(*(setting.tensor(each) for each in function))


def schedule(p: VPGaussian) -> VPLinear:
    """The schedule of a closed form."""
    return VPLinear(p.beta_start, p.beta_end, p.horizon)
