"""The value network's target, loss and optimum.

For Gaussian data and a quadratic reward the pretrained model's value is
V = r(xhat0(x)) - tr(Q Cov)/2: the error of the denoised reward does not depend on the
state. So V = c_skip r(xhat0) + c_out F has the target
F* = ((1 - c_skip) r(xhat0) - tr(Q Cov)/2) / c_out, and V = r at the data end whatever F
is. The martingale loss is least at V, where it is int E Var(r | X_t) dt; any other
function, d away from it, pays int E d^2 dt more.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from diffusion_envs.exact import gaussian
from diffusion_envs.training.value_network import combine, martingale_loss, skip_weights
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import value_network as exact
from verification.closed_form.tilt import REWARD
from verification.closed_form.vp_gaussian import SHORT
from verification.problems.gaussian_diffusion import DATA, STATES, normal, quadratic, schedule
from verification.problems.value_network import TIMES, denoised, residual, value

SOURCE = '"Score as Action", arXiv 2502.01819, value network; Jia & Zhou 2022a, martingale loss'


def paths(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """States [paths, nodes, 2] of the exact chain, their weights, and the clock's steps."""
    data, rate = normal(setting, DATA), schedule(SHORT)
    noise = ctrl.noise.gauss_hermite(setting.tensor([1.0] * len(TIMES)), nodes=3, noise=(2,))
    assert noise.increments is not None
    assert noise.weights is not None
    times = setting.tensor(TIMES)
    start = gaussian.marginal(data, rate, times[0])
    x = start.mean + noise.increments[:, 0] @ torch.linalg.cholesky(start.covariance).mT
    states = [x]
    for k in range(len(TIMES) - 1):
        step = gaussian.transition(data, rate, times[k], times[k + 1])
        root = torch.linalg.cholesky(step.covariance)
        x = x @ step.matrix.mT + step.shift + noise.increments[:, k + 1] @ root.mT
        states.append(x)
    clock = rate.integrated_g2(times[1:], times[:-1])
    return torch.stack(states, 1), noise.weights, clock


def loss(
    setting: Setting, values: Tensor, states: Tensor, weights: Tensor, clock: Tensor
) -> Tensor:
    """The expected martingale loss of values at the nodes."""
    rewards = quadratic(setting, REWARD)(states[:, -1])
    returns = rewards.unsqueeze(1).expand_as(values)
    return (martingale_loss(values, returns, clock) * weights).sum()


def checks(setting: Setting) -> Iterator[Check]:
    """V, F* and the loss, at three times."""
    x, reward = setting.tensor(STATES), quadratic(setting, REWARD)
    for s in TIMES[:-1]:
        want = exact.value(SHORT, REWARD, s)(np.array(STATES))
        yield expectation(f"s {s}: V of the pretrained model", value(setting, s)(x), want)
        error = value(setting, s)(x) - reward(denoised(setting, s, x))
        yield expectation(
            f"s {s}: V - r(xhat0) is -tr(Q Cov)/2 in every state",
            error,
            np.full(3, -0.5 * np.trace(REWARD.Q @ SHORT.posterior(s).C)),
        )
        guess = reward(denoised(setting, s, x))
        whole = combine(setting.tensor(s), guess, residual(setting, s, x))
        yield pathwise(f"s {s}: c_skip r(xhat0) + c_out F* is V", whole, want)
    times = setting.tensor([0.0, 0.31, 0.83])
    yield pathwise(
        "c_skip is a cosine",
        skip_weights(times)[0],
        np.cos(0.5 * np.pi * np.array([0, 0.31, 0.83])),
    )
    arbitrary = setting.tensor([17.0, -5.0, 0.3])
    end = combine(setting.tensor(0.0), reward(denoised(setting, 0.0, x)), arbitrary)
    yield pathwise("at the data end V is r, whatever F is", end, REWARD(np.array(STATES)))

    states, weights, clock = paths(setting)
    along = torch.stack(
        [value(setting, s)(states[:, k]) for k, s in enumerate(TIMES[:-1])]
        + [reward(states[:, -1])],
        dim=1,
    )
    h = [SHORT.integrated_beta(a, b) for a, b in itertools.pairwise(TIMES)]
    least = sum(w * exact.irreducible(SHORT, REWARD, s) for w, s in zip(h, TIMES[:-1], strict=True))
    value_loss = loss(setting, along, states, weights, clock)
    yield expectation("loss of V: int E Var(r | X_t) dt", value_loss, least)
    reward_variance = REWARD.variance(SHORT.noised(0.0))
    left = [
        reward_variance - exact.value(SHORT, REWARD, s).variance(SHORT.noised(s))
        for s in TIMES[:-1]
    ]
    yield expectation("loss of V: int (Var r - Var V_t) dt", value_loss, float(np.dot(h, left)))
    tilted = states @ setting.tensor([0.4, -0.7]) + 0.3  # some function d of the state
    moments = [SHORT.noised(s) for s in TIMES[:-1]]
    w = np.array([0.4, -0.7])
    squares = [(w @ law.mean + 0.3) ** 2 + w @ law.covariance @ w for law in moments]
    yield expectation(
        "loss of V + d: int E d^2 dt more",
        loss(setting, along + tilted, states, weights, clock),
        least + float(np.dot(h, squares)),
    )


MISTAKES = """
diffusion_envs.training.value_network.combine
    network's output not weighted: no boundary condition | out * residual => residual
    weights exchanged | skip, out = (weights => out, skip = (weights
diffusion_envs.training.value_network.martingale_loss
    value left out of the martingale loss | (returns - values) => (returns - 0 * values)
    one-step residual instead of the return | (returns - values)[:, :-1].square() => values.diff(dim=1).square()
verification.problems.value_network.residual
    sign of the residual target's constant | - 0.5 * reward_curvature => + 0.5 * reward_curvature
shared
    steps not weighted by time
    right end of each step
    sine and cosine exchanged
    half a turn for a quarter
    standard deviation for variance in Tweedie's formula
    signal not divided out in Tweedie's formula
    variance of the state forgotten in a mean reward
    residual target without dividing by c_out
"""
