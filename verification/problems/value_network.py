"""The value network V = c_skip r(xhat0) + c_out F: target, loss, and what each design leaves.

In the Gaussian model all of it has closed forms. The curves of the paper's Figure 2 are not known
to us; what can be said exactly is what each of its designs leaves to be learned.
"""

import torch
from torch import Tensor

from diffusion_envs.denoising import tweedie_mean
from diffusion_envs.exact import gaussian
from diffusion_envs.training.value_network import skip_weights
from verification.claim import Setting
from verification.closed_form.tilt import REWARD
from verification.closed_form.vp_gaussian import SHORT
from verification.problems.gaussian_diffusion import DATA, normal, quadratic, schedule

TIMES = [1.0, 0.62, 0.27, 0.0]  # noising times of the nodes; 0 is data


def denoised(setting: Setting, s: float, x: Tensor) -> Tensor:
    """E[Y_0 | Y_s = x], by Tweedie's formula."""
    rate, at = schedule(SHORT), setting.tensor(s)
    score = gaussian.score(normal(setting, DATA), rate, at, x)
    return tweedie_mean(x, score, rate.alpha(at), rate.sigma(at))


def value(setting: Setting, s: float) -> gaussian.Quadratic:
    """The pretrained model's value at s."""
    data, at, end = normal(setting, DATA), setting.tensor(s), setting.tensor(0.0)
    return quadratic(setting, REWARD).before(gaussian.transition(data, schedule(SHORT), at, end))


def residual(setting: Setting, s: float, x: Tensor) -> Tensor:
    """F* that makes V right: ((1 - c_skip) r(xhat0) - tr(QC)/2) / c_out."""
    at = setting.tensor(s)
    skip, out = skip_weights(at)
    posterior = gaussian.transition(normal(setting, DATA), schedule(SHORT), at, setting.tensor(0.0))
    reward_curvature = torch.trace(setting.tensor(REWARD.Q) @ posterior.covariance)
    guess = quadratic(setting, REWARD)(denoised(setting, s, x))
    return ((1 - skip) * guess - 0.5 * reward_curvature) / out
