"""Linear score policies: performance, its gradients, and the response to a shift.

Policies score + D x + c of a Gaussian model: E[r] has the gradients
dJ/dc = int g^2 E[grad V], dJ/dD = int g^2 E[grad V X'], V the policy's own value. With
D = 0 the mean moves by G c, the covariance stays, the path KL is |c|^2 int g^2 / 2, and G
has the eigenvalues (2w/q)(atan q - atan q alpha_T), q = sqrt(w - 1), for the data's w > 1,
atanh
with q = sqrt(1 - w) for w < 1, and 2 (1 - alpha_T) for w = 1.
"""

from collections.abc import Iterator

import numpy as np
import torch

from diffusion_envs.exact import gaussian, linear_policy
from verification.claim import Check, Setting, expectation
from verification.closed_form import linear_policy as policies
from verification.closed_form import tilt as exact
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import SHORT, VPGaussian
from verification.problems.duality import GAIN, NOISING_TIMES, SHIFT, performance
from verification.problems.gaussian_diffusion import (
    DATA,
    START,
    normal,
    quadratic,
    schedule,
)

SOURCE = "linear equations of the moments and of the value (Fleming & Rishel, chapter VI)"


def checks(setting: Setting) -> Iterator[Check]:
    """The response to a shift, a chain's performance, then performance and its gradients."""
    gain, shift = setting.tensor(GAIN), setting.tensor(SHIFT)
    at_one = VPGaussian(DATA.mean, np.diag([1.0, 0.38]), 2.0, 2.0)
    for name, p in (("w 1.52 and .38", SHORT), ("w 1 and .38", at_one)):
        data = normal(setting, Normal(p.mean, p.covariance))
        G = gaussian.shift_response(data, schedule(p), setting.tensor(1.0), setting.tensor(0.0))
        yield expectation(f"{name}: response to a shift, int F g^2", G, policies.response(p))

    steps = linear_policy.Steps.of_euler(schedule(SHORT), setting.tensor(NOISING_TIMES), 0.7)
    chain = linear_policy.chain(normal(setting, DATA), schedule(SHORT), steps, gain, shift)
    running = linear_policy.kl_cost(KL_WEIGHT * steps.cost, gain, shift)
    values = linear_policy.chain_values(chain, quadratic(setting, REWARD), running)
    exact_chain = exact.euler_chain(SHORT, NOISING_TIMES, 0.7)
    controls = [(step.score_gain * GAIN, step.score_gain * SHIFT) for step in exact_chain]
    yield expectation(
        "chain: J, against its moments",
        values[0].expectation(normal(setting, START)),
        exact.chain_performance(exact_chain, REWARD, KL_WEIGHT, controls, START),
    )

    for eta in (1.0, 0.7):
        yield expectation(
            f"eta {eta}: J, against moments",
            performance(setting, gain, shift, KL_WEIGHT, eta),
            policies.performance(SHORT, START, GAIN, SHIFT, REWARD, KL_WEIGHT, eta),
        )
    leaves = gain.clone().requires_grad_(), shift.clone().requires_grad_()
    gradients = torch.autograd.grad(performance(setting, *leaves, weight=0.0), leaves)
    slopes = policies.gradient(SHORT, START, GAIN, SHIFT, REWARD)
    yield expectation("gradient in the gain: int g^2 E[grad V X']", gradients[0], slopes[0])
    yield expectation("gradient in the shift: int g^2 E[grad V]", gradients[1], slopes[1])

    none, G = torch.zeros_like(gain), policies.response(SHORT)
    law = SHORT.posterior(1.0).of(START)
    shifted_law = Normal(law.mean + G @ SHIFT, law.covariance)
    cost = 0.5 * SHIFT @ SHIFT * SHORT.integrated_beta(1.0)
    yield expectation(
        "J of a shift: mean moved by G c, cost |c|^2 int g^2 / 2",
        performance(setting, none, shift),
        REWARD.expectation(shifted_law) - KL_WEIGHT * cost,
    )


MISTAKES = """
diffusion_envs.exact.gaussian.shift_response
    factor 2 of the substitution missing | return 2 * torch.where => return torch.where
    eigenvalue 1 not told from the others | torch.where(root == 0, a * torch.ones_like(root), inside) => inside
    response not scaled by the variance at the end | _noised_spectrum(data, schedule, s_to) / high => 1 / high
diffusion_envs.exact.linear_policy.continuous_value
    1/2 of the KL missing | -0.5 * weight * g2 => -weight * g2
    shift in the drift not multiplied by g^2 | g2 * (offset + shift) => (g2 * offset + shift)
    weights of Euler's method in the Runge-Kutta step | (a + 2 * b + 2 * c + d) / 6 => a
diffusion_envs.exact.gaussian.Quadratic.expectation
    variance of the state ignored in the reward | - 0.5 * variance => ``
diffusion_envs.exact.linear_policy.chain
    chain: policy's gain left out | (slope + gain) => slope
diffusion_envs.exact.linear_policy.kl_cost
    chain: sign of the KL's slope | -cost[:, None] * (gain.mT @ shift) => cost[:, None] * (gain.mT @ shift)
diffusion_envs.exact.linear_policy.chain_values
    chain: KL left out | .before(steps[k]) + now => .before(steps[k])
shared
    atan for atanh
    score's gain of the eta family without its 1/2
    full noise whatever eta is
"""
