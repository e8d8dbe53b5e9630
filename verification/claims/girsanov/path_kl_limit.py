"""Theorem 3.1 in the limit of fine grids, against the closed form of the OU process.

As the step h tends to 0 the Euler chains' KL tends to 1/2 E int |u|^2 dt of the SDEs, in
closed form for Ornstein-Uhlenbeck processes, with an error c h: left-point sums are of
first order, whatever the scheme's order is. A number computed on a grid is the grid's.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import linear_path_kl as matrices
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.cubature import mean
from verification.problems import HORIZON, ornstein_uhlenbeck

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 3.1'
WHY_DOUBLE = "ctrl.linear is double precision; an error of order h is lost in float32's"

P = closed.OrnsteinUhlenbeck()


def marginal_paths(setting: Setting, steps: int) -> ctrl.Paths:
    """Many steps exactly: at each node a quadrature rule of the chain's own Gaussian law there.

    The running form needs no more of a path's law than that of the state at every node.
    """
    problem, policy, _ = ornstein_uhlenbeck(P)
    even = ctrl.uniform_grid(HORIZON, steps, dtype=setting.dtype, device=setting.device)
    rule = ctrl.noise.gauss_hermite(setting.tensor([1.0]), nodes=3)
    points, weights = rule.increments[:, 0], rule.weights
    assert weights is not None
    centre, marginal_std = setting.tensor(P.mean), setting.tensor(P.std)
    euler, states = ctrl.EulerMaruyama(), [centre + marginal_std * points]
    for t0, t1 in zip(even.nodes[:-1], even.nodes[1:], strict=True):
        x = states[-1]
        after, std = euler.transition(problem.dynamics, t0, t1, x, policy.mean(t0, x))
        centre = (weights @ after)[0]
        marginal_std = ((weights @ (after - centre).square())[0] + std.square()).sqrt()
        states.append(centre + marginal_std * points)
    return ctrl.Paths(torch.stack(states, 1), None, None, even, weights)


def chain_kl(setting: Setting, steps: int) -> float:
    """The chain's KL by production code."""
    problem, policy, reference = ornstein_uhlenbeck(P)
    paths = marginal_paths(setting, steps)
    return float(mean(ctrl.girsanov.path_kl(problem.dynamics, policy, reference, paths), paths))


def numbers(setting: Setting, p: closed.OrnsteinUhlenbeck) -> list[Tensor]:
    """The arguments of ``ctrl.linear.ornstein_uhlenbeck_path_kl``, but for the time."""
    parameters = (p.pull, p.shift, p.reference_pull, p.reference_shift, p.noise, p.mean, p.std**2)
    return [setting.tensor(value) for value in parameters]


def checks(setting: Setting) -> Iterator[Check]:
    """The chain's KL on refined grids, against the closed form."""
    exact = closed.path_kl(P, HORIZON)
    closed_kl = ctrl.linear.ornstein_uhlenbeck_path_kl(*numbers(setting, P), time=HORIZON)
    yield expectation("KL of linear SDEs by one matrix exponential, closed form", closed_kl, exact)
    law, reference, noise, start = [
        [setting.tensor(part) for part in parts]
        for parts in (matrices.LAW, matrices.REFERENCE, [matrices.NOISE], matrices.START)
    ]
    matrix_kl = ctrl.linear.linear_path_kl(
        ctrl.linear.Affine(*law),
        ctrl.linear.Affine(*reference),
        noise[0],
        ctrl.linear.Gaussian(*start),
        HORIZON,
    )
    exact_matrices = matrices.path_kl(HORIZON)
    yield expectation("the same with matrices, by equations of moments", matrix_kl, exact_matrices)
    grids = (16, 32, 64, 128)
    kls = [chain_kl(setting, steps) for steps in grids]
    curve = [(HORIZON / n, matrix_kl - exact) for n, matrix_kl in zip(grids, kls, strict=True)]
    order = math.log2((kls[2] - exact) / (kls[3] - exact)) if kls[2] != kls[3] else math.nan
    yield limit("local order of the chain's KL, from 64 to 128 steps", order, 1.0, curve=curve)
    while len(kls) > 1:
        power = 2 ** (5 - len(kls))
        kls = [(power * fine - coarse) / (power - 1) for coarse, fine in itertools.pairwise(kls)]
    yield limit("the chain's KL, extrapolated to steps of 0", kls[0], exact)


MISTAKES = """
ctrl.girsanov.path_kl
    KL off by 1e-6 | 0.5 * energy => 0.5000005 * energy
ctrl.solvers.EulerMaruyama.transition
    variance of a step not its size: h^2 | math.sqrt(h) => h
    drift off by 1 % | states + h * sde => states + 1.01 * h * sde
verification.closed_form.ornstein_uhlenbeck.path_kl
    the cross term's sign | - 2 * slope * constant => + 2 * slope * constant
ctrl.linear.gaussian._path_kl
    start at its mean, in the closed form | ` + lift(P, (0, 1, 0, 1))` => ``
    no noise in the moments of the closed form | (twice * covariance) => (0 * twice * covariance)
    factor 1/2 dropped in the closed form | energy = 0.5 * (u.mT @ u) => energy = (u.mT @ u)
    sigma' sigma for sigma sigma' in the closed form | lift(G @ G.mT,
        => lift((G.mT @ G)[..., : G.shape[-2], : G.shape[-2]],
    sigma' for its inverse in the closed form [ValueError] | u = inverse @ shift => u = G.mT @ shift
    moments of the reference in the closed form | lift(torch.cat([A1, b1 => lift(torch.cat([A0, b0
shared
    factor 1/2 dropped
    KL off by 1 %
"""
