"""Theorem 3.1 of "Score as Action": the KL between controlled SDEs is an integral of the control.

With equal diffusions and initial laws, and u = sigma^{-1} (b - b_ref),
    KL(P || P_ref) = 1/2 E int_0^T |u|^2 dt
under the law of P. The Euler chains obey the same identity exactly, on the grid, so nothing has to
be small: the mean over all quadrature paths must equal the chain's own KL.

The Euler chain's KL differs from the continuous one by O(step): that limit is a claim of its own.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.closed_form import linear_path_kl as matrices
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.closed_form.gaussian_law import kl, log_density
from verification.cubature import gaussian_start, mean, point_start
from verification.problems import HORIZON, NODES, grid, ornstein_uhlenbeck

P = closed.OrnsteinUhlenbeck()

TIME_INTEGRAL = [
    wrong(
        "last step missing",
        "ctrl.paths.time_integral",
        "steps, rates)).sum(1)",
        "steps, rates))[:, :-1].sum(1)",
    ),
    wrong(
        "step size missing",
        "ctrl.paths.time_integral",
        "(rates * as_like(grid.steps, rates))",
        "rates",
    ),
    wrong(
        "step size squared",
        "ctrl.paths.time_integral",
        "as_like(grid.steps, rates)",
        "as_like(grid.steps, rates).square()",
    ),
    wrong(
        "mean over time for the integral",
        "ctrl.paths.time_integral",
        "steps, rates)).sum(1)",
        "steps, rates)).mean(1)",
    ),
]


def sampled_policy(policy: ctrl.Policy, reference: ctrl.Policy) -> ctrl.Policy:
    """The one whose law the expectation of the theorem is under."""
    return policy


def curved(setting: Setting) -> tuple[ctrl.ControlledSDE, ctrl.Paths]:
    """Two coordinates, drift and diffusion not linear, both of them the state's functions."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a - 0.3 * x.sin(), lambda t, x: 0.5 + 0.2 * x.tanh())
    nodes = ctrl.TimeGrid(setting.tensor([0.0, 0.15, 0.6]))
    noise = ctrl.noise.gauss_hermite(nodes.steps, nodes=3, noise=(2,))
    problem, start = ctrl.ControlProblem(sde, 0.6), point_start(noise, [0.4, -0.9])
    return sde, ctrl.simulate(problem, CURVED, start, nodes, noise=noise)


CURVED = ctrl.DeterministicPolicy(lambda t, x: 0.8 - 1.1 * x.flip(1) + 0.6 * t)
CURVED_REFERENCE = ctrl.DeterministicPolicy(lambda t, x: -0.4 * x)


def curved_densities(states: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """log p / p_ref of every step [paths, steps] of ``curved``, from two normal densities."""
    each = []
    for k, h in enumerate(np.diff(nodes)):
        x, after = states[:, k], states[:, k + 1]
        own = 0.8 - 1.1 * x[:, ::-1] + 0.6 * nodes[k] - 0.3 * np.sin(x)
        other = -0.4 * x - 0.3 * np.sin(x)
        covariance = np.eye(2) * ((0.5 + 0.2 * np.tanh(x)) ** 2 * h)[:, None, :]
        one, ref = (
            log_density(after, x + h * own, covariance),
            log_density(after, x + h * other, covariance),
        )
        each.append(one - ref)
    return np.stack(each, axis=1)


@claim(
    statement="""
        KL(P || P_ref) = 1/2 E int |u|^2 dt, u = (b - b_ref) / sigma, under P; and on every path
        log dP/dP_ref = int u . dW + 1/2 int |u|^2 dt, the ratio of the transition densities.
        Both forms have the KL as their mean, and on a path they differ: by int u . dW, of variance
        2 KL. The roles of P and P_ref cannot be exchanged.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 3.1; Karatzas & Shreve 3.5.1',
    wrongs=[
        wrong("factor 1/2 dropped", "ctrl.girsanov.path_kl", "0.5 * energy", "energy"),
        wrong("KL off by 1 %", "ctrl.girsanov.path_kl", "0.5 * energy", "0.505 * energy"),
        wrong(
            "diffusion not squared",
            "ctrl.sde.ControlledSDE.whiten",
            "sigma.masked_fill(silent, 1)",
            "sigma.masked_fill(silent, 1).sqrt()",
        ),
        wrong(
            "diffusion ignored",
            "ctrl.sde.ControlledSDE.whiten",
            "shift / sigma.masked_fill(silent, 1)",
            "shift",
        ),
        wrong(
            "mean over coordinates for their sum",
            "ctrl.girsanov.path_kl",
            ".square().sum(-1)",
            ".square().mean(-1)",
        ),
        wrong(
            "sign of the stochastic integral",
            "ctrl.girsanov.log_ratio",
            "return ito_sum(u, brownian) +",
            "return -ito_sum(u, brownian) +",
        ),
        wrong(
            "Brownian motion of P taken for that of P_ref",
            "ctrl.girsanov.log_ratio",
            "+ time_integral(0.5 *",
            "- time_integral(0.5 *",
        ),
        wrong(
            "increments of the reference's Brownian motion",
            "ctrl.girsanov.log_ratio",
            "ito_sum(u, brownian)",
            "ito_sum(u, brownian + u * paths.grid.steps[:, None])",
        ),
        wrong(
            "control of the wrong sign: log dP_ref/dP",
            "ctrl.girsanov.controls",
            "sde.drift_at(t, x, a) - sde.drift_at(t, x, a_ref)",
            "sde.drift_at(t, x, a_ref) - sde.drift_at(t, x, a)",
        ),
        wrong(
            "roles exchanged: paths of the reference",
            "verification.claims.girsanov.sampled_policy",
            "return policy",
            "return reference",
        ),
        wrong(
            "state at the right end of a step",
            "ctrl.girsanov.controls",
            "x = paths.states[:, k]",
            "x = paths.states[:, k + 1]",
        ),
        wrong(
            "time at the right end of a step",
            "ctrl.girsanov.controls",
            "common_grid(paths).nodes[:-1]",
            "common_grid(paths).nodes[1:]",
        ),
        wrong(
            "uneven grid treated as uniform",
            "ctrl.paths.time_integral",
            "* as_like(grid.steps, rates)",
            "* as_like(grid.steps, rates).mean()",
        ),
        *TIME_INTEGRAL,
        wrong(
            "sum over paths for their mean",
            "ctrl.estimate.Estimate.of",
            "(weights * sample).sum()",
            "sample.sum()",
        ),
        wrong(
            "variance of the state forgotten",
            "verification.closed_form.ornstein_uhlenbeck.euler_path_kl",
            " + slope**2 * variance",
            "",
        ),
        wrong(
            "transition's KL without 1/2",
            "ctrl.transitions.transition_kl",
            "0.5 * ((mean",
            "((mean",
        ),
        wrong(
            "shift of a transition not squared",
            "ctrl.transitions.log_ratio",
            "(scale * z + 0.5 * shift)",
            "(scale * z + 0.5)",
        ),
    ],
)
def path_kl(setting: Setting) -> Iterator[Check]:
    """Theorem 3.1 on quadrature paths, and pathwise."""
    problem, policy, reference = ornstein_uhlenbeck(P)
    start, noise = gaussian_start(grid(setting), P.mean, P.std, nodes=4)
    sampler = sampled_policy(policy, reference)
    paths = ctrl.simulate(problem, sampler, start, grid(setting), noise=noise)
    exact = closed.euler_path_kl(P, np.array(NODES))
    yield expectation(
        "the KL by a recursion of moments, against that of the joint Gaussian laws",
        exact,
        kl(*closed.euler_laws(P, np.array(NODES))),
    )
    running = ctrl.girsanov.path_kl(problem.dynamics, policy, reference, paths)
    yield expectation(
        "running form: its mean, against the chain's KL",
        ctrl.Estimate.of(running, quadrature_weights=paths.weights).mean,
        exact,
    )
    ratio = ctrl.girsanov.log_ratio(problem.dynamics, policy, reference, paths)
    yield expectation("log-ratio: its mean, against the chain's KL", mean(ratio, paths), exact)
    yield expectation(
        "variance of what the two forms differ by, against 2 KL",
        mean((ratio - running).square(), paths),
        2 * exact,
    )
    densities = torch.zeros_like(ratio)
    for k, h in enumerate(grid(setting).steps.tolist()):
        x, after = paths.states[:, k, 0], paths.states[:, k + 1, 0]
        gap = after - x - h * (P.reference_shift - P.reference_pull * x)
        own = after - x - h * (P.shift - P.pull * x)
        densities = densities + (gap.square() - own.square()) / (2 * P.noise**2 * h)
    yield pathwise("log-ratio, against transition densities on every path", ratio, densities)

    sde, paths = curved(setting)
    ratio = ctrl.girsanov.log_ratio(sde, CURVED, CURVED_REFERENCE, paths)
    nodes = paths.grid.nodes.double().numpy()
    steps = curved_densities(paths.states.double().numpy(), nodes)
    yield pathwise("log-ratio, coefficients not linear, on every path", ratio, steps.sum(1))
    euler = ctrl.EulerMaruyama()
    step_ratios = ctrl.transitions.log_ratio(sde, euler, CURVED, CURVED_REFERENCE, paths)
    yield pathwise("log-ratio of every transition, coefficients not linear", step_ratios, steps)
    running = ctrl.girsanov.path_kl(sde, CURVED, CURVED_REFERENCE, paths)
    chain = ctrl.transitions.transition_kl(sde, euler, CURVED, CURVED_REFERENCE, paths).sum(1)
    yield pathwise("running form, against the transitions' KLs on every path", running, chain)


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


@claim(
    statement="""
        As the step h tends to 0 the Euler chains' KL tends to 1/2 E int |u|^2 dt of the SDEs, in
        closed form for Ornstein-Uhlenbeck processes, with an error c h: left-point sums are of
        first order, whatever the scheme's order is. A number computed on a grid is the grid's.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 3.1',
    why_double="ctrl.linear is double precision; an error of order h is lost in float32's",
    wrongs=[
        wrong("factor 1/2 dropped", "ctrl.girsanov.path_kl", "0.5 * energy", "energy"),
        wrong("KL off by 1 %", "ctrl.girsanov.path_kl", "0.5 * energy", "0.505 * energy"),
        wrong("KL off by 1e-6", "ctrl.girsanov.path_kl", "0.5 * energy", "0.5000005 * energy"),
        wrong(
            "variance of a step not its size: h^2",
            "ctrl.solvers.EulerMaruyama.transition",
            "math.sqrt(h)",
            "h",
        ),
        wrong(
            "drift off by 1 %",
            "ctrl.solvers.EulerMaruyama.transition",
            "states + h * sde",
            "states + 1.01 * h * sde",
        ),
        wrong(
            "the cross term's sign",
            "verification.closed_form.ornstein_uhlenbeck.path_kl",
            "- 2 * slope * constant",
            "+ 2 * slope * constant",
        ),
        wrong(
            "start at its mean, in the closed form",
            "ctrl.linear.gaussian._path_kl",
            " + lift(P, (0, 1, 0, 1))",
            "",
        ),
        wrong(
            "no noise in the moments of the closed form",
            "ctrl.linear.gaussian._path_kl",
            "(twice * covariance)",
            "(0 * twice * covariance)",
        ),
        wrong(
            "factor 1/2 dropped in the closed form",
            "ctrl.linear.gaussian._path_kl",
            "energy = 0.5 * (u.mT @ u)",
            "energy = (u.mT @ u)",
        ),
        wrong(
            "sigma' sigma for sigma sigma' in the closed form",
            "ctrl.linear.gaussian._path_kl",
            "lift(G @ G.mT,",
            "lift((G.mT @ G)[..., : G.shape[-2], : G.shape[-2]],",
        ),
        wrong(
            "sigma' for its inverse in the closed form",
            "ctrl.linear.gaussian._path_kl",
            "u = inverse @ shift",
            "u = G.mT @ shift",
            raises=ValueError,
        ),
        wrong(
            "moments of the reference in the closed form",
            "ctrl.linear.gaussian._path_kl",
            "lift(torch.cat([A1, b1",
            "lift(torch.cat([A0, b0",
        ),
    ],
)
def path_kl_limit(setting: Setting) -> Iterator[Check]:
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
