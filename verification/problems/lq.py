"""Exploratory linear-quadratic control: the one family with everything in closed form.

The value is a quadratic, the optimal policy Gaussian with the classical mean, its covariance
temperature * W^{-1} and free of the state. References: the Riccati equation by scipy and by a
matrix exponential, the value of a policy by the moments of its state, and the published formulas
of one dimension, which share no line with each other.
"""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.linear import LinearGaussian, LinearQuadratic
from verification.claim import Setting
from verification.closed_form import lq as exact

HORIZON = 0.9
X = np.array([[0.7, -0.4], [-1.2, 0.3]])

LAW = exact.Law(
    np.array([[-0.6, 0.2], [0.15, -0.45]]),
    np.array([0.25, -0.35]),
    np.array([[0.31, 0.07], [0.07, 0.19]]),
)

ACTIONS = np.array([[0.4, -0.7], [-0.9, 0.2]])


def production(lq: exact.LQ, setting: Setting) -> LinearQuadratic:
    """The same problem for ``ctrl``."""
    tensors = {each.name: _tensor(getattr(lq, each.name), setting) for each in fields(lq)}
    tensors["sigma"] = tensors["sigma"].mT.contiguous()
    return LinearQuadratic(**tensors)


def production_law(law: exact.Law, setting: Setting) -> LinearGaussian:
    """The same policy for ``ctrl``."""
    return LinearGaussian(*(_tensor(each, setting) for each in (law.K, law.k, law.Sigma)))


def _tensor(value: np.ndarray | float | list, setting: Setting) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=setting.device)


def flat(value: ctrl.linear.Quadratic) -> Tensor:
    """S, e and c in a row."""
    return torch.cat([value.hessian.flatten(), value.slope, value.constant.reshape(1)])


def numbers(solution: ctrl.linear.Stationary) -> list[float]:
    """Numbers of production's solution, in the order of ``exact.ScalarSolution``."""
    value, law, discount = solution.quadratic, solution.law, solution.lq.rates[0]
    average = solution.average_reward
    rate = discount * value.constant if average is None else average
    each = (value.hessian, value.slope, rate, law.gain, law.offset, law.covariance)
    return [float(one) for one in each]


def published(p: exact.Scalar) -> list[float]:
    """The published formulas, in the same order."""
    solution = exact.solve_scalar(p)
    return [getattr(solution, each.name) for each in fields(solution)]
