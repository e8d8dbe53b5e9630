"""Noise that is controlled and correlated, on a grid of two axes.

On a grid of two axes noise of any covariance sigma(t, x, a) sigma' is a chain of moves
whose rates are not negative and whose second moments are that covariance exactly (Selling's
decomposition). hjb with controlled and correlated noise has Kraft's answer for investing
under Heston's stochastic volatility: V = w^g / g exp(A(t) + B(t) y).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import hjb
from ctrl.action_grid import trapezoid
from ctrl.markov_chain import markov_chain
from ctrl.state_grid import Axis
from verification.claim import Check, Setting, limit, pathwise
from verification.closed_form.heston import Heston

SOURCE = "Bonnans, Ottenwaelter & Zidani 2004; Kraft 2005, Quantitative Finance 5"
WHY_DOUBLE = "the grids of ctrl.hjb are in float64"

H = Heston()
AXES = (Axis(-1.5, 1.5, 61), Axis(0.0, 0.5, 26))  # log-wealth and variance
PLANE = (Axis(-1.0, 1.0, 41), Axis(-1.0, 1.0, 31))


def heston() -> ctrl.ControlProblem:
    """Log-wealth, moved by a sqrt(y) dW1, and variance; the action is the share in the stock."""

    def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        share, y = a[:, 0], x[:, 1]
        growth = (share * H.premium - 0.5 * share.square()) * y
        return torch.stack([growth, H.pull * (H.level - y)], dim=1)

    def noise(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        root, zero = x[:, 1].clamp_min(0).sqrt(), 0 * x[:, 1]
        own = H.swing * (1 - H.correlation**2) ** 0.5
        wealth = torch.stack([a[:, 0] * root, zero], dim=1)
        variance = torch.stack([H.swing * H.correlation * root, own * root], dim=1)
        return torch.stack([wealth, variance], dim=1)

    sde = ctrl.ControlledSDE(drift, noise, "general", 2, controls_diffusion=True)
    return ctrl.ControlProblem(sde, H.horizon, None, lambda x: (H.power * x[:, 0]).exp() / H.power)


def turning() -> ctrl.ControlledSDE:
    """Noise along a direction that the action turns, and a little across it."""

    def noise(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        angle = a[:, 0] + 0.3 * x[:, 0]
        along = torch.stack([angle.cos(), angle.sin()], dim=1)
        across = torch.stack([-angle.sin(), angle.cos()], dim=1)
        return torch.stack([0.8 * along, 0.16 * across], dim=2)

    return ctrl.ControlledSDE(lambda t, x, a: 0 * x, noise, "general", 2, controls_diffusion=True)


def checks(setting: Setting) -> Iterator[Check]:
    """The chain's moments, and an investor."""
    sde = turning()
    actions = torch.tensor([[[0.4]], [[1.0]], [[2.3]]], dtype=torch.float64)
    chain = markov_chain(ctrl.ControlProblem(sde, 1.0), PLANE, 0.0, actions)
    x = torch.cartesian_prod(*(axis.points() for axis in PLANE))
    inside = (x.abs() < 0.3).all(1)
    moved = (x[chain.neighbours] - x)[:, inside]
    got = torch.einsum("map,mpi,mpj->apij", chain.rates[..., inside], moved, moved)
    each = [
        sde.columns(x.new_tensor(0.0), x[inside], a.expand(int(inside.sum()), 1)) for a in actions
    ]
    want = torch.stack([sigma @ sigma.mT for sigma in each])
    yield pathwise("second moments of the moves", got, want)

    A, B, share = H.solution(0.0)
    shares = trapezoid(share - 0.4, share + 0.4, 17)  # the answer is a node
    solved = hjb.solve_finite_horizon(
        heston(), AXES, shares, steps=8, differences="central", tolerance=1e-7
    )
    log_wealth, y = (axis.points().numpy() for axis in AXES)
    near = (slice(28, 33), slice(3, 7))
    exact = np.exp(H.power * log_wealth[:, None] + A + B * y) / H.power
    yield limit("investing: value", solved.value.table[0][near], exact[near])
    mean = solved.mean_action.table[0][..., 0][near]
    yield limit("investing: share in the stock", mean, share + 0 * exact[near])


MISTAKES = """
ctrl.wide_stencil.obtuse_superbase
    no whole vectors perpendicular | torch.stack([-base[..., 1], base[..., 0]], dim=-1) => base
    weights doubled | (-products) => (-2 * products)
ctrl.wide_stencil.wide_moves
    moves along the axes left out | (0.5 * w * (e == torch.tensor(axis)) => (0.0 * w * (e == torch.tensor(axis))
ctrl.markov_chain._rates
    spacings of the axes exchanged | [axis.spacing for axis in axes] => [axis.spacing for axis in axes[::-1]]
    moves to neighbours only where the noises are correlated too strongly | if monotone and _is_too_correlated(axes, covariance, cross):
        => if False:
    correlation left out | cross = covariance[..., 0, 1] / => cross = 0 * covariance[..., 0, 1] /
ctrl.markov_chain._coefficients
    noise of the first action for all | problem.dynamics.columns(time, x, a)
        => problem.dynamics.columns(time, x, 0 * a + a[:1])
"""
