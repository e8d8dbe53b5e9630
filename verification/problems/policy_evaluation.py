"""Policy evaluation by martingale conditions (Jia & Zhou 2022a): each method has its own limit."""

import torch
from torch import Tensor

import ctrl
from verification.closed_form import policy_evaluation as exact
from verification.cubature import degree_five


def problem(e: exact.Evaluation) -> ctrl.ControlProblem:
    """An Ornstein-Uhlenbeck process that is paid x^2, as a user would write it."""
    return ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: -e.pull * x + a, lambda t, x: e.noise),
        e.horizon,
        lambda t, x, a: x[:, 0] ** 2,
        lambda x: e.terminal * x[:, 0] ** 2,
        e.discount,
    )


def sampled(e: exact.Evaluation, nodes: Tensor) -> ctrl.Paths:
    """Paths whose weighted means are expectations, of polynomials up to degree 5."""
    grid = ctrl.TimeGrid(nodes)
    start, noise = degree_five(grid, e.mean, e.variance**0.5, draws=False)
    policy = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
    return ctrl.simulate(problem(e), policy, start, grid, noise=noise)
