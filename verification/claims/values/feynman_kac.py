"""Discounts that depend on time and state: the Feynman-Kac formula in all that discounts.

With a rate of discounting d(t, x), V = E[int exp(-int d ds) r dt + exp(-int d ds) g(X_T)]
solves d_t V + L V + r - d V = 0 (Feynman & Kac). On a grid the factor of a step is
exp(-d(t_k, X_k) h_k): returns, dM, advantages and factors agree with the recursion V_k = r
h + exp(-d h) E V_{k+1} to round-off, and tend to V like the step. hjb solves the equation
with d at every point.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import hjb
from ctrl.advantages import continuous_gae
from ctrl.returns import discount_rates, running_rewards
from ctrl.value import discount_factors, martingale_increments, values
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form.killing import Killed
from verification.cubature import mean

SOURCE = "Karatzas & Shreve, Theorem 5.7.6; Mehler's formula (Borodin & Salminen, 2.1.9)"
WHY_DOUBLE = "the grids of ctrl.hjb are in float64"

K = Killed()
START, PAID, NODES = 0.6, 0.4, (0.0, 0.2, 0.5, 0.8)
NOWHERE = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
SDE = ctrl.ControlledSDE(lambda t, x, a: -K.pull * x, lambda t, x: K.noise)


def rate(t: Tensor, x: Tensor) -> Tensor:
    """Of killing."""
    return K.level * (1 + t) + 0.5 * K.curvature * x[:, 0].square()


SURVIVES = ctrl.ControlProblem(SDE, K.horizon, None, lambda x: torch.ones_like(x[:, 0]), rate)
EARNS = ctrl.ControlProblem(
    SDE, K.horizon, lambda t, x, a: PAID + x[:, 0], lambda x: 1 + x[:, 0].square(), rate
)


def survival(t: Tensor, x: Tensor) -> Tensor:
    """Mehler's formula in torch."""
    to_go, x = K.horizon - t, x[:, 0]
    root = math.sqrt(K.pull**2 + K.curvature * K.noise**2)
    c, s = torch.cosh(root * to_go), torch.sinh(root * to_go)
    share = c + K.pull / root * s
    killed = K.level * (to_go + 0.5 * (K.horizon**2 - t**2))
    gain = K.curvature * s / (root * share)
    return (0.5 * K.pull * to_go - killed - 0.5 * gain * x.square()).exp() / share.sqrt()


def rolled_out(setting: Setting, times: tuple[float, ...], nodes: int = 5) -> ctrl.Paths:
    """Quadrature paths from one start."""
    grid = ctrl.TimeGrid(setting.tensor(times))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=nodes)
    start = setting.tensor(START).expand(len(noise.increments), 1)
    return ctrl.simulate(EARNS, NOWHERE, start, grid, noise=noise)


def checks(setting: Setting) -> Iterator[Check]:
    """The equation, the chain, and the grid."""
    x = setting.tensor([[-1.1], [-0.3], [0.2], [0.9]])
    for t in (0.1, 0.5):
        now = setting.tensor(t)
        got = survival(now, x)
        yield pathwise(f"Mehler's formula at {t}", got, K.survival(t, x[:, 0].numpy()))
        q = ctrl.q_learning.q_rate(SURVIVES, survival, now, x, 0 * x)
        yield pathwise(f"d_t V + L V - d V at {t}", q, 0 * q, 1.0)

    paths = rolled_out(setting, NODES)
    returns = ctrl.returns_to_go(EARNS, paths)
    want = K.chain(np.array(NODES), START, PAID, 5)
    yield expectation("return, by recursion", mean(returns[:, 0], paths), want)
    along, h = values(survival, EARNS, paths), paths.grid.steps
    rewards = running_rewards(EARNS, paths)
    factors, dm = (
        discount_factors(EARNS, paths),
        martingale_increments(survival, EARNS, paths, rewards),
    )
    yield pathwise(
        "return less V(0) is the sum of dM", (factors * dm).sum(1) + along[:, 0], returns[:, 0]
    )
    advantages = continuous_gae(along, rewards, h, 0.0, discount_rates(EARNS, paths))
    yield pathwise("advantages without forgetting", advantages + along[:, :-1], returns[:, :-1])

    errors = []
    for steps in (4, 8):
        grid = tuple(np.linspace(0, K.horizon, steps + 1))
        paths = rolled_out(setting, grid, 3)
        got = mean(ctrl.returns_to_go(SURVIVES, paths)[:, 0], paths)
        errors.append(float(got) - float(K.survival(0.0, np.array(START))))
    yield limit("order of the killed mean", math.log2(errors[0] / errors[1]), 1.0)

    axes = (hjb.Axis(-4.0, 4.0, 65),)
    solved = [
        hjb.evaluate_finite_horizon(SURVIVES, NOWHERE, axes, steps=steps, differences="central")
        for steps in (16, 32)
    ]
    at = axes[0].points()[24:41].numpy()
    coarse, fine = (each.table[0, 24:41] for each in solved)
    yield limit("hjb", (4 * fine - coarse) / 3, K.survival(0.0, at))


MISTAKES = """
ctrl.q_learning.q_rate
    discount missing in q | rate - problem.discount_at => rate - 0 * problem.discount_at
ctrl.problem.ControlProblem.discount_at
    discount of the first path for all | return rate => return rate[:1].expand_as(rate)
ctrl.returns.discount_rates
    discount at the right end | return over_steps(rate, paths) => from ctrl.paths import over_nodes; return over_nodes(rate, paths)[:, 1:]
ctrl.value.discount_factors
    a reward discounted over its own step | over - over.cumsum(1) => -over.cumsum(1)
ctrl.value.martingale_increments
    discount missing in dM | -discount * h => 0 * h
ctrl.returns.returns_to_go
    first step's factor for all | keep[..., k] => keep[..., 0]
ctrl.advantages.continuous_gae
    first step's factor for all advantages | keep[..., k] => keep[..., 0]
verification.claims.values.feynman_kac.survival
    trace of the pull missing in Mehler's formula | 0.5 * K.pull * to_go - killed => -killed
ctrl.hjb._discount
    hjb discounts by the mean | rate.to(points) => rate.mean()
    hjb discounts at t = 0 | new_tensor(t) => new_tensor(0.0 * t)
"""
