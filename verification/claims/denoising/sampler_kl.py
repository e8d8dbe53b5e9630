"""The path KL of a diffusion model's sampler: its weight at every stochasticity eta.

dX = (-f + (1 + eta^2) / 2 g^2 a) dt + eta g dW:
KL(P_th || P_pre) = (1 + eta^2)^2 / (8 eta^2) int g^2 E |a_th - a_pre|^2 dt, with weight 1/2
at eta = 1, its minimum, the same at eta and 1 / eta, and infinite at eta = 0. Over a step
int g^2 dt = log(abar_{k+1} / abar_k), exactly. DDIM's transitions have this KL up to O(h).

An eta in the sampler scales noise by eta and the score's part of the drift by (1 + eta^2) / 2, so
the same change of a score costs ((1 + eta^2) / (2 eta))^2 times the KL that it costs at eta = 1.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from diffusion_envs import denoising
from diffusion_envs.noise_schedules import DDPMTable, VPLinear
from diffusion_envs.samplers import DDIM, BoundDDIM
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import score_chains as closed
from verification.closed_form.gaussian_law import Normal, chain, kl
from verification.cubature import mean

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 3.1; DDIM, arXiv 2010.02502, equation 12'

ETAS = (0.6, 1.7)
NODES = (0.0, 0.3, 0.45, 0.9)
START = Normal(np.array([0.4, -0.3]), np.diag([0.5, 0.8]))
KL_WEIGHT = 0.37
SCHEDULE = VPLinear(*closed.BETA)


def linear(setting: Setting, score: closed.LinearScore) -> ctrl.DeterministicPolicy:
    """The policy that plays this score."""
    matrix, vector = setting.tensor(score.matrix), setting.tensor(score.vector)
    return ctrl.DeterministicPolicy(lambda t, x: x @ matrix.T + vector)


def simulated(
    setting: Setting, sde: ctrl.ControlledSDE, grid: ctrl.TimeGrid, solver: ctrl.Solver
) -> ctrl.Paths:
    """Quadrature paths from START under SCORE: two nodes are exact for squares."""
    widths = torch.cat([grid.steps.new_ones(1), grid.steps])
    both = ctrl.noise.gauss_hermite(setting.tensor(widths), nodes=2, noise=(2,))
    std = setting.tensor(np.sqrt(np.diag(START.covariance)))
    start = setting.tensor(START.mean) + std * both.increments[:, 0]
    noise = ctrl.Noise(both.increments[:, 1:], weights=both.weights)
    problem = ctrl.ControlProblem(sde, 1.0)
    return ctrl.simulate(problem, linear(setting, closed.SCORE), start, grid, solver, noise=noise)


def both_scores(setting: Setting, paths: ctrl.Paths) -> tuple[Tensor, Tensor]:
    """Score and reference at the left end of every step."""
    x, t = paths.states[:, :-1], paths.grid.nodes[0]
    policy, reference = linear(setting, closed.SCORE), linear(setting, closed.REFERENCE)
    return policy.mean(t, x), reference.mean(t, x)


def left_point(paths: ctrl.Paths) -> Tensor:
    """g^2 h of every step, g^2 at its left end."""
    return SCHEDULE.g2(1 - paths.grid.nodes[:-1]) * paths.grid.steps


def table(entries: int) -> DDPMTable:
    """The schedule as a model's table of alpha-bar."""
    alpha_bars = [closed.alpha_bar(i / entries) for i in range(1, entries + 1)]
    return DDPMTable(torch.tensor(alpha_bars, dtype=torch.float64), spacing="trailing")


def of_sampler(sampler: BoundDDIM, setting: Setting, paths: ctrl.Paths) -> Tensor:
    """The sampler's own transition KLs, [paths, steps]."""
    score, reference = both_scores(setting, paths)
    each = []
    for k in range(sampler.steps):
        step = torch.full((len(score),), k)
        each.append(sampler.transition_kl(step, score[:, k], reference[:, k]))
    return torch.stack(each, dim=1)


def pairs(nodes: np.ndarray | tuple[float, ...]) -> list[tuple[float, float]]:
    """The ends of every step."""
    return list(itertools.pairwise(nodes))


def ratio_of_kls(entries: int) -> float:
    """KL of DDIM's transition over that of the SDE for the same scores, at s = 1/2."""
    sampler = DDIM(ETAS[0]).bind(table(entries), entries // 2)
    k = entries // 4
    scores = torch.tensor([[0.3, -0.8]], dtype=torch.float64), torch.zeros(1, 2).double()
    of_chain = sampler.transition_kl(torch.tensor([k]), *scores)
    of_sde = denoising.path_kl_per_step(
        scores[0][:, None],
        scores[1][:, None],
        sampler.integrated_g2[k : k + 1],
        factor=sampler.kl_factor,
    )
    return float(of_chain / of_sde[:, 0])


def checks(setting: Setting) -> Iterator[Check]:
    """Two etas, on either side of 1, through every function that has the weight."""
    policy, reference = linear(setting, closed.SCORE), linear(setting, closed.REFERENCE)
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    for eta in ETAS:
        sde = denoising.generation_sde(SCHEDULE, eta)
        paths = simulated(setting, sde, grid, ctrl.EulerMaruyama())
        running = ctrl.girsanov.path_kl(sde, policy, reference, paths)
        laws = [
            chain(START, closed.euler_steps(score, eta, np.array(NODES)))
            for score in (closed.SCORE, closed.REFERENCE)
        ]
        yield expectation(
            f"path KL of the sampler's Euler chain, against its joint laws, eta = {eta}",
            mean(running, paths),
            kl(*laws),
        )
        factor = denoising.kl_factor(eta)
        yield expectation(f"twice the weight, eta = {eta}", factor, 2 * closed.weight(eta))
        steps = denoising.path_kl_per_step(
            *both_scores(setting, paths), left_point(paths), factor=factor
        )
        yield pathwise(
            f"KL of every step, summed on every path, eta = {eta}", steps.sum(1), running
        )
        cost = denoising.kl_running_reward(SCHEDULE, reference.mean, KL_WEIGHT, eta)
        rates = ctrl.running_rewards(ctrl.ControlProblem(sde, 1.0, running_reward=cost), paths)
        yield pathwise(
            f"running reward, integrated on every path, eta = {eta}",
            rates.sum(1),
            -KL_WEIGHT * running,
        )

    least = [denoising.kl_factor(eta) for eta in (1.0, *ETAS)]
    inverse = [denoising.kl_factor(1 / eta) for eta in (1.0, *ETAS)]
    yield bound("the weight is least at eta = 1, where it is 1/2", [1.0, 1.0, 1.0], least)
    yield expectation("the weight at eta and at 1 / eta", inverse, least)

    ends = setting.tensor([1 - t for t in NODES])
    exact = [np.log(closed.alpha_bar(1 - b) / closed.alpha_bar(1 - a)) for a, b in pairs(NODES)]
    integrals = SCHEDULE.integrated_g2(ends[1:], ends[:-1])
    yield expectation(
        "int g^2 dt of every step, against log(abar_{k+1} / abar_k)", integrals, exact
    )

    eta = ETAS[0]
    sampler = DDIM(eta).bind(table(30), 3)
    times = sampler.noising_times.numpy()
    paths = simulated(setting, sampler.sde, sampler.grid, sampler)
    laws = [
        chain(START, closed.ddim_steps(score, eta, times))
        for score in (closed.SCORE, closed.REFERENCE)
    ]
    own = of_sampler(sampler, setting, paths)
    yield expectation(
        "transition KLs of DDIM, against the joint laws of its chain",
        mean(own.sum(1), paths),
        kl(*laws),
    )
    other = ctrl.transitions.transition_kl(sampler.sde, sampler, policy, reference, paths)
    yield pathwise("transition KLs, by the sampler and by ctrl", own, other)
    exact = [np.log(closed.alpha_bar(b) / closed.alpha_bar(a)) for a, b in pairs(times)]
    yield expectation("int g^2 dt of every step of DDIM", sampler.integrated_g2, exact)

    grids = (24, 48, 96, 192)
    ratios = [ratio_of_kls(entries) for entries in grids]
    curve = [(2 / n, r - 1) for n, r in zip(grids, ratios, strict=True)]
    for order in (1, 2, 3):
        ratios = [(2**order * b - a) / (2**order - 1) for a, b in itertools.pairwise(ratios)]
    yield limit("DDIM's transition KL over the SDE's, steps to 0", ratios[0], 1.0, curve=curve)


MISTAKES = """
diffusion_envs.denoising.kl_factor
    weight not squared | return ((1 + eta**2) / (2 * eta)) ** 2 => return (1 + eta**2) / (2 * eta)
    weight without the 2 | return ((1 + eta**2) / (2 * eta)) => return ((1 + eta**2) / eta)
    eta for its square in the weight | return ((1 + eta**2) => return ((1 + eta)
    eta ignored in the weight | return ((1 + eta**2) / (2 * eta)) ** 2 => return 1.0
diffusion_envs.denoising.path_kl_per_step
    factor 1/2 dropped for a step | return 0.5 * factor => return factor
    mean over coordinates for their sum | .flatten(2).sum(2) => .flatten(2).mean(2)
    scores not squared | .square().flatten(2) => .abs().flatten(2)
diffusion_envs.denoising.kl_running_reward
    running reward that pays for the KL | return -0.5 * => return 0.5 *
    running reward at the noising time t | _noising_time(schedule, t, x) => torch.as_tensor(t)
    running reward at eta = 1 | kl_factor(eta) => kl_factor(1.0)
diffusion_envs.denoising.generation_sde
    score's part of the drift at eta = 1 | 0.5 * (1 + eta**2) * schedule => schedule
diffusion_envs.noise_schedules.VPLinear.integrated_beta
    integral of beta with its slope twice | + 0.5 * ( => + (
diffusion_envs.samplers.BoundDDIM.integrated_g2
    log alpha for log alpha-bar | self._log_alpha_bar.diff() => 0.5 * self._log_alpha_bar.diff()
diffusion_envs.samplers.BoundDDIM.transition_kl
    transition's KL without 1/2 | return 0.5 * self => return self
diffusion_envs.samplers.BoundDDIM._whitened
    variance for standard deviation | self.gain / self.std => self.gain / self.std.square()
diffusion_envs.samplers.BoundDDIM.score_gain
    eta ignored in the mean of DDIM | (self.sigma[1:].square() - self.std.square()) => self.sigma[1:].square()
diffusion_envs.samplers.BoundDDIM.std
    eta ignored in the noise of DDIM | return self.eta * self => return self
ctrl.transitions.transition_kl
    shift of a transition off by 1 % | (mean - mean_ref) => 1.01 * (mean - mean_ref)
shared
    eta ignored in the noise
    diffusion g^2 for g
    KL averaged over coordinates
"""
