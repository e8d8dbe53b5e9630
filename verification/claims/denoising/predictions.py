"""Each prediction to the score and back, at levels that preserve variance and that do not.

For x = alpha x0 + sigma eps the predictions eps, x0, v = alpha eps - sigma x0 and the score
are each an affine function of any other given x: score = -eps / sigma
= (alpha x0 - x) / sigma^2 = -(alpha v + sigma x) / (sigma (alpha^2 + sigma^2)). The last
denominator is sigma only if alpha^2 + sigma^2 = 1.
"""

from collections.abc import Iterator

import numpy as np

from diffusion_envs import denoising
from verification.claim import Check, Setting, pathwise

SOURCE = "Salimans & Ho 2022, arXiv 2202.00512, appendix D; Song et al. 2021"

ALPHAS, SIGMAS = [0.9, 0.6, 1.0], [0.3, 0.8, 0.45]  # only the second preserves variance
DATA = np.array([[0.7, -1.2], [0.35, 0.9], [-0.55, 1.6]])
NOISE = np.array([[-0.4, 0.65], [1.15, -0.8], [0.25, -1.7]])


def checks(setting: Setting) -> Iterator[Check]:
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


MISTAKES = r"""
diffusion_envs.denoising.score_from_epsilon
    eps not divided by sigma | return -epsilon / sigma => return -epsilon
    sign of eps | return -epsilon => return epsilon
    variance for standard deviation, to and fro | epsilon / sigma\n => epsilon / sigma.square()\n
diffusion_envs.denoising.epsilon_from_score
    sign of eps, on the way back | return -sigma => return sigma
    variance for standard deviation, to and fro | return -sigma => return -sigma.square()
diffusion_envs.denoising.score_from_x0
    sigma for sigma^2 | sigma.square() => sigma
    x0 not scaled by the signal | alpha * x0 => x0
    alpha-bar for alpha | alpha * x0 => alpha.square() * x0
    x0 taken for eps | (alpha * x0 - states) / sigma.square() => -x0 / sigma
diffusion_envs.denoising.score_from_v
    v taken for eps | (alpha * v + sigma * states) => v
    v of the other sign | alpha * v + => -alpha * v +
    alpha and sigma exchanged in v | (alpha * v + sigma => (sigma * v + alpha
    variance preserving taken for granted | ` * (alpha.square() + sigma.square())` => ``
diffusion_envs.denoising.v_from_score
    v of the other sign, on the way back | epsilon - sigma * tweedie => epsilon + sigma * tweedie
shared
    sigma for sigma^2 in the denoised state
"""
