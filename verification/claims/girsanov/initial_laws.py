"""Path laws from different initial laws: the chain rule of the KL.

With initial laws rho and rho_ref, KL(P || P_ref) = KL(rho || rho_ref) + 1/2 E int |u|^2 dt,
the second under P from rho; on every path log rho / rho_ref (X_0) is added. Without it the
integral bounds no terminal KL: over a short time it is far below.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from verification.claim import Check, Setting, array, bound, expectation, pathwise
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.closed_form.gaussian_law import kl, log_density
from verification.cubature import gaussian_start, mean
from verification.problems import NODES, grid, ornstein_uhlenbeck

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 3.1 (which takes equal initial laws)'
WHY_DOUBLE = "ctrl.linear is double precision"

P = closed.OrnsteinUhlenbeck()
REFERENCE_START = (-0.2, 0.45)  # mean and standard deviation; P's are in closed.OrnsteinUhlenbeck


def started_from(law: tuple[float, float], reference: tuple[float, float]) -> tuple[float, float]:
    """The law from which the paths start."""
    return law


def checks(setting: Setting) -> Iterator[Check]:
    """Gaussian chains from different starts."""
    nodes = np.array(NODES)
    problem, policy, reference = ornstein_uhlenbeck(P)
    centre, std = started_from((P.mean, P.std), REFERENCE_START)
    start, noise = gaussian_start(grid(setting), centre, std, nodes=3)
    paths = ctrl.simulate(problem, policy, start, grid(setting), noise=noise)
    rho, rho_ref = (
        ctrl.linear.Gaussian(setting.tensor([m]), setting.tensor([[s**2]]))
        for m, s in ((P.mean, P.std), REFERENCE_START)
    )
    begins = float(ctrl.linear.gaussian_kl(rho, rho_ref))
    law = closed.euler_laws(P, nodes)[0]
    other = closed.euler_law(P.reference_pull, P.reference_shift, P.noise, *REFERENCE_START, nodes)
    path_bound = ctrl.girsanov.terminal_kl_bound(problem.dynamics, policy, reference, paths, begins)
    whole = float(mean(path_bound, paths))
    yield expectation("KL of the joint laws, different initial laws", whole, kl(law, other))

    x = array(paths.states[..., 0])
    ratio = ctrl.girsanov.log_ratio(problem.dynamics, policy, reference, paths)
    first = log_density(x[:, :1], law.of(0).mean, law.of(0).covariance) - log_density(
        x[:, :1], other.of(0).mean, other.of(0).covariance
    )
    joint = log_density(x, law.mean, law.covariance) - log_density(x, other.mean, other.covariance)
    yield pathwise("log-ratio of joint densities on every path", ratio + torch.tensor(first), joint)

    pairs = [(kl(law.of(-1), other.of(-1)), whole)]
    short = ctrl.TimeGrid(setting.tensor([0.0, 0.02, 0.05]))
    start, noise = gaussian_start(short, P.mean, P.std, nodes=3)
    paths = ctrl.simulate(problem, policy, start, short, noise=noise)
    path_bound = ctrl.girsanov.terminal_kl_bound(problem.dynamics, policy, reference, paths, begins)
    brief = array(short.nodes)
    ends = (
        closed.euler_laws(P, brief)[0].of(-1),
        closed.euler_law(P.reference_pull, P.reference_shift, P.noise, *REFERENCE_START, brief).of(
            -1
        ),
    )
    pairs.append((kl(*ends), float(mean(path_bound, paths))))
    smaller, larger = zip(*pairs, strict=True)
    yield bound("terminal KL <= initial KL + path KL", smaller, larger)


MISTAKES = """
ctrl.girsanov.terminal_kl_bound
    initial laws forgotten | paths) + initial_kl => paths)
    KL of the initial laws subtracted | + initial_kl => - initial_kl
    KL of the initial laws times the horizon | + initial_kl => + initial_kl * paths.grid.nodes[-1]
verification.claims.girsanov.initial_laws.started_from
    paths from the reference's initial law | return law => return reference
shared
    Gaussian KL in the other direction
    Gaussian KL without the means
    Gaussian KL, sign of the log-determinant
    Gaussian KL without 1/2
    factor 1/2 dropped
    sign of the stochastic integral
"""
