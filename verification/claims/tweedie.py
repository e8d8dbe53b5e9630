"""Tweedie's formula, and the four names of what a denoising network predicts.

With x = alpha x0 + sigma eps, the mean of the data given x, that of the noise given x, and the
score of x are affine functions of each other; the score's slope gives the covariance. Nothing about
the data is assumed: a mixture is used besides Gaussian data.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion_envs import denoising
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, Wrong, claim, expectation, pathwise, wrong
from verification.closed_form.mixture import Mixture
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, Normal, VPGaussian
from verification.planting import Edit
from verification.problems import gaussian_data, vp_linear

MODEL = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6, 1.1)
S = 0.7  # noising time
STATES = np.array([[0.4, -0.9], [-1.3, 0.25], [2.1, 0.7]])
CURVATURE, SLOPE = np.array([[0.9, 0.2], [0.2, -0.3]]), np.array([0.6, -0.35])  # of a reward
_SCORE = "diffusion_envs.exact.gaussian.score_coefficients"
_TWEEDIE = "diffusion_envs.denoising.tweedie_mean"
_TRANSITION = "diffusion_envs.exact.gaussian.transition"


@claim(
    statement="""
        E[Y_0 | Y_s = x] = (x + sigma^2 score) / alpha for every law of the data, and
        Cov[Y_0 | x] = (sigma^2 / alpha^2) (I + sigma^2 grad score). For a reward that is not linear
        the reward of that mean is not the mean reward: a quadratic one misses it by tr(Q Cov) / 2,
        whatever x is.
        """,
    source="Efron 2011, Tweedie's formula; Robbins 1956",
    wrongs=[
        wrong("sigma for sigma^2", _TWEEDIE, "sigma.square()", "sigma"),
        wrong("sign of the score", _TWEEDIE, "states +", "states -"),
        wrong("signal not divided out", _TWEEDIE, "* score) / alpha", "* score)"),
        wrong("alpha-bar for alpha", _TWEEDIE, "* score) / alpha", "* score) / alpha.square()"),
        wrong("off by 1 %", _TWEEDIE, "sigma.square()", "1.01 * sigma.square()"),
        wrong(
            "score of the data, not of the noised data",
            _SCORE,
            "schedule.alpha(s)[..., None] * data",
            "data",
        ),
        wrong(
            "noise left out of the noised variance",
            "diffusion_envs.exact.gaussian._noised_spectrum",
            " + sigma.square()",
            " + 0 * sigma.square()",
        ),
        wrong("posterior of another eta", _TRANSITION, "signal ** (eta**2)", "signal ** 0.9"),
        wrong(
            "posterior covariance of the noised data", _TRANSITION, "last - values", "last + values"
        ),
        wrong(
            "variance of the state forgotten in a mean reward",
            "diffusion_envs.exact.gaussian.Quadratic.before",
            "- 0.5 * variance",
            "",
        ),
        wrong(
            "mean reward: without 1/2",
            "diffusion_envs.exact.gaussian.Quadratic.before",
            "- 0.5 * variance",
            "- variance",
        ),
    ],
)
def tweedie(setting: Setting) -> Iterator[Check]:
    """Gaussian data against the conditioning of joint normals, a mixture against quadrature."""
    schedule, data = vp_linear(MODEL), gaussian_data(setting, Normal(MEAN, COVARIANCE))
    s = setting.tensor(S)
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)

    def denoised(x: Tensor) -> Tensor:
        return denoising.tweedie_mean(x, gaussian.score(data, schedule, s, x), alpha, sigma)

    x = setting.tensor(STATES)
    posterior = MODEL.posterior(S)
    means = STATES @ posterior.F.T + posterior.f
    yield pathwise("Gaussian data: mean given the noised state", denoised(x), means)
    slope = torch.func.jacrev(lambda one: denoised(one[None])[0])(x[0])
    covariance = sigma.square() / alpha * slope
    yield pathwise("Gaussian data: covariance, by the score's slope", covariance, posterior.C)

    step = gaussian.transition(data, schedule, s, setting.tensor(0.0))
    yield pathwise("posterior: mean", x @ step.matrix.mT + step.shift, means)
    yield pathwise("posterior: covariance", step.covariance, posterior.C)
    reward = gaussian.Quadratic(
        setting.tensor(CURVATURE), setting.tensor(SLOPE), setting.tensor(0.15)
    )
    excess = reward(denoised(x)) - reward.before(step)(x)
    constant = 0.5 * np.trace(CURVATURE @ posterior.C) * np.ones(len(STATES))
    yield expectation("reward of the mean less mean reward, at every state", excess, constant)

    mixture, a, b = Mixture(), 0.8, 0.55  # alpha^2 + sigma^2 is not 1 here
    points = (-1.4, -0.35, 0.9)
    scores = setting.tensor([[mixture.score(p, a, b)] for p in points])
    posterior_mean = denoising.tweedie_mean(
        setting.tensor(points)[:, None], scores, setting.tensor(a), setting.tensor(b)
    )
    exact = [[mixture.posterior_mean(p, a, b)] for p in points]
    yield expectation(
        "a mixture: mean given the noised state, by quadrature", posterior_mean, exact
    )


ALPHAS, SIGMAS = [0.9, 0.6, 1.0], [0.3, 0.8, 0.45]  # only the second preserves variance
DATA = np.array([[0.7, -1.2], [0.35, 0.9], [-0.55, 1.6]])
NOISE = np.array([[-0.4, 0.65], [1.15, -0.8], [0.25, -1.7]])
_V = "diffusion_envs.denoising.score_from_v"


@claim(
    statement="""
        For x = alpha x0 + sigma eps the predictions eps, x0, v = alpha eps - sigma x0 and the score
        are each an affine function of any other given x: score = -eps / sigma
        = (alpha x0 - x) / sigma^2 = -(alpha v + sigma x) / (sigma (alpha^2 + sigma^2)). The last
        denominator is sigma only if alpha^2 + sigma^2 = 1.
        """,
    source="Salimans & Ho 2022, arXiv 2202.00512, appendix D; Song et al. 2021",
    wrongs=[
        wrong(
            "eps not divided by sigma",
            "diffusion_envs.denoising.score_from_epsilon",
            "return -epsilon / sigma",
            "return -epsilon",
        ),
        wrong(
            "sign of eps",
            "diffusion_envs.denoising.score_from_epsilon",
            "return -epsilon",
            "return epsilon",
        ),
        wrong(
            "sign of eps, on the way back",
            "diffusion_envs.denoising.epsilon_from_score",
            "return -sigma",
            "return sigma",
        ),
        wrong(
            "sigma for sigma^2",
            "diffusion_envs.denoising.score_from_x0",
            "sigma.square()",
            "sigma",
        ),
        wrong(
            "x0 not scaled by the signal",
            "diffusion_envs.denoising.score_from_x0",
            "alpha * x0",
            "x0",
        ),
        wrong(
            "alpha-bar for alpha",
            "diffusion_envs.denoising.score_from_x0",
            "alpha * x0",
            "alpha.square() * x0",
        ),
        wrong(
            "x0 taken for eps",
            "diffusion_envs.denoising.score_from_x0",
            "(alpha * x0 - states) / sigma.square()",
            "-x0 / sigma",
        ),
        wrong("v taken for eps", _V, "(alpha * v + sigma * states)", "v"),
        wrong("v of the other sign", _V, "alpha * v +", "-alpha * v +"),
        wrong("alpha and sigma exchanged in v", _V, "(alpha * v + sigma", "(sigma * v + alpha"),
        wrong(
            "variance preserving taken for granted", _V, " * (alpha.square() + sigma.square())", ""
        ),
        wrong(
            "v of the other sign, on the way back",
            "diffusion_envs.denoising.v_from_score",
            "epsilon - sigma * tweedie",
            "epsilon + sigma * tweedie",
        ),
        wrong("sigma for sigma^2 in the denoised state", _TWEEDIE, "sigma.square()", "sigma"),
        Wrong(
            "variance for standard deviation, to and fro",
            (
                Edit(
                    "diffusion_envs.denoising.score_from_epsilon",
                    "epsilon / sigma\n",
                    "epsilon / sigma.square()\n",
                ),
                Edit(
                    "diffusion_envs.denoising.epsilon_from_score",
                    "return -sigma",
                    "return -sigma.square()",
                ),
            ),
        ),
    ],
)
def predictions(setting: Setting) -> Iterator[Check]:
    """Each prediction to the score and back, at levels that preserve variance and that do not."""
    alpha, sigma = np.array(ALPHAS)[:, None], np.array(SIGMAS)[:, None]
    x, v = alpha * DATA + sigma * NOISE, alpha * NOISE - sigma * DATA
    score = -NOISE / sigma
    levels = setting.tensor(alpha), setting.tensor(sigma)
    kinds = (
        ("eps", NOISE, denoising.score_from_epsilon, denoising.epsilon_from_score),
        ("x0", DATA, denoising.score_from_x0, denoising.x0_from_score),
        ("v", v, denoising.score_from_v, denoising.v_from_score),
    )
    for name, prediction, there, back in kinds:
        computed_score = there(setting.tensor(x), setting.tensor(prediction), *levels)
        yield pathwise(f"score of {name}", computed_score, score)
        yield pathwise(
            f"{name} of the score",
            back(setting.tensor(x), setting.tensor(score), *levels),
            prediction,
        )
