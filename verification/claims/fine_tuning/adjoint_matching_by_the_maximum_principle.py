"""Adjoint matching where the control enters the diffusion: gradients of chains, exactly.

With a and A the first and second derivatives of a path's remaining reward in its state, the
control moving with it, - E int H(t, X, u, a, A) dt, H = r + b . a + tr(sigma sigma' A) / 2,
has the gradient of -J in u at any control; so has - E int (r + b . a) dt + a . sigma dW. At
the optimum both are critical, and the second is with lean adjoints, whose control is held.

Three Euler steps of a linear equation in two dimensions, noise scaled by state and action, on
Gauss-Hermite nodes: gradients of the losses against derivatives of the chain's value, at a control
that is not optimal and at the one that is.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import adjoint_matching as am
from ctrl import q_learning
from ctrl.linear import LinearQuadratic, Quadratic
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import adjoint_matching as exact
from verification.cubature import mean, point_start

SOURCE = "the stochastic maximum principle (Peng 1990); cf. arXiv 2604.08580"
WHY_DOUBLE = "the answers are float64"
PRECISION = torch.float64


def problem() -> ctrl.ControlProblem:
    """The problem of the closed form, in double precision."""
    matrices = {
        "A": exact.A,
        "B": exact.B,
        "sigma": exact.SIGMA,
        "M": exact.M,
        "N": exact.N,
        "R": exact.R,
        "p": exact.P,
        "l": exact.L,
        "H": exact.LAST,
        "h": exact.TILT,
        "f": exact.DRIFT,
        "C": exact.C,
        "D": exact.D,
    }
    tensors = {name: torch.as_tensor(each, dtype=torch.float64) for name, each in matrices.items()}
    return LinearQuadratic(**tensors, discount=exact.DISCOUNT).problem(float(exact.NODES[-1]))


class Affine:
    """u = K_k x + k_k over step k, with its parameters."""

    def __init__(self, gains: np.ndarray, offsets: np.ndarray):
        self.gains, self.offsets = (
            torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (gains, offsets)
        )
        self.policy = ctrl.DeterministicPolicy(self.mean)

    def mean(self, t: Tensor, x: Tensor) -> Tensor:
        """The control at the node before t."""
        k = (t >= torch.as_tensor(exact.NODES[1:-1])).sum()
        return x @ self.gains[k].T + self.offsets[k]

    def gradient(self, loss: Tensor, paths: ctrl.Paths) -> np.ndarray:
        """Derivatives of the mean loss."""
        each = torch.autograd.grad(mean(loss, paths), (self.gains, self.offsets))
        return torch.cat([one.flatten() for one in each]).numpy()


def rolled_out(control: Affine) -> ctrl.Paths:
    """All paths of the chain under a control, with their weights."""
    grid = ctrl.TimeGrid(torch.as_tensor(exact.NODES))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3, noise=(2,))
    start = point_start(noise, exact.START.tolist())
    return ctrl.simulate(problem(), control.policy, start, grid, noise=noise)


def checks(setting: Setting) -> Iterator[Check]:
    """Exact expectations through the losses."""
    control = Affine(exact.GAINS, exact.OFFSETS)
    paths = rolled_out(control)
    slopes = exact.gradient(exact.GAINS, exact.OFFSETS)
    both = am.adjoints(problem(), control.policy, paths)
    loss = am.matching_loss(problem(), control.policy, paths, both)
    yield expectation("gradient by second-order adjoints", -control.gradient(loss, paths), slopes)
    loss = am.noise_matching_loss(problem(), control.policy, paths, both.first)
    yield expectation("gradient by the noise", -control.gradient(loss, paths), slopes)

    best = Affine(*exact.optimum())
    paths, scale = rolled_out(best), float(np.abs(slopes).max())
    both = am.adjoints(problem(), best.policy, paths)
    loss = am.matching_loss(problem(), best.policy, paths, both)
    yield expectation("critical at the optimum", best.gradient(loss, paths), np.zeros(9), scale)
    lean = am.lean_adjoints(problem(), paths)
    loss = am.noise_matching_loss(problem(), best.policy, paths, lean)
    yield expectation("with lean adjoints too", best.gradient(loss, paths), np.zeros(9), scale)

    V = Quadratic(
        -torch.as_tensor(exact.LAST), -torch.as_tensor(exact.TILT), torch.zeros(()).double()
    )
    x, u = paths.states[:7, 1], 0.8 - paths.states[:7, 2, :1]
    t = paths.grid.nodes[0]
    slope, curved = V.gradient(x), V.hessian.expand(7, 2, 2)
    H = am.hamiltonian(problem(), t, x, u, slope, curved)
    q = q_learning.q_rate(problem(), lambda t, x: V(x), t, x, u)
    yield pathwise("H of a value is its q-rate and discount V", H, q + exact.DISCOUNT * V(x))


MISTAKES = """
ctrl.adjoint_matching.hamiltonian
    second-order term dropped, as if the control did not enter the diffusion | ` + 0.5 * noise` => ``
    second-order term without 1/2 | 0.5 * noise => noise
ctrl.adjoint_matching.adjoints
    second derivatives not carried through the step | .movedim(0, 2) + carried => .movedim(0, 2)
    second derivatives carried by the step's transpose | ipk,pkl,jpl->pij => kpi,pkl,lpj->pij
    second derivatives of the step alone dropped | along(slope, x).movedim(0, 2) + carried => carried
    adjoints of the step before | first[::-1] => [first[-1], *first[:0:-1]]
ctrl.adjoint_matching._acting
    adjoint of the control held, though it is not optimal | mean_action(policy, t, x)
        => mean_action(policy, t, x.detach())
ctrl.adjoint_matching._steps
    adjoints not discounted over the step | torch.exp(-rate * h) => torch.ones_like(h)
ctrl.adjoint_matching._step
    running reward of a step not times h | h * _reward => _reward
    no noise in the step that is differentiated | ` + problem.dynamics.diffuse(t, x, increment, u)` => ``
ctrl.adjoint_matching.noise_matching_loss
    diffusion's part not times dW | increments[:, k], u) => increments[:, k].square(), u)
ctrl.adjoint_matching.matching_loss
    sign of the loss | return -( => return (
"""
