"""Jia & Zhou 2023: the pair of value and q-rate, along paths of its own policy or any other."""

import torch
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl.paths import kept_actions
from verification.closed_form import exploratory_chain as exact

BEHAVIOUR = exact.Feedback(gain=0.5, offset=-0.3, std=0.9)


def basis(behaviour: exact.Feedback) -> mg.TestFunctions:
    """1, x, x^2, x eps, eps^2 - 1, eps the noise of the step's own action."""

    def tests(paths: ctrl.Paths) -> Tensor:
        x, a = paths.states[:, :-1, 0], kept_actions(paths)[..., 0]
        eps = (a - behaviour.gain * x - behaviour.offset) / behaviour.std
        return torch.stack([torch.ones_like(x), x, x**2, x * eps, eps**2 - 1], dim=2)

    return tests
