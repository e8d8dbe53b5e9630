"""What a sampler of N steps gets wrong, exactly: moments of the generated data.

Generating N(0.8, 0.5), beta from 0.1 to 20, exact score: Euler-Maruyama misses mean and
variance by O(1/N), at 50 steps by +0.0106 and +0.0152. DDIM moves the mean exactly at any
number of steps; it makes the variance too small, by 0.0858 (eta = 1) and 0.0435 (eta = 0),
both O(1/N), the former nearly so.

For Gaussian data every step is affine, so the law of a chain is a recursion of mean and variance.
Errors are compared with the same recursion in numpy at few steps (which sees what vanishes with
steps) and their order with 1 at many.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.samplers import Chain, Nodes, ddim_steps, euler_steps, uniform, whole
from verification.closed_form.vp_gaussian import VPGaussian
from verification.cubature import affine_end
from verification.problems import gaussian_data, generation, table, vp_linear

SOURCE = "moment recursions; schemes of arXiv 2011.13456 and 2010.02502"

DATA = Normal(np.array([0.8]), np.array([[0.5]]))
MODEL = VPGaussian(*DATA)  # beta from 0.1 to 20
UNEVEN = np.array([0.0, 0.3, 0.55, 0.7, 0.85, 0.96, 1.0])  # RL time
ETAS = {"DDPM (eta = 1)": 1.0, "DDIM (eta = 0)": 0.0}
PUBLISHED = {  # errors of mean and variance at 50 steps
    "Euler": (1.06e-2, 1.52e-2),
    "DDPM (eta = 1)": (0.0, -8.58e-2),
    "DDIM (eta = 0)": (0.0, -4.35e-2),
}
TABLES = Setting()  # samplers' tables are in double precision on the CPU, whatever runs


def simulated(setting: Setting, eta: float | None, steps: int) -> Normal:
    """Law of the generated data: DDIM's at this eta, Euler's if there is none."""
    data = gaussian_data(setting, DATA)
    if eta is None:
        problem, policy = generation(data, vp_linear(MODEL))
        grid = ctrl.uniform_grid(1.0, steps)
        return affine_end(problem, policy, grid, data.mean).of(MODEL.noised(1.0))
    sampler = DDIM(eta).bind(table(MODEL, steps, spacing="trailing", final_is_one=True), steps)
    problem, policy = generation(data, sampler.table, eta)
    return affine_end(problem, policy, sampler.grid, data.mean, sampler).of(MODEL.noised(1.0))


def recursion(eta: float | None, steps: int) -> tuple[float, float]:
    """Errors of mean and variance by production's tables of all steps at once."""
    data = gaussian_data(TABLES, DATA)
    if eta is None:
        schedule, s = vp_linear(MODEL), 1 - ctrl.uniform_grid(1.0, steps).nodes
        each = Steps.of_euler(schedule, s)
    else:
        schedule = table(MODEL, steps, spacing="trailing", final_is_one=True)
        sampler = DDIM(eta).bind(schedule, steps)
        gains = (sampler.state_gain, sampler.score_gain, sampler.std)
        each = Steps(sampler.noising_times, *gains, sampler.integrated_g2)
    chain = linear_policy.chain(data, schedule, each, 0 * data.covariance, 0 * data.mean)
    parts = (chain.matrix[:, 0, 0], chain.shift[:, 0], chain.covariance[:, 0, 0])
    mean, variance = Chain(*(part.numpy() for part in parts)).moments(MODEL.noised(1.0))
    return mean[-1] - 0.8, variance[-1] - 0.5


def checks(setting: Setting) -> Iterator[Check]:
    """Three samplers: coarse chains against numpy, published errors, orders and limits."""
    start = MODEL.noised(1.0)
    problem, policy = generation(gaussian_data(setting, DATA), vp_linear(MODEL))
    nodes = torch.tensor(UNEVEN, dtype=torch.float64)
    got = affine_end(problem, policy, ctrl.TimeGrid(nodes), setting.tensor(DATA.mean))
    want = whole(euler_steps(DATA, Nodes.of(MODEL, 1 - UNEVEN)))
    yield expectation("Euler, six uneven steps: slope", got.F, want.F)
    yield expectation("Euler, six uneven steps: offset", got.f, want.f)
    yield expectation("Euler, six uneven steps: noise", got.C, want.C)

    for name, eta in {"Euler": None, **ETAS}.items():
        law = simulated(setting, eta, 12)
        steps = euler_steps(DATA, uniform(MODEL, 12))
        if eta is not None:
            steps = ddim_steps(DATA, uniform(MODEL, 12), eta)
        want = whole(steps).of(start)
        yield expectation(f"{name}, 12 steps: mean", law.mean, want.mean)
        yield expectation(f"{name}, 12 steps: variance", law.covariance, want.covariance)
        if eta is not None:
            yield expectation(f"{name}, 12 steps: mean is that of the data", law.mean, DATA.mean)
        errors = recursion(eta, 50)
        yield limit(f"{name}, 50 steps: errors as published", errors, PUBLISHED[name])

    euler = [recursion(None, n) for n in (100, 200, 400, 800)]
    mean, variance = (np.array(one) for one in zip(*euler, strict=True))
    rates = (np.log2(mean[-2] / mean[-1]), np.log2(variance[-2] / variance[-1]))
    line = [(1 / n, e) for n, e in zip((100, 200, 400, 800), variance, strict=True)]
    yield limit("Euler: orders of mean and variance", np.array(rates), [1.0, 1.0], curve=line)
    left = np.array([extrapolated(list(mean)), extrapolated(list(variance))])
    yield limit("Euler: what is left with many steps", left, [0.0, 0.0], scale=0.5)
    for name, eta in ETAS.items():
        counts = (8000, 16000)
        coarse, fine = (recursion(eta, n)[1] for n in counts)
        yield limit(f"{name}: order of the variance", float(np.log2(coarse / fine)), 1.0)


MISTAKES = r"""
ctrl.solvers.EulerMaruyama.step_into
    rates at the right end of a step | t = as_like(t0 => t = as_like(t1
    state not updated by the drift | alpha=float(t1 - t0) => alpha=float(t1 - t0) ** 1.1
    Euler: noise of time, not of its root | torch.addcmul(states, sigma, increment
        => torch.addcmul(states, sigma, increment * float(t1 - t0)**0.5
ctrl.simulate._left_ends
    uneven grid taken for even | as_like(grid.nodes[:-1], start)
        => torch.linspace(float(grid.nodes[0]), 1.0, len(grid.nodes))[:-1].to(start)
    one step left out [ValueError] | zip(range(len(times)) => zip(range(len(times) - 1)
diffusion_envs.exact.linear_policy.Steps.of_euler
    g for g^2 | * g2 * h,\n            eta => * g2.sqrt() * h,\n            eta
    Euler's noise 1 % too large | eta * (g2 * h) => eta * (1.02 * g2 * h)
diffusion_envs.samplers.BoundDDIM.std
    DDIM: beta for beta-tilde | self.sigma[1:] / self.sigma[:-1] * kept => kept
shared
    DDIM: eta ignored
    mean: noise not taken out of the direction
    DDIM: sigma for sigma^2
    DDIM: alpha-bar for alpha
    score off by 1 %
    score of the data's mean
"""
