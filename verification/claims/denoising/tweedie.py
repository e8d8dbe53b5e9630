"""Tweedie's formula: the posterior mean of the data, from the score.

E[Y_0 | Y_s = x] = (x + sigma^2 score) / alpha for every law of the data, and
Cov[Y_0 | x] = (sigma^2 / alpha^2) (I + sigma^2 grad score). For a reward that is not linear
the reward of that mean is not the mean reward: a quadratic one misses it by tr(Q Cov) / 2,
whatever x is.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion_envs import denoising
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.mixture import Mixture
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, VPGaussian
from verification.problems import gaussian_data, vp_linear

SOURCE = "Efron 2011, Tweedie's formula; Robbins 1956"

MODEL = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6, 1.1)
S = 0.7  # noising time
STATES = np.array([[0.4, -0.9], [-1.3, 0.25], [2.1, 0.7]])
CURVATURE, SLOPE = np.array([[0.9, 0.2], [0.2, -0.3]]), np.array([0.6, -0.35])  # of a reward


def checks(setting: Setting) -> Iterator[Check]:
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


MISTAKES = """
diffusion_envs.denoising.tweedie_mean
    sign of the score | states + => states -
    signal not divided out | * score) / alpha => * score)
    alpha-bar for alpha | * score) / alpha => * score) / alpha.square()
    off by 1 % | sigma.square() => 1.01 * sigma.square()
diffusion_envs.exact.gaussian._noised_spectrum
    noise left out of the noised variance | ` + sigma.square()` => ` + 0 * sigma.square()`
diffusion_envs.exact.gaussian.transition
    posterior of another eta | signal ** (eta**2) => signal ** 0.9
    posterior covariance of the noised data | last - values => last + values
diffusion_envs.exact.gaussian.Quadratic.before
    mean reward: without 1/2 | - 0.5 * variance => - variance
shared
    sigma for sigma^2 in the denoised state
    score of the data's mean
    variance of the state forgotten in a mean reward
"""
