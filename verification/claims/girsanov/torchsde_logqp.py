"""The path KL of an independent program: torchsde's ``sdeint(..., logqp=True)``.

On the same increments torchsde's logqp equals our path KL on every path. It is the running
form 1/2 int |u|^2 dt: its mean is the KL, but on a path it is not log dP/dP_ref, from which
it differs by int u . dW, of variance 2 KL.

It is given the same prescribed increments, through its interface for Brownian motions, so states
and KLs are to agree on every path, to round-off.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchsde
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.cubature import gaussian_start, mean, point_start
from verification.problems import NODES, NoiseKind, grid, ornstein_uhlenbeck

SOURCE = "Li, Wong, Chen & Duvenaud 2020, Scalable gradients for SDEs, section 5; torchsde 0.2.6"

P = closed.OrnsteinUhlenbeck()
MATRIX = ((0.5, -0.3, 0.4), (0.2, 0.7, -0.6))
POLICY = ctrl.DeterministicPolicy(lambda t, x: 0.8 - 1.1 * x.flip(1) + 0.6 * t)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: -0.4 * x)


@dataclass
class Increment:
    """A Brownian motion of which torchsde asks one increment."""

    value: Tensor
    levy_area_approximation: str = "none"

    def __post_init__(self) -> None:
        self.shape, self.dtype, self.device = self.value.shape, self.value.dtype, self.value.device

    def __call__(self, begin: Tensor, end: Tensor, **_: bool) -> Tensor:
        """W(end) - W(begin)."""
        return self.value


class Equation(torch.nn.Module):
    """Drift f, diffusion g and the reference's drift h, in torchsde's interface."""

    sde_type = "ito"

    def __init__(self, setting: Setting, noise_type: str) -> None:
        super().__init__()
        self.noise_type, self.matrix = noise_type, setting.tensor(MATRIX)

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        """Drift of the law."""
        return 0.8 - 1.1 * x.flip(1) + 0.6 * t - 0.3 * x.sin()

    def h(self, t: Tensor, x: Tensor) -> Tensor:
        """Drift of the reference law."""
        return -0.4 * x - 0.3 * x.sin()

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        """Diffusion of both."""
        scale = 0.5 + 0.2 * x.tanh()
        return scale if self.noise_type == "diagonal" else self.matrix * scale[:, :, None]


class Linear(torch.nn.Module):
    """The Ornstein-Uhlenbeck laws of the closed form."""

    sde_type, noise_type = "ito", "diagonal"

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        """Drift of the law."""
        return P.shift - P.pull * x

    def h(self, t: Tensor, x: Tensor) -> Tensor:
        """Drift of the reference law."""
        return P.reference_shift - P.reference_pull * x

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        """Diffusion of both."""
        return torch.full_like(x, P.noise)


def by_torchsde(
    equation: torch.nn.Module, start: Tensor, nodes: Tensor, increments: Tensor
) -> tuple[Tensor, Tensor]:
    """States at the nodes, [paths, nodes, dim], and torchsde's log-ratio of every step."""
    if equation.noise_type == "diagonal":  # the log-ratio is one coordinate more, without noise
        increments = torch.nn.functional.pad(increments, (0, 1), value=0.3)
    states, ratios = [start], []
    for k, (t0, t1) in enumerate(itertools.pairwise(nodes)):
        motion: Any = Increment(increments[:, k])  # all that torchsde asks of its own class
        both_ends, ratio = torchsde.sdeint(
            equation, states[-1], torch.stack([t0, t1]), bm=motion,
            method="euler", dt=2.0, logqp=True,
        )  # fmt: skip  # one step: dt is cut at the last of the times
        states.append(both_ends[-1])
        ratios.append(ratio[0])
    return torch.stack(states, 1), torch.stack(ratios, 1)


def curved(setting: Setting, noise: NoiseKind) -> tuple[ctrl.ControlledSDE, ctrl.Paths]:
    """The equation of ``Equation``, written for ctrl, on quadrature paths."""
    matrix = setting.tensor(MATRIX)

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        scale = 0.5 + 0.2 * x.tanh()
        return scale if noise == "diagonal" else matrix * scale[:, :, None]

    count, width = (None, 2) if noise == "diagonal" else (3, 3)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - 0.3 * x.sin(), diffusion, noise, count)
    nodes = ctrl.TimeGrid(setting.tensor([0.0, 0.15, 0.6]))
    noise_rule = ctrl.noise.gauss_hermite(nodes.steps, nodes=3, noise=(width,))
    problem, start = ctrl.ControlProblem(sde, 0.6), point_start(noise_rule, [0.4, -0.9])
    return sde, ctrl.simulate(problem, POLICY, start, nodes, noise=noise_rule)


def checks(setting: Setting) -> Iterator[Check]:
    """Diagonal and general noise, coefficients not linear; a linear law with a closed form."""
    for noise in ("diagonal", "general"):
        sde, paths = curved(setting, noise)
        assert paths.increments is not None
        states, ratios = by_torchsde(
            Equation(setting, noise), paths.states[:, 0], paths.grid.nodes, paths.increments
        )
        yield pathwise(f"states of both programs, {noise} noise", paths.states, states)
        running = ctrl.girsanov.path_kl(sde, POLICY, REFERENCE, paths)
        yield pathwise(f"path KL and logqp, {noise} noise", running, ratios.sum(1))

    problem, policy, reference = ornstein_uhlenbeck(P)
    start, noise = gaussian_start(grid(setting), P.mean, P.std, nodes=3)
    paths = ctrl.simulate(problem, policy, start, grid(setting), noise=noise)
    _, ratios = by_torchsde(Linear(), start, paths.grid.nodes, noise.increments)
    logqp = ratios.sum(1)
    running = ctrl.girsanov.path_kl(problem.dynamics, policy, reference, paths)
    yield pathwise("path KL and logqp, linear law", running, logqp)
    exact = closed.euler_path_kl(P, np.array(NODES))
    yield expectation("mean of logqp, against the chain's KL", mean(logqp, paths), exact)
    ratio = ctrl.girsanov.log_ratio(problem.dynamics, policy, reference, paths)
    yield expectation(
        "variance of log dP/dP_ref - logqp, against 2 KL",
        mean((ratio - logqp).square(), paths),
        2 * exact,
    )


MISTAKES = """
verification.claims.girsanov.torchsde_logqp.Linear.g
    torchsde given the variance for the diffusion | P.noise) => P.noise**2)
ctrl.girsanov.log_ratio
    running form for the log-ratio | return ito_sum(u, brownian) + => return
ctrl.sde.ControlledSDE.diffuse
    transposed diffusion in a step | "pij,pj->pi", sigma, increment => "pij,pj->pi", sigma.flip(-1), increment
shared
    factor 1/2 dropped
    KL off by 1 %
    diagonal noise not squared
    sigma' for its inverse
    as many Brownian motions as coordinates
    mean over coordinates for their sum
    state at the right end of a step
    time at the right end of a step
    uneven grid treated as uniform
    a step of Euler-Maruyama twice as long
"""
