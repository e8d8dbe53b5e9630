"""Figure 1 of "Score as Action": trained at one number of steps, used at another.

Trained at N_0 steps, used at N. A policy that is smooth in time: regret proportional to
(1/N_0 - 1/N)^2, so that at N_0/2 over that at 2 N_0 tends to 4, and is below 1 % of the
gain. A table with an entry a step, pretrained elsewhere: it realises all of its shift at
N_0/2, half at 2 N_0, a quarter at 4 N_0. A loss of half of a gain when steps are doubled is
thus a failure to generalise across time, not an error of integration.

Two kinds of policy, two outcomes. One that is smooth in time loses little, and twice as much change
of steps costs four times the regret: the best shift of an N-step sampler is c + kappa / N + ..., so
the regret at N of what was trained at N_0 is kappa^2 (1/N_0 - 1/N)^2 times half the curvature. One
that is a table, an entry for each step trained on and the pretrained score elsewhere, keeps about
all of its effect at half the steps and half of it at twice the steps.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

import ctrl
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian, Quadratic
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.samplers import Chain, best_euler_shift, response_of_steps
from verification.closed_form.vp_gaussian import VPGaussian
from verification.problems import gaussian_data, generation, table, vp_linear

SOURCE = 'Figure 1 of "Score as Action", arXiv 2502.01819 (the setting); expansions by hand'

DATA = Normal(np.array([0.8]), np.array([[0.5]]))
MODEL = VPGaussian(*DATA)  # beta from 0.1 to 20
CURVATURE, SLOPE, KL_WEIGHT = 0.9, 0.6, 0.1  # of the reward, and its price
TABLES = Setting()  # samplers' tables are in double precision on the CPU, whatever runs
COUNTS = (25, 50, 100, 200, 400, 800)


def objective(steps: Steps, curvature: float, slope: float, shift: float) -> float:
    """Mean reward less the price of the path KL, of these steps under score + shift."""
    data, gain = gaussian_data(TABLES, DATA), TABLES.tensor([[0.0]])
    change = TABLES.tensor([shift])
    chain = linear_policy.chain(data, vp_linear(MODEL), steps, gain, change)
    numbers = Chain(*(v.reshape(-1).numpy() for v in (chain.matrix, chain.shift, chain.covariance)))
    means, variances = (TABLES.tensor(v)[:, None] for v in numbers.moments(MODEL.noised(1.0)))
    reward = Quadratic(TABLES.tensor([[curvature]]), TABLES.tensor([slope]), TABLES.tensor(0.0))
    running = linear_policy.kl_cost(KL_WEIGHT * steps.cost, gain, change)
    paid = running.expectation(Gaussian(means[:-1], variances[:-1, :, None])).sum()
    return (reward.expectation(Gaussian(means[-1], variances[-1, :, None])) + paid).item()


def best(steps: Steps, curvature: float = CURVATURE, slope: float = SLOPE) -> tuple[float, float]:
    """The best shift, and minus the second derivative, of an objective that is quadratic in it."""
    below, here, above = (objective(steps, curvature, slope, shift) for shift in (-0.5, 0.0, 0.5))
    bend = -4 * (above + below - 2 * here)
    return (above - below) / bend, bend


def euler(count: int) -> Steps:
    """Euler-Maruyama, equal steps."""
    return Steps.of_euler(vp_linear(MODEL), 1 - ctrl.uniform_grid(1.0, count).nodes)


def ddim(count: int, eta: float) -> Steps:
    """DDIM, equal steps; the cost is that of a path KL at eta = 1."""
    sampler = DDIM(eta).bind(table(MODEL, count, spacing="trailing", final_is_one=True), count)
    gains = (sampler.state_gain, sampler.score_gain, sampler.std)
    return Steps(sampler.noising_times, *gains, sampler.integrated_g2)


def regret_ratio(bests: list[tuple[float, float]]) -> float:
    """Regret at half over that at twice the steps of the one in the middle."""
    at_half, trained, at_twice = bests
    lost = [0.5 * bend * (c - trained[0]) ** 2 for c, bend in (at_half, at_twice)]
    return lost[0] / lost[1]


def entry(t: Tensor, trained: int) -> float:
    """Entry of a table with one a step: 1 at the steps it was trained on, 0 at other times."""
    place = float(t) * trained
    return 1.0 if abs(place - round(place)) < 1e-3 else 0.0


def realised(setting: Setting, trained: int, used: int) -> float:
    """Shift of the mean of production's Euler paths by a table: paths with it less without it."""
    data = gaussian_data(setting, DATA)
    problem, pretrained = generation(data, vp_linear(MODEL))
    which = setting.tensor([[0.0], [1.0]])
    policy = ctrl.DeterministicPolicy(
        lambda t, x: pretrained.mean(t, x) + which * entry(t, trained)
    )
    still = ctrl.Noise(setting.tensor(np.zeros((2, used, 1))))
    start = setting.tensor([[0.3], [0.3]])
    grid = ctrl.uniform_grid(1.0, used)
    without, with_table = ctrl.simulate_end(problem, policy, start, grid, noise=still)[:, 0]
    return (with_table - without).item()


def checks(setting: Setting) -> Iterator[Check]:
    """Both arms of the figure, by production's recursions and paths, against numpy."""
    optima = {n: best(euler(n)) for n in COUNTS}
    want = {n: best_euler_shift(MODEL, n, CURVATURE, SLOPE, KL_WEIGHT) for n in (25, 50, 100)}
    shifts = [optima[n][0] for n in want]
    yield expectation(
        "smooth, Euler: best shift at 25, 50, 100 steps", shifts, [c for c, _ in want.values()]
    )
    bends = [optima[n][1] for n in want]
    yield expectation(
        "smooth, Euler: curvature of the objective", bends, [b for _, b in want.values()]
    )
    gain = 0.5 * optima[100][1] * optima[100][0] ** 2
    fraction = 1 - 0.5 * optima[100][1] * (optima[100][0] - optima[50][0]) ** 2 / gain
    exact = 1 - (want[50][0] / want[100][0] - 1) ** 2
    yield expectation(
        "smooth, Euler: fraction of the gain kept from 50 to 100 steps", fraction, exact
    )
    ratios = [regret_ratio([optima[n] for n in COUNTS[k : k + 3]]) for k in range(4)]
    tends = float(extrapolated(ratios))
    yield limit("smooth, Euler: regret at half over twice the steps, many steps", tends, 4.0)
    ratios = [
        regret_ratio([best(ddim(n, eta), 0.0, 1.0) for n in (25, 50, 100)]) for eta in (1.0, 0.0)
    ]
    yield limit("smooth, DDPM and DDIM: the same around 50 steps", ratios, [4.60, 4.49])

    shifts_by_steps = {
        (trained, used): realised(setting, trained, used)
        for trained in (25, 50)
        for used in (25, 50, 100)
    }
    got = [shifts_by_steps[50, used] / shifts_by_steps[50, 50] for used in (25, 100)]
    whole = response_of_steps(MODEL, 50, 50)
    exact = [response_of_steps(MODEL, used, 50) / whole for used in (25, 100)]
    yield expectation("table of 50 steps: fraction realised at 25 and 100", got, exact)
    halves = [
        shifts_by_steps[trained, 2 * trained] / shifts_by_steps[trained, trained]
        for trained in (25, 50)
    ]
    yield limit("table: fraction realised at twice the steps", float(extrapolated(halves)), 0.5)
    quarter = shifts_by_steps[25, 100] / shifts_by_steps[25, 25]
    yield limit("table: fraction realised at four times the steps", quarter, 0.25)


MISTAKES = """
diffusion_envs.exact.linear_policy.kl_cost
    price of the KL without 1/2 | -0.5 * cost * shift => -cost * shift
    KL paid, not charged | -0.5 * cost * shift => 0.5 * cost * shift
diffusion_envs.exact.linear_policy.Steps.of_euler
    KL per step, not per unit of time | kl_factor(eta) * g2 * h => kl_factor(eta) * g2
    g for g^2 in the KL | kl_factor(eta) * g2 * h => kl_factor(eta) * g2.sqrt() * h
    half the score's weight | 0.5 * (1 + eta**2) * g2 => 0.5 * g2
diffusion_envs.exact.gaussian.Quadratic.__call__
    reward's curvature without 1/2 | -0.5 * _quad => -_quad
verification.claims.denoising.step_transfer.entry
    table taken for a function of time | else 0.0 => else 1.0
ctrl.simulate._left_ends
    table read one step late | times = as_like(grid.nodes[:-1] => times = as_like(grid.nodes[1:]
shared
    Euler: rates at the right end
    recursion: shift not scaled by the step
    DDIM: sigma for sigma^2
    DDIM: alpha-bar for alpha
    drift of the noising process not reversed
"""
