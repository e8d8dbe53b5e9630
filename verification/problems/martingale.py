"""The martingale characterisation of values (Jia & Zhou 2022a), on chains with a known value.

The Euler chain of an exploratory linear-quadratic problem has an exact value, by backward
recursion. Along its paths the conditions of Propositions 1 and 2 hold exactly, at any step size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl.paths import kept_actions
from ctrl.value import Value
from verification.claim import Setting
from verification.closed_form import exploratory_chain as exact
from verification.closed_form.lq_chain import LQChain
from verification.cubature import degree_five
from verification.problems import HORIZON, NODES, exploratory_lq

POLICY = exact.Feedback()
BEHAVIOUR = exact.Feedback(gain=0.5, offset=-0.3, std=0.9)
C = LQChain(
    drift_slope=-0.7, push=0.9, noise=0.55, noise_slope=0.0, noise_push=0.0,
    state_cost=0.8, action_cost=0.5, terminal_slope=0.4, terminal_cost=1.3,
    discount=0.3, temperature=0.2, mean=0.7, std=0.45,
)  # fmt: skip
ERROR = Polynomial([0.3, -0.2, 0.15])  # of a value that is wrong


def problem() -> ctrl.ControlProblem:
    """The exploratory linear-quadratic problem."""
    return exploratory_lq.problem(C)


def gaussian(policy: exact.Feedback) -> ctrl.GaussianPolicy:
    """The policy as a user would write it."""
    return ctrl.GaussianPolicy(lambda t, x: policy.gain * x + policy.offset, policy.std)


def sampled(
    setting: Setting, policy: exact.Feedback = POLICY, times: Sequence[float] = NODES
) -> ctrl.Paths:
    """Paths whose weighted means are expectations, of polynomials up to degree 5."""
    grid = ctrl.TimeGrid(setting.tensor(times))
    start, noise = degree_five(grid, C.mean, C.std, draws=True)
    return ctrl.simulate(problem(), gaussian(policy), start, grid, noise=noise)


def exact_value(setting: Setting, times: Sequence[float] = NODES) -> Value:
    """V at the nodes before the end; what J(T, .) is should not matter."""
    along = exact.values(C, POLICY, np.array(times))
    table = setting.tensor(np.array([v.coef for v in along]))
    table[-1] += 0.2
    nodes = setting.tensor(times)

    def value(t: Tensor, x: Tensor) -> Tensor:
        constant, slope, curvature = table[(nodes - t).abs().argmin()]
        return constant + slope * x[:, 0] + curvature * x[:, 0] ** 2

    return value


def basis(paths: ctrl.Paths) -> Tensor:
    """1, x, x^2, x eps, eps^2 - 1, eps the noise of the action before: the past alone."""
    x, a = paths.states[:, :-1, 0], kept_actions(paths)[..., 0]
    eps = (a - POLICY.gain * x - POLICY.offset) / POLICY.std
    first = torch.zeros_like(x[:, :1])
    before = torch.cat([first, eps[:, :-1]], dim=1)
    squares = torch.cat([first, eps[:, :-1] ** 2 - 1], dim=1)
    return torch.stack([torch.ones_like(x), x, x**2, x * before, squares], dim=2)


def basis_of(behaviour: exact.Feedback) -> mg.TestFunctions:
    """1, x, x^2, x eps, eps^2 - 1, eps the noise of the step's own action."""

    def tests(paths: ctrl.Paths) -> Tensor:
        x, a = paths.states[:, :-1, 0], kept_actions(paths)[..., 0]
        eps = (a - behaviour.gain * x - behaviour.offset) / behaviour.std
        return torch.stack([torch.ones_like(x), x, x**2, x * eps, eps**2 - 1], dim=2)

    return tests


def discounts(paths: ctrl.Paths) -> Tensor:
    """e^{-discount t} at the left end of every step."""
    return torch.exp(-C.discount * paths.grid.nodes[:-1])


def earned(paths: ctrl.Paths) -> Tensor:
    """Discounted reward, entropy and terminal reward of every path, written out."""
    x, a, last = paths.states[:, :-1, 0], kept_actions(paths)[..., 0], paths.states[:, -1, 0]
    eps = (a - POLICY.gain * x - POLICY.offset) / POLICY.std
    log_prob = -0.5 * eps**2 - np.log(POLICY.std * np.sqrt(2 * np.pi))
    rate = -0.5 * (C.state_cost * x**2 + C.action_cost * a**2) - C.temperature * log_prob
    terminal = C.terminal_slope * last - 0.5 * C.terminal_cost * last**2
    running = (discounts(paths) * rate * paths.grid.nodes.diff()).sum(1)
    return running + np.exp(-C.discount * HORIZON) * terminal


def affine_root(gradient: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where a gradient vanishes that is affine in its coefficients, as many as ``like`` [n] has."""
    unit = torch.eye(len(like)).to(like)
    offset = gradient(torch.zeros_like(like))
    slope = torch.stack([gradient(one) - offset for one in unit.unbind()], dim=1)
    return torch.linalg.lstsq(slope, -offset[:, None]).solution[:, 0]  # singular where wrong


def is_refused(call: Callable[[], object]) -> float:
    """1 if the library refuses it, else 0."""
    try:
        call()
    except ValueError:
        return 1.0
    except RuntimeError:  # a singular system, found too late
        return 0.0
    return 0.0
