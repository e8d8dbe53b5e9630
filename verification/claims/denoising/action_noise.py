"""Drawn scores: noise that continuous time averages out, and a grid does not.

Scores drawn with standard deviation std and held over steps h leave the mean alone and
widen the generated covariance by h int F g^4 std^2 F' dt + O(h^2): exploration vanishes
with the steps unless std^2 grows like 1/h. On the grid the states' KL from a shift c is
sum g^2 h |c|^2 / (2 (1 + g^2 std^2 h)), which tends to the path KL; the actions' KL is
|c|^2 / (2 std^2) at every step and tends to infinity.

A score drawn as N(mean, std^2) and held over a step adds g^4 std^2 h^2 to the step's variance: O(h)
over all steps, so the law of the limit is that of the mean. Three divergences part company: that of
the actions (N |change|^2 / (2 std^2), infinite in the limit), that of the states on the grid (less
than the path KL), and the path KL, to which the second tends.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from ctrl.policy import policy_kl
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import samplers as closed
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, VPGaussian
from verification.cubature import affine_end
from verification.problems import gaussian_data, generation, table, vp_linear

SOURCE = "by hand; the relaxed dynamics are those of Wang, Zariphopoulou & Zhou 2020"

PLANE = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6)
UNEVEN = np.array([0.0, 0.13, 0.4, 0.55, 0.9])  # RL time
MODEL = VPGaussian(np.array([0.8]), np.array([[0.5]]))  # beta from 0.1 to 20
STD, SHIFT = 0.5, 0.7
TABLES = Setting()  # samplers' tables are in double precision on the CPU, whatever runs


def chain(count: int, std: float, shift: float = 0.0) -> closed.Chain:
    """Production's Euler steps whose score is drawn around score + shift."""
    data = gaussian_data(TABLES, Normal(*_law(MODEL)))
    steps = Steps.of_euler(vp_linear(MODEL), 1 - ctrl.uniform_grid(1.0, count).nodes)
    steps_of_chain = linear_policy.chain(
        data,
        vp_linear(MODEL),
        steps,
        0 * data.covariance,
        torch.full_like(data.mean, shift),
        action_std=torch.full_like(steps.std, std),
    )
    return closed.Chain(
        *(
            v.reshape(-1).numpy()
            for v in (steps_of_chain.matrix, steps_of_chain.shift, steps_of_chain.covariance)
        )
    )


def _law(model: VPGaussian) -> tuple[np.ndarray, np.ndarray]:
    return model.mean, model.covariance


def end_variance(one: closed.Chain) -> float:
    """Variance of the generated data."""
    return float(one.moments(MODEL.noised(1.0))[1][-1])


def checks(setting: Setting) -> Iterator[Check]:
    """Drawn actions through simulate and through the recursion, against numpy; their limits."""
    data = gaussian_data(setting, Normal(*_law(PLANE)))
    problem, pretrained = generation(data, vp_linear(PLANE))
    drawn = ctrl.GaussianPolicy(pretrained.mean, STD)
    grid = ctrl.TimeGrid(torch.tensor(UNEVEN, dtype=torch.float64))
    euler_end = affine_end(problem, drawn, grid, data.mean)
    want = closed.whole(
        closed.drawn_steps(Normal(*_law(PLANE)), closed.Nodes.of(PLANE, 1 - UNEVEN), STD)
    )
    yield expectation("Euler, four uneven steps: covariance", euler_end.C, want.C)
    yield expectation("Euler, four uneven steps: slope", euler_end.F, want.F)

    sampler = DDIM(0.8).bind(table(PLANE, 4, spacing="trailing", final_is_one=True), 4)
    problem, pretrained = generation(data, sampler.table, 0.8)
    drawn = ctrl.GaussianPolicy(pretrained.mean, STD)
    ddim_end = affine_end(problem, drawn, sampler.grid, data.mean, sampler)
    nodes = closed.Nodes.of(PLANE, sampler.noising_times.tolist())
    want = closed.whole(closed.drawn_steps(Normal(*_law(PLANE)), nodes, STD, eta=0.8))
    yield expectation("DDIM, four steps: covariance", ddim_end.C, want.C)

    counts = (50, 100, 200, 400, 800)
    widened = [n * (end_variance(chain(n, STD)) - end_variance(chain(n, 0.0))) for n in counts]
    exact = []
    for n in counts[:2]:
        s = np.linspace(1, 0, n + 1)
        plain = closed.euler_chain(MODEL, s)
        more = plain.variance + (closed.rates(MODEL, s[:-1]) / n * STD) ** 2
        wide = closed.Chain(plain.slope, plain.offset, more)
        exact.append(n * (end_variance(wide) - end_variance(plain)))
    yield expectation("N times the variance added, 50 and 100 steps", widened[:2], exact)
    yield limit(
        "the same as published, 50, 100 and 400 steps",
        [widened[0], widened[1], widened[3]],
        [0.5718, 0.5673, 0.5644],
    )
    tends = float(extrapolated(widened))
    yield limit("N times the variance added, many steps", tends, closed.inflation(MODEL, STD))

    grid_kls = []
    for n in counts:
        base, shifted = chain(n, STD), chain(n, STD, SHIFT)
        grid_kls.append(shifted.kl(base, MODEL.noised(1.0)))
    beta = closed.rates(MODEL, np.linspace(1, 0, 101)[:-1]) / 100
    exact_kl = float(np.sum(beta * SHIFT**2 / (2 * (1 + beta * STD**2))))
    yield expectation("KL of the states on a grid of 100 steps", grid_kls[1], exact_kl)
    path_kl = 0.5 * SHIFT**2 * MODEL.integrated_beta(1.0)
    tends = float(extrapolated(grid_kls))
    yield limit("KL of the states, many steps, is the path KL", tends, path_kl)

    x = setting.tensor([[0.4, -0.9], [1.3, 0.2]])
    change = setting.tensor([0.7, -0.4])
    moved_policy = ctrl.GaussianPolicy(lambda t, x: pretrained.mean(t, x) + change, STD)
    each = policy_kl(moved_policy, drawn, setting.tensor(0.3), x)
    yield pathwise("KL of one step's actions", each, [(0.7**2 + 0.4**2) / (2 * STD**2)] * 2)


MISTAKES = """
ctrl.policy.GaussianPolicy.act
    variance for standard deviation | float(self.std) => float(self.std) ** 2
    actions not drawn | alpha=float(self.std) => alpha=0.0
diffusion_envs.exact.linear_policy.chain
    recursion: drawn scores forgotten | variance + (steps => variance + 0 * (steps
    recursion: gain not squared | (steps.score_gain * action_std).square() => steps.score_gain * action_std.square()
    recursion: drawn anew within a step | (steps.score_gain * action_std).square()
        => steps.score_gain * action_std.square() * steps.std
    recursion: variance for standard deviation | * action_std).square() => * action_std.square()).square()
    recursion: 1 % too much | * action_std).square() => * action_std).square() * 1.01
ctrl.policy.GaussianPolicy.distribution
    actions' KL: half the change | Normal(mean, std, => Normal(mean / 2, std,
shared
    the same draw at every step
    g for g^2
    recursion: shift not scaled by the step
    variance for standard deviation in the density
"""
