"""The KL-tilted law: both of the library's tilts, and the maximum that they attain.

The law that maximises E[r(X)] - b KL(. || P) is P exp(r / b) / Z, and the maximum is
b log Z = b log E[exp(r / b)] under P. For P = N(m, S) and r = -x'Qx/2 + l'x + c it is
N(m*, S*), S* = (S^-1 + Q/b)^-1, m* = S* (S^-1 m + l/b).
"""

from collections.abc import Iterator

from ctrl import linear
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, expectation
from verification.closed_form import tilt as exact
from verification.closed_form.gaussian_law import kl
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.problems.gaussian_diffusion import DATA, normal, quadratic

SOURCE = "Gibbs' variational principle (Donsker & Varadhan 1975); Dai Pra 1991"
WHY_DOUBLE = "ctrl.linear solves in float64 only, and says so"


def checks(setting: Setting) -> Iterator[Check]:
    """Both production tilts, and the maximum that they attain."""
    b, (tilted, log_z) = KL_WEIGHT, exact.tilt(DATA, REWARD, KL_WEIGHT)
    law = gaussian.tilt(normal(setting, DATA), quadratic(setting, REWARD), b)
    yield expectation("mean of the tilt, against completed squares", law.mean, tilted.mean)
    yield expectation(
        "covariance of the tilt, against completed squares", law.covariance, tilted.covariance
    )
    data = linear.Gaussian(setting.tensor(DATA.mean), setting.tensor(DATA.covariance))
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    tilted_law = linear.tilt(data, Q, slope, b, c)
    yield expectation("ctrl: mean, against completed squares", tilted_law.law.mean, tilted.mean)
    yield expectation(
        "ctrl: covariance, against completed squares", tilted_law.law.covariance, tilted.covariance
    )
    yield expectation("ctrl: log Z, against completed squares", tilted_law.log_normaliser, log_z)
    value = linear.Quadratic(-Q, slope, c)
    gain = value(tilted_law.law.mean) - 0.5 * (Q * tilted_law.law.covariance).sum()
    divergence = linear.gaussian_kl(tilted_law.law, data)
    yield expectation("its E[r] - b KL is b log Z", gain - b * divergence, b * log_z)
    yield expectation("its KL from the data, against another formula", divergence, kl(tilted, DATA))


MISTAKES = """
diffusion_envs.exact.gaussian.tilt
    b for 1/b in the tilted mean | reward.gradient(data.mean)) / kl_weight => reward.gradient(data.mean)) * kl_weight
    b for 1/b in the tilted covariance | @ root / kl_weight => @ root * kl_weight
    precision of the data for its covariance | covariance = root @ solve(inner, root, _NO_MASS)
        => covariance = torch.linalg.inv(root @ solve(inner, root, _NO_MASS))
    the mean is shifted by the data's covariance instead of the tilt's | _apply(covariance, reward
        => _apply(data.covariance, reward
ctrl.linear.tilt
    gradient of the value not divided by b | times(S, value.gradient(m)) / b[..., None] => times(S, value.gradient(m))
shared
    b for 1/b
    outer b missing: log-normaliser in reward instead of nats
    direction of the KL
    log-partition term missing: seen in the value, not in its gradient
"""
