"""Where the KL-tilted optimum exists: the edge of integrability, and blow-up times.

Where the reward is not concave (Q has a negative eigenvalue) the tilt exists if and only if
S^-1 + Q/b > 0, and V* at noising time s if and only if C_s^-1 + Q/b > 0, C_s the covariance
of the data given Y_s: a weaker condition, so that V* may exist at s and be infinite further
from the data. Where they do not exist every function refuses them.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ctrl import linear
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, pathwise
from verification.closed_form.tilt import REWARD
from verification.closed_form.vp_gaussian import SHORT
from verification.problems.gaussian_diffusion import DATA, ctrl_normal, normal, quadratic, schedule

SOURCE = "Gaussian integrals; the blow-up of the Riccati equation of Dai Pra 1991"
WHY_DOUBLE = "ctrl.linear solves in float64 only, and says so"

# Where the tilt begins to exist: b above EDGE.
EDGE = float(-np.linalg.eigvals(DATA.covariance @ REWARD.Q).real.min())
WEIGHTS = [0.4 * EDGE, 0.9 * EDGE, 1.1 * EDGE, 1.7 * EDGE]


def accepted(call: Callable[..., object], *arguments: object) -> float:
    """1 if the call returns, 0 if it refuses with a ValueError."""
    try:
        call(*arguments)
    except ValueError:
        return 0.0
    return 1.0


def exists(covariance: np.ndarray, b: float) -> float:
    """1 if covariance^-1 + Q/b > 0, else 0."""
    return float((np.linalg.eigvalsh(np.linalg.inv(covariance) + REWARD.Q / b) > 0).all())


def checks(setting: Setting) -> Iterator[Check]:
    """Weights on both sides of the edge; times on both sides of the blow-up."""
    data, r = normal(setting, DATA), quadratic(setting, REWARD)
    want = [exists(DATA.covariance, b) for b in WEIGHTS]
    got = [accepted(gaussian.tilt, data, r, b) for b in WEIGHTS]
    yield pathwise("which weights have a tilt", got, want)
    Q, slope, _ = (setting.tensor(each) for each in REWARD)
    got = [accepted(linear.tilt, ctrl_normal(data), Q, slope, b) for b in WEIGHTS]
    yield pathwise("ctrl: which weights have a tilt", got, want)
    times, end = (0.1, 0.45, 0.7, 1.0), setting.tensor(0.0)
    got, want = [], []
    for b in WEIGHTS[:2]:
        for s in times:
            arguments = schedule(SHORT), r, b, setting.tensor(s), end
            got.append(accepted(gaussian.optimal_value, data, *arguments))
            want.append(exists(SHORT.posterior(s).C, b))
    yield pathwise("which times have a value", got, want)


MISTAKES = """
diffusion_envs.exact.gaussian._require_finite_mass
    no refusal | if not bool(least => if False and not bool(least
    condition on the data's covariance, with b forgotten | curvature @ root / kl_weight => curvature @ root
    only concave rewards accepted | torch.linalg.eigvalsh(inner) => torch.linalg.eigvalsh(curvature)
    condition on the determinant's sign alone | torch.linalg.eigvalsh(inner).min() => torch.linalg.slogdet(inner)[1]
diffusion_envs.exact.gaussian.optimal_value
    V* judged by the tilt's condition | torch.linalg.eigh(step.covariance.detach()) => data.spectrum
ctrl.linear.kl_control._require_tilt
    ctrl: no refusal | if not bool((least > margin(C.shape[-1], size)).all()) => if False
    ctrl: covariance not weighted | root.mT @ weighted @ root)[..., 0] + 1 => weighted)[..., 0] + 1
"""
