"""Theorem 3.1 of "Score as Action": the KL between controlled SDEs is an integral of the control.

With equal diffusions and initial laws, and u = sigma^{-1} (b - b_ref),
    KL(P || P_ref) = 1/2 E int_0^T |u|^2 dt
under the law of P. The Euler chains obey the same identity exactly, on the grid, so nothing has to
be small: the mean over all quadrature paths must equal the chain's own KL.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from verification.claim import Check, Setting, claim, expectation, pathwise, wrong
from verification.closed_form.ornstein_uhlenbeck import OrnsteinUhlenbeck, euler_path_kl
from verification.cubature import gaussian_start, mean
from verification.problems import NODES, grid, ornstein_uhlenbeck

P = OrnsteinUhlenbeck()


@claim(
    statement="""
        KL(P || P_ref) = 1/2 E int |u|^2 dt, u = (b - b_ref) / sigma, under P; and on every path
        log dP/dP_ref = int u . dW + 1/2 int |u|^2 dt, the ratio of the transition densities.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 3.1; Karatzas & Shreve 3.5.1',
    wrongs=[
        wrong("factor 1/2 dropped", "ctrl.girsanov.path_kl", "0.5 * energy", "energy"),
        wrong("KL off by 1 %", "ctrl.girsanov.path_kl", "0.5 * energy", "0.505 * energy"),
        wrong(
            "diffusion not squared",
            "ctrl.girsanov.path_kl",
            ".square().sum(-1)",
            ".square().sum(-1) * 0.7",
        ),
        wrong(
            "sign of the stochastic integral",
            "ctrl.girsanov.log_ratio",
            "return ito_sum(u, brownian) +",
            "return -ito_sum(u, brownian) +",
        ),
        wrong(
            "Brownian motion of the reference",
            "ctrl.girsanov.log_ratio",
            "+ time_integral(0.5 *",
            "- time_integral(0.5 *",
        ),
        wrong(
            "drift at the right end of a step",
            "ctrl.girsanov.controls",
            "x = paths.states[:, k]",
            "x = paths.states[:, k + 1]",
        ),
        wrong(
            "mean over time for the integral",
            "ctrl.paths.time_integral",
            "* grid.steps",
            "* grid.steps.mean()",
        ),
    ],
)
def path_kl(setting: Setting) -> Iterator[Check]:
    """Theorem 3.1 on quadrature paths, and pathwise."""
    problem, policy, reference = ornstein_uhlenbeck(P)
    start, noise = gaussian_start(grid(setting), P.mean, P.std, nodes=4)
    paths = ctrl.simulate(problem, policy, start, grid(setting), noise=noise)
    running = ctrl.girsanov.path_kl(problem.sde, policy, reference, paths)
    exact = euler_path_kl(P, np.array(NODES))
    yield expectation("running form: its mean, against the chain's KL", mean(running, paths), exact)
    ratio = ctrl.girsanov.log_ratio(problem.sde, policy, reference, paths)
    densities = torch.zeros_like(ratio)
    for k, h in enumerate(grid(setting).steps.tolist()):
        x, after = paths.states[:, k, 0], paths.states[:, k + 1, 0]
        gap = after - x - h * (P.reference_shift - P.reference_pull * x)
        own = after - x - h * (P.shift - P.pull * x)
        densities = densities + (gap.square() - own.square()) / (2 * P.noise**2 * h)
    yield pathwise("log-ratio, against transition densities on every path", ratio, densities)
