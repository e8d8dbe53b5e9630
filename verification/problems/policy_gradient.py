"""Theorem 4.1 of "Score as Action": the policy gradient, both views of an action.

A scalar exploratory LQ problem with controlled noise, discount and entropy, on an uneven grid. Its
Euler chain has an exact gradient (complex steps through a recursion), and every normal variable of
a path gets Gauss-Hermite nodes, so the estimators' means must equal it to round-off.
"""

import torch
from torch import Tensor

import ctrl
from verification.closed_form.lq_chain import LQChain
from verification.cubature import mean

P = LQChain()


def gradient(each: Tensor, paths: ctrl.Paths, theta: list[Tensor]) -> Tensor:
    """The mean of an estimator, as users take it: one backward pass."""
    return torch.stack(torch.autograd.grad(mean(each, paths), theta))
