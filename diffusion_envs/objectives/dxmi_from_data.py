"""DxMI and its continuous-time variants with an energy that is learned from data, as published.

Energy       E is a network of pictures, and V(t, x) = -E(x) its value at every node: one network.
A batch      (1) One step of the energy on as many data x and samples y as there are samples,
                 mean E(x) - mean E(y) + square_weight (mean E(x)^2 + mean E(y)^2),
             whose minimum is E = (p_y - p_x) / (2 square_weight (p_y + p_x)) for densities p_x of
             the data and p_y of the samples: within 1 / (2 square_weight), 0 where they agree.
             (2) For k = T-1 .. 0 one step towards what comes next: the mean square of
                 E(x_k) - [E(x_{k+1}) + time_cost (sigmoid(c - k) - sigmoid(c - 1 - k))],
             c = T // 2, the bracket without gradient: its fixed point is E[E(x_T) | x_k] plus a
             cost that falls with k by ``time_cost`` in all.
             (3) One step of the sampler, by the losses of ``dxmi``: with ``train_steps=1``, one
             transition of every path. q_k, the usual squared move of a coordinate, is a running
             average that begins at the noising chain's variance, 1 - abar_k / abar_{k+1}.
Reward       It is reported and judged by; nothing is learned from it.
Steps        On Gaussian data of std 0.5 whose mean is 1 away from where a pretrained model draws,
             [DxMI] is 0.03 away after 120 updates at 4 steps, and 0.50 at 16. The variants are of
             first order in a step: at 16 steps they do the same (0.54), but at 4 they pass by, to
             0.39 after 24 updates and 10 after 120; with kl_weight 0.05 they come back (0.6).
Differences  Their sampler step draws new noise for x_{k+1}, with dropout; here the roll-out's is
             kept, without dropout: the same expectation. Theirs draws its transitions from all of
             the batch's, here every path has one. A loss here is a whole path's, T times theirs: so
             is ``max_gradient_norm``. Rates are of Adam: ``weight_decay=0``.
Names        [SA]'s code for CIFAR-10, and its baseline folder for DxMI, have neither entropy nor
             cost of moves: ``DxMIFromData(entropy_weight=0, move_weight=0)`` is that baseline.

Sources      [DxMI] Yoon et al. 2024, arXiv 2407.00626, algorithm 1 and the authors' code for
             CIFAR-10 at 10 steps. [SA] Zhao et al. 2025, "Score as Action", arXiv 2502.01819, and
             its code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.objectives.dxmi import ContinuousDxMI, ContinuousDxMIReleased, DxMI
from diffusion_envs.ranges import require_count, require_not_negative, require_positive


def energy_loss(
    data: Float[Tensor, " n"], samples: Float[Tensor, " m"], square_weight: float
) -> Float[Tensor, ""]:
    """Of energies of data and of samples ([DxMI] equation 6, with the code's regularisation)."""
    contrast = data.mean() - samples.mean()
    return contrast + square_weight * (data.square().mean() + samples.square().mean())


def next_cost(step: int, steps: int, time_cost: float) -> float:
    """What a step adds to the energy that is to come; over all steps it is below ``time_cost``."""
    centre = torch.tensor(float(steps // 2 - step))
    return time_cost * float(centre.sigmoid() - (centre - 1).sigmoid())


@dataclass(frozen=True)
class LearnedEnergy:
    """How the energy learns, for any loss that climbs a value.

    Its rate is ``UpdateSize.value_learning_rate``; ``value_epochs`` are batches of energy and value
    steps for each step of the sampler.
    """

    square_weight: float = 1.0  # gamma, of the squared energies
    time_cost: float = 1.0  # energy, how much a path's beginning costs more than its end
    move_decay: float = 0.99  # of the running average of squared moves
    energy_width: int = 128  # channels of the energy network

    needs_data: ClassVar[bool] = True

    @property
    def compares_paths(self) -> bool:
        """Nowhere: the value is charged no KL, so that used steps alone are compared."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]  # of the loss
        require_not_negative(time_cost=self.time_cost)
        require_positive(square_weight=self.square_weight)
        require_count(energy_width=self.energy_width)
        if not 0 <= self.move_decay < 1:
            raise ValueError(f"move_decay must be in [0, 1), got {self.move_decay}")


@dataclass(frozen=True)
class DxMIFromData(LearnedEnergy, DxMI):
    """[DxMI] whole. Published: batch 128, ``value_learning_rate`` 1e-5, ``max_gradient_norm`` 1."""

    learning_rate: float = 1e-7  # of all weights


@dataclass(frozen=True)
class ContinuousDxMIFromData(LearnedEnergy, ContinuousDxMI):
    """[SA]'s objective: the value's gradient times the move, and the exact path KL, no clips."""

    learning_rate: float = 3e-7  # of all weights
    kl_weight: float = 0.01  # energy per nat of path KL from the pretrained model


@dataclass(frozen=True)
class ContinuousDxMIReleasedFromData(LearnedEnergy, ContinuousDxMIReleased):
    """[SA]'s code for CIFAR-10: clips, no KL. Published: batch 512, value rate 2e-5, AdamW."""

    learning_rate: float = 3e-7  # of all weights, at first
    rate_decay: float = 0.9995  # the learning rate's factor from one update to the next

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate_decay <= 1:
            raise ValueError(f"rate_decay must be in (0, 1], got {self.rate_decay}")

    @property
    def decay(self) -> float:
        """The rate falls geometrically."""
        return self.rate_decay
