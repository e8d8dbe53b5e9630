"""Duality of KL-regularised control: nothing beats J*, and what others lose is b KL.

J(a) = E[r(X_T)] - b KL(P_a || P_pre) = J* - b KL(P_a || P*), so that no policy exceeds J*,
and a policy that is off by d loses (b/2) E_a int g^2 |d|^2: second order, b times the path
KL. On an Euler chain J* - J = 1/2 sum E d'(Q_{k+1} + b/std^2) d, d the control's error,
Q_{k+1} the curvature of -V*, exactly and for errors of any size.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from torch import Tensor

import ctrl
from diffusion_envs.exact import gaussian, linear_policy
from verification.claim import Check, Setting, bound, expectation
from verification.closed_form import linear_policy as policies
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import SHORT
from verification.cubature import mean, point_start
from verification.problems.duality import GAIN, NOISING_TIMES, SHIFT, performance
from verification.problems.gaussian_diffusion import (
    DATA,
    START,
    STATES,
    normal,
    quadratic,
    schedule,
)

SOURCE = "Donsker-Varadhan duality; Girsanov; linear-quadratic control for the chain"


def best(setting: Setting) -> Tensor:
    """J* from the start."""
    value = gaussian.optimal_value(
        normal(setting, DATA),
        schedule(SHORT),
        quadratic(setting, REWARD),
        KL_WEIGHT,
        setting.tensor(1.0),
        setting.tensor(0.0),
    )
    return value.expectation(normal(setting, START))


def chain_performance(setting: Setting, eta: float, controls: list) -> Tensor:
    """J of a policy on the Euler chain, by production paths on quadrature noise."""
    data, rate = normal(setting, DATA), schedule(SHORT)
    times = setting.tensor(NOISING_TIMES)
    steps = linear_policy.Steps.of_euler(rate, times, eta)
    grid = ctrl.TimeGrid(1.0 - times)
    each = [tuple(setting.tensor(one) for one in control) for control in controls]

    def action(t: Tensor, x: Tensor) -> Tensor:
        k = int((grid.nodes - t).abs().argmin())
        pretrained = gaussian.score(data, rate, times[k], x)
        return pretrained + (x @ each[k][0].mT + each[k][1]) / steps.score_gain[k]

    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=2, noise=(2,))
    problem = linear_policy.problem(data, rate, quadratic(setting, REWARD), KL_WEIGHT, eta)
    start = point_start(noise, STATES[0])
    paths = ctrl.simulate(problem, ctrl.DeterministicPolicy(action), start, grid, noise=noise)
    return mean(ctrl.returns_to_go(problem, paths)[:, 0], paths)


def checks(setting: Setting) -> Iterator[Check]:
    """The optimum and others on chains of two noises; three policies in continuous time."""
    for eta in (1.0, 0.6):
        chain = exact.euler_chain(SHORT, NOISING_TIMES, eta)
        values, optimum = exact.chain_optimum(chain, REWARD, KL_WEIGHT)
        highest = float(values[0](np.array(STATES[0])))
        got = chain_performance(setting, eta, optimum)
        yield expectation(f"eta {eta}: J of the chain's optimum is V*", got, highest)
        for size in (1.0, -0.4):
            perturbed = [(K + size * GAIN, k + size * SHIFT) for K, k in optimum]
            lost = exact.chain_regret(chain, values, optimum, perturbed, KL_WEIGHT, STATES[0])
            less = chain_performance(setting, eta, perturbed)
            yield expectation(f"eta {eta}: loss of a policy off by {size}", highest - less, lost)
            yield bound(f"eta {eta}: a policy off by {size} is no better", less, highest)

    top = best(setting)
    for name, size in (("half", 0.5), ("the", 1.0), ("minus the", -1.0)):
        gain, shift = size * GAIN, size * SHIFT
        lost = policies.regret(
            SHORT,
            START,
            gain,
            shift,
            KL_WEIGHT,
            partial(exact.optimal_value, SHORT, REWARD, KL_WEIGHT),
        )
        performed = performance(setting, setting.tensor(gain), setting.tensor(shift))
        yield expectation(f"J* - J of {name} change is b KL(P || P*)", top - performed, lost)


MISTAKES = """
diffusion_envs.denoising.kl_running_reward
    1/2 of the KL missing | -0.5 * weight => -weight
    KL rewarded instead of paid | -0.5 * weight => 0.5 * weight
    g for g^2 in the path KL | schedule.g2(_noising_time(schedule, t, x))
        => schedule.g2(_noising_time(schedule, t, x)).sqrt()
diffusion_envs.denoising.kl_factor
    eta family's factor of the KL not squared | (2 * eta)) ** 2 => (2 * eta))
diffusion_envs.exact.linear_policy.continuous_value
    KL of the mean state only | ` + torch.trace(gain @ p @ gain.mT)` => ``
    KL not counted at all | + paid => ``
    drift without the policy's gain | (slope + gain) => slope
diffusion_envs.exact.gaussian.optimal_value
    b inverted in the value | reward.curvature / kl_weight, reward.slope / kl_weight
        => reward.curvature * kl_weight, reward.slope * kl_weight
verification.closed_form.linear_policy.regret
    regret by the KL to the pretrained model | gain + best.Q / b, shift - best.l / b => gain, shift
shared
    log-partition term missing: V* too large
"""
