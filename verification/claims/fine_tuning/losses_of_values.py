"""Losses that climb a value, as a run takes them, against their formulas.

DxMI: -V(t', x') + moves - entropy + b KL, x' = A x + G score_th(x) + s z a function of the policy,
moves |x' - x|^2 / (2 q d), q the usual squared move 2 (1 - e^{-h/2}) or a running average, entropy
a multiple of log s. Its continuous variant: -<grad V(t, x), x' - x> + b KL; as released with V
of the next node and clips of states, moves and gains.

Rows, model and sampler are those of `losses-of-steps`; V is a formula, its gradient in x and all
slopes are complex steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffusion_envs import objectives
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.closed_form.objectives import Steps, clip
from verification.problems import losses as case

SOURCE = "arXiv 2407.00626 (DxMI); 2502.01819, and the authors' code for CIFAR-10"

KL_WEIGHT = 1.7


def _moves(rows: Steps) -> np.ndarray:
    path, step = case.which(1).T
    return np.mean((case.next_states(rows) - case.STATES[path, step]) ** 2, axis=1)


def _dxmi(
    usual: Callable[[Steps], np.ndarray], entropy: float = 0.3, moves: float = 0.4, b: float = 0.0
) -> Callable[[Steps], np.ndarray]:
    path, step = case.which(1).T
    return lambda rows: (
        b * rows.path_kl
        + moves * _moves(rows) / (2 * usual(rows))
        - entropy * np.log(rows.std)
        - case.value(step + 1, case.next_states(rows), path)
    )


def _continuous(
    later: int, state: float, move: float, most: float, b: float
) -> Callable[[Steps], np.ndarray]:
    path, step = case.which(1).T
    x = case.STATES[path, step]
    slope = case.value_slope(step + later, x, path)

    def losses(rows: Steps) -> np.ndarray:
        moved = clip(clip(case.next_states(rows), -state, state) - x, -move, move)
        return b * rows.path_kl - clip(np.sum(slope * moved, axis=1), -most, most)

    return losses


FREE = np.inf
USUAL = case.USUAL_MOVES[case.which(1)[:, 1]]
COMPARED: dict[str, tuple[Any, Callable[[Steps], np.ndarray]]] = {
    "DxMI": (
        objectives.DxMI(entropy_weight=0.3, move_weight=0.4, kl_weight=KL_WEIGHT),
        _dxmi(lambda rows: 2 * (1 - np.exp(-rows.size / 2)), b=KL_WEIGHT),
    ),
    "continuous DxMI": (
        objectives.ContinuousDxMI(kl_weight=KL_WEIGHT),
        _continuous(0, FREE, FREE, FREE, KL_WEIGHT),
    ),
    "continuous DxMI, released": (
        objectives.ContinuousDxMIReleased(move_clip=0.5, state_clip=0.9, gain_clip=0.3),
        _continuous(1, 0.9, 0.5, 0.3, 0.0),
    ),
    "continuous DxMI from data": (
        objectives.ContinuousDxMIFromData(kl_weight=KL_WEIGHT),
        _continuous(0, FREE, FREE, FREE, KL_WEIGHT),
    ),
    "continuous DxMI from data, released": (
        objectives.ContinuousDxMIReleasedFromData(move_clip=0.5, state_clip=0.9, gain_clip=0.3),
        _continuous(1, 0.9, 0.5, 0.3, 0.0),
    ),
}


def checks(setting: Setting) -> Iterator[Check]:
    """Losses of all rows, and their slopes in the current scores and in the deviations."""
    for name, (objective, formula) in COMPARED.items():
        yield pathwise(name, case.shipped(setting, objective), case.value_and_slope(formula))

    from_data = objectives.DxMIFromData(entropy_weight=0.3, move_weight=0.4)
    got = case.shipped(setting, from_data, usual_moves=setting.tensor(case.USUAL_MOVES))
    formula = _dxmi(lambda rows: USUAL)
    yield pathwise("DxMI from data", got, case.value_and_slope(formula))
    rows = case.rows_of(setting, from_data, usual_moves=setting.tensor(case.USUAL_MOVES))
    std = rows.std.detach().requires_grad_()
    (slope,) = torch.autograd.grad(from_data.loss(replace(rows, std=std)).sum(), std)
    plain = case.numbers()
    want = exact.slope(lambda free: formula(replace(plain, std=free)), plain.std)
    yield pathwise("DxMI from data: slope in the standard deviations", slope, want)


MISTAKES = r"""
diffusion_envs.objectives.dxmi.next_state
    DxMI: noise dropped | + std * rows.noise => + 0 * std
diffusion_envs.objectives.dxmi.usual_move
    DxMI: usual move of the whole exponent | -0.5 * step_size => -step_size
diffusion_envs.objectives.dxmi._ByValue.rows
    DxMI: value of the wrong node | values(step + 1, x, path) => values(step, x, path)
    DxMI: state left as it is | gain * state + => state +
    DxMI: usual moves of noising always | usual=None if steps.usual_moves is None else => usual=None if True else
diffusion_envs.objectives.dxmi._ByValue.charge
    DxMI: sign of the KL | self.kl_weight * path => -self.kl_weight * path
diffusion_envs.objectives.dxmi.DxMI.loss
    DxMI: moves not halved | (2 * usual) => usual
    DxMI: moves summed | .flatten(1).mean(1) => .flatten(1).sum(1)
    DxMI: sign of the entropy | cost - entropy => cost + entropy
    DxMI: sign of the value | - rows.next_value => + rows.next_value
diffusion_envs.objectives.dxmi.ContinuousDxMI.loss
    continuous DxMI: value of the other node | if self.value_of_next_node else => if not self.value_of_next_node else
    continuous DxMI: moves not clipped | .clamp(-self.move_clip, self.move_clip) => ``
    continuous DxMI: gain not clipped | .clamp(-self.gain_clip, self.gain_clip) => ``
diffusion_envs.objectives.dxmi.ContinuousDxMI._moves
    continuous DxMI: states not clipped | .clamp(-self.state_clip, self.state_clip) => ``
"""
