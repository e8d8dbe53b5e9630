"""An energy that is learned from data, and the value that follows from it.

E pays mean E(data) - mean E(samples) + gamma (mean E^2 of both), least at half the difference
of densities over gamma times their sum; for k backwards it regresses E(x_k) on E(x_{k+1}) +
time_cost (sigmoid(c - k) - sigmoid(c - 1 - k)), held; V = -E at every node. Usual squared moves
are a running average that begins at the noising chain's variance.

The network is a multilayer perceptron, written out in numpy; the learning rate is 0, so that all
parts of an update see one network. Slopes are complex steps.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion_envs import objectives
from diffusion_envs.objectives.dxmi_from_data import energy_loss, next_cost
from diffusion_envs.training.energy import EnergyCritic
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.problems import losses as case
from verification.problems.training_loop import Process

SOURCE = "arXiv 2407.00626, algorithm 1 and equation 6, and the authors' code for CIFAR-10"
WHY_DOUBLE = "the costs of time are float32 whatever the setting, as the network is"
PRECISION = torch.float32

WIDTH = 5
EVERY = case.STATES.reshape(-1, case.DIM)
DATA = case.wave(case.PATHS, case.DIM, size=1.1, phase=3.0)


def _layer(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x @ weight.T + bias


def _leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def energy(weights: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """E of the energy network."""
    first = _leaky(_layer(x, *weights[:2]))
    return _layer(_layer(_leaky(_layer(first, *weights[2:4])), *weights[4:6]), *weights[6:])[:, 0]


class Data:
    """Numbers for data."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """So many of them."""
        return torch.as_tensor(DATA[:n])


def checks(setting: Setting) -> Iterator[Check]:
    """An update at learning rate 0, and its pieces."""
    objective = objectives.DxMIFromData(
        square_weight=0.6, time_cost=0.8, move_decay=0.9, energy_width=WIDTH
    )
    critic = EnergyCritic(
        case.environment(setting), objective, case.update_size(), Process(), "claim", Data()
    )
    weights, made = case.filled(critic.network, setting.dtype), case.rollout(setting)
    critic.optimiser.param_groups[0]["lr"] = 0.0
    usual = 1 - (case.NODES.alpha[:-1] / case.NODES.alpha[1:]) ** 2
    yield pathwise("squared moves at first", critic.usual_moves, usual)
    critic.usual_moves = setting.tensor(usual)
    told = critic.improve(made, None, 0)
    along = energy(weights, EVERY).reshape(case.PATHS, case.STEPS + 1)
    data, samples = energy(weights, DATA), along[:, -1]
    squares = np.mean(data**2) + np.mean(samples**2)
    want = np.mean(data) - np.mean(samples) + 0.6 * squares
    yield pathwise("loss", told["energy_loss"], float(want))
    means = [told["energy_of_data"], told["energy_of_samples"]]
    yield pathwise("of data and samples", means, [data.mean(), samples.mean()])
    sigmoid = 1 / (1 + np.exp(-(case.STEPS // 2 - np.arange(case.STEPS + 1.0))))
    cost = 0.8 * (sigmoid[:-1] - sigmoid[1:])
    gaps = along[:, :-1] - (along[:, 1:] + cost)
    yield pathwise("loss of the value", told["value_loss"], float(np.mean(gaps**2)))
    leave = critic.network.get_submodule("leave")
    slope = case.slope_of(leave.weight)

    def loss(weight: np.ndarray) -> np.ndarray:
        first = energy([*weights[:4], weight, *weights[5:]], case.STATES[:, 0])
        return (first - along[:, 1] - cost[0]) ** 2 / case.PATHS

    yield pathwise("slope of its last step", slope, exact.slope(loss, weights[4]))
    moves = np.mean((case.STATES[:, 1:] - case.STATES[:, :-1]) ** 2, axis=(0, 2))
    want = 0.9 * usual + 0.1 * moves
    yield pathwise("squared moves then", critic.usual_moves, want)
    x = setting.tensor(case.STATES[:, 1])
    got = critic.at(made)(torch.zeros(case.PATHS).long(), x, torch.arange(case.PATHS))
    yield pathwise("value of any states", got, -energy(weights, case.STATES[:, 1]))
    pieces = [next_cost(k, case.STEPS, 0.8) for k in range(case.STEPS)]
    yield pathwise("what each step adds", pieces, cost)
    got = energy_loss(setting.tensor(DATA[:, 0]), setting.tensor(case.REWARDS), 0.6)
    want = DATA[:, 0].mean() - case.REWARDS.mean()
    want = want + 0.6 * (np.mean(DATA[:, 0] ** 2) + np.mean(case.REWARDS**2))
    yield pathwise("loss of any energies", got, want)


MISTAKES = r"""
diffusion_envs.objectives.dxmi_from_data.energy_loss
    samples are data | data.mean() - samples => samples.mean() - data
    squares of data only | ` + samples.square().mean()` => ``
diffusion_envs.objectives.dxmi_from_data.next_cost
    costs fall by the step after | steps // 2 - step => steps // 2 - step - 1
    cost's sign | centre.sigmoid() - (centre - 1).sigmoid() => (centre - 1).sigmoid() - centre.sigmoid()
diffusion_envs.training.energy.EnergyCritic.__init__
    what is kept for the squared move | (1 - kept).float() => kept.float()
diffusion_envs.training.energy.EnergyCritic._value_step
    target of the same state | rollout.states[piece, step + 1] => rollout.states[piece, step]
    cost earned | + cost => - cost
diffusion_envs.training.energy.EnergyCritic.improve
    decay of what is new | decay * self.usual_moves + (1 - decay) * moves => (1 - decay) * self.usual_moves + decay * moves
    steps forwards | reversed(steps) => steps
diffusion_envs.training.energy.EnergyCritic.at
    value is the energy | return -functional_call => return functional_call
diffusion_envs.training.energy.EnergyOfVectors.forward
    not scaled | self.scale(self.leave(x))[:, 0] => self.leave(x)[:, 0]
"""
