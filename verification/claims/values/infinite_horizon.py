"""Discounted and ergodic values without a horizon.

Without a horizon nothing is paid at the end of the grid and J is not pinned there. With a
discount, E int e^{-discount t} xi dM = 0 determines V. Without one,
dM = J(X') - J(X) + (r - temperature log pi - average) h determines the average reward, from
any start, not from a stationary one only, and J up to a constant: least squares with a
constant among the features has no answer, and neither has the martingale loss (no return
is ever complete). Both are refused.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl.value import Value
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import exploratory_chain as exact
from verification.cubature import degree_five, mean
from verification.problems.martingale import (
    POLICY,
    C,
    basis,
    gaussian,
    is_refused,
    problem,
)

SOURCE = "Jia & Zhou 2022a, JMLR 23, and 2022b, JMLR 23, section 5 (ergodic tasks)"

STEP, STEPS = 0.3, 3  # without a horizon values do not depend on time where steps are equal
ENDLESS = replace(problem(), horizon=math.inf, terminal_reward=None)
ERGODIC = replace(ENDLESS, discount=0.0)


def stationary_value(setting: Setting, discount: float) -> tuple[Polynomial, Value, float]:
    """V of equal steps for ever, the same for the library, and the average reward."""
    along, average = exact.stationary(C, POLICY, STEP, discount)
    constant, slope, curvature = setting.tensor(along.coef)
    return along, lambda t, x: constant + slope * x[:, 0] + curvature * x[:, 0] ** 2, average


def root(loss: Callable[[Value], Tensor], phi: mg.Features, paths: ctrl.Paths) -> Tensor:
    """Coefficients of these features at which the mean gradient, affine in them, vanishes."""

    def gradient(theta: Tensor) -> Tensor:
        theta = theta.requires_grad_()
        return torch.autograd.grad(mean(loss(mg.LinearValue(phi, theta)), paths), theta)[0]

    unit = torch.eye(phi(paths.grid.nodes[0], paths.states[:, 0]).shape[1]).to(paths.states)
    offset = gradient(torch.zeros_like(unit[0]))
    slope = torch.stack([gradient(one) - offset for one in unit.unbind()], dim=1)
    return torch.linalg.lstsq(slope, -offset[:, None]).solution[:, 0]  # singular where wrong


def quadratic(t: Tensor, x: Tensor) -> Tensor:
    """Features without the constant, which an average leaves undetermined."""
    return torch.cat([x, x**2], dim=1)


def full_quadratic(t: Tensor, x: Tensor) -> Tensor:
    """Features with the constant."""
    return torch.cat([x**0, x, x**2], dim=1)


def checks(setting: Setting) -> Iterator[Check]:
    """Discounted and ergodic values of equal steps without end."""
    even = ctrl.TimeGrid(STEP * torch.arange(STEPS + 1).to(setting.tensor(1.0)))
    policy = gaussian(POLICY)
    start, noise = degree_five(even, C.mean, C.std, draws=True)
    paths = ctrl.simulate(ENDLESS, policy, start, even, noise=noise)

    along, value, _ = stationary_value(setting, C.discount)
    moments = mean(mg.orthogonality(basis, value, ENDLESS, paths, policy), paths)
    size = abs(along(C.mean))
    yield expectation("discounted: E int xi dM = 0, five xi", moments, [0.0] * 5, size)
    for name, loss in {
        "CTD(0)": lambda v: mg.ctd0(v, ENDLESS, paths, policy),
        "CTD(lambda)": lambda v: mg.ctd_lambda(v, ENDLESS, paths, 1.7, policy),
    }.items():
        yield expectation(f"discounted: {name}", root(loss, full_quadratic, paths), along.coef)
    got = mg.clstd(full_quadratic, ENDLESS, paths, policy).coefficients
    yield expectation("discounted: CLSTD", got, along.coef)

    along, value, average = stationary_value(setting, 0.0)
    moments = mean(mg.orthogonality(basis, value, ERGODIC, paths, policy, average), paths)
    yield expectation("ergodic: E int xi dM = 0, five xi", moments, [0.0] * 5, abs(average))
    state = mg.features_along(full_quadratic)
    off = mg.orthogonality(state, value, ERGODIC, paths, policy, average + 0.1)
    laws = exact.state_laws(C, POLICY, STEP * np.arange(STEPS))
    known = -0.1 * STEP * np.sum([(1, m, m**2 + v) for m, v in laws], axis=0)
    yield expectation("ergodic: size where the average is off by 0.1", mean(off, paths), known)
    for name, loss in {
        "CTD(0)": lambda v: mg.ctd0(v, ERGODIC, paths, policy, average),
        "CTD(lambda)": lambda v: mg.ctd_lambda(v, ERGODIC, paths, 1.7, policy, average),
    }.items():
        yield expectation(f"ergodic: {name}", root(loss, quadratic, paths), along.coef[1:])
    fit = mg.clstd(quadratic, ERGODIC, paths, policy, ergodic=True)
    yield expectation("ergodic: CLSTD", fit.coefficients, along.coef[1:])
    yield expectation("ergodic: CLSTD's average", fit.average_reward, average)
    raised = mg.increments(lambda t, x: value(t, x) + 0.8, ERGODIC, paths, policy, average)
    same = mg.increments(value, ERGODIC, paths, policy, average)
    yield pathwise("ergodic: a constant in J changes no dM", raised, same)
    answers = [
        is_refused(lambda: mg.clstd(full_quadratic, ERGODIC, paths, policy, ergodic=True)),
        is_refused(lambda: mg.martingale_loss(value, ENDLESS, paths, policy)),
        is_refused(lambda: mg.clstd(full_quadratic, ENDLESS, paths, policy)),
    ]
    yield expectation("what is not determined is refused", answers, [1.0, 1.0, 0.0])


MISTAKES = """
verification.closed_form.exploratory_chain.stationary
    curvature of V + 1 % | curved = h * => curved = 1.01 * h *
ctrl.paths.ends_at_horizon
    V pinned to 0 where the grid ends | math.isfinite(problem.horizon) and gap => gap
ctrl.value.martingale_increments
    average added | - average_reward * h => + average_reward * h
    average's dt missing | - average_reward * h => - average_reward
ctrl.martingale.ctd_lambda
    average left out of CTD(lambda) | policy) - average_reward * h => policy)
    discount missing in CTD(lambda) | h, decay, discount, running) => h, decay, 0.0, running)
ctrl.martingale.ctd0
    average left out of CTD(0) | policy, average_reward) => policy)
ctrl.martingale.clstd
    average's sign in CLSTD | moves.append(-while => moves.append(while
    entropy left out of CLSTD | rewards = regularised_rewards(problem, paths, policy)
        => rewards = regularised_rewards(replace(problem, temperature=0.0), paths, policy)
    ergodic J with a constant is not refused | if bool(torch.linalg.cond(matrix)
        => if False and bool(torch.linalg.cond(matrix)
ctrl.returns.require_whole
    martingale loss without a horizon is not refused | if not ends_at_horizon(problem, grid): => if False:
shared
    discount doubled
"""
