"""CPPO: the step, and the penalty after it.

One step of CPPO from the old policy is exact gradient ascent of the chain's performance:
the penalty sqrt(KL) has slope 0 there, and the sum of e^{-rho t} h ratio (q - gam log pi)
has the gradient of V. Afterwards the penalty moves by its factor, up where the mean of
sqrt(KL) is above (1 + tolerance) target and down below (1 - tolerance) target; not so
with the root of the mean.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ctrl
from ctrl import agents
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import complex_steps, lq_chain
from verification.closed_form.lq_chain import THETA, LQChain
from verification.problems import exploratory_lq

SOURCE = "Zhao, Tang & Yao 2023, NeurIPS 36, section 4"


class Learned(nn.Module):
    """Gain, offset and log-std."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.theta = nn.ParameterList(each.detach() for each in parameters(setting))


def parameters(setting: Setting) -> list[Tensor]:
    """To begin with."""
    return exploratory_lq.parameters(setting, THETA)


def policy_of(module: nn.Module) -> ctrl.GaussianPolicy:
    """The policy with a module's parameters."""
    assert isinstance(module, Learned)
    return exploratory_lq.policy(*module.theta)


def one_update(
    setting: Setting, p: LQChain, rate: float, **options: Any
) -> tuple[np.ndarray, float, ctrl.Paths]:
    """Parameters and penalty after one update of production's agent, and its paths."""
    module = Learned(setting)
    nodes = exploratory_lq.NODES
    value = exploratory_lq.chain_value(setting, p, THETA, nodes)
    dummy = setting.tensor(0.0).requires_grad_()  # the value is exact already
    update = agents.cppo(
        exploratory_lq.problem(p),
        module,
        policy_of,
        value,
        lambda: exploratory_lq.drawn_paths(setting, p, parameters(setting), nodes),
        torch.optim.SGD(module.parameters(), lr=rate),
        torch.optim.SGD([dummy], lr=rate),
        1,
        critic_loss=lambda paths: dummy * torch.zeros_like(paths.states[:, 0, 0]),
        epochs=1,
        penalty=0.7,
        **options,
    )
    paths, penalty = next(iter(update))
    after = np.array([float(each.detach()) for each in module.theta])
    return after, penalty, paths


def mean_root_kl(theta: np.ndarray, paths: ctrl.Paths) -> float:
    """Mean over paths and steps of sqrt(KL(theta || THETA)) at the paths' states."""
    x = paths.states[:, :-1, 0].detach().double().cpu().numpy()
    shift = (theta[0] - THETA[0]) * x + theta[1] - THETA[1]
    ratio = np.exp(2 * (theta[2] - THETA[2]))
    kl = (ratio - 1 - np.log(ratio) + shift**2 * np.exp(-2 * THETA[2])) / 2
    assert paths.weights is not None
    return float(paths.weights.double().cpu().numpy() @ np.sqrt(kl).mean(1))


def checks(setting: Setting) -> Iterator[Check]:
    """The step, and the penalty after it."""
    p, rate = replace(LQChain(), noise_slope=0.0, noise_push=0.0), 0.08
    nodes = exploratory_lq.NODES
    after, _, paths = one_update(setting, p, rate)
    want = complex_steps.gradient(lambda theta: lq_chain.performance(p, theta, nodes), THETA)
    yield expectation("first step: the exact gradient", (after - THETA) / rate, want)
    root_kl = mean_root_kl(after, paths)
    moves = {1 / 1.11: 1.5, 1 / 1.09: 1.0, 1 / 0.91: 1.0, 1 / 0.89: 1 / 1.5}
    penalties = [one_update(setting, p, rate, target=root_kl * each)[1] / 0.7 for each in moves]
    yield pathwise("penalty: up, kept, kept, down", penalties, list(moves.values()))


MISTAKES = """
ctrl.agents.cppo._surrogate
    discount of the weights missing | `discount_factors(problem, paths) * ` => ``
    dt missing | ` * as_like(paths.grid.steps, kl)` => ``
    log-ratio's sign | kept_actions(paths)) - old_log_prob => kept_actions(paths)) * -1 + old_log_prob
    KL for its root | kl.detach().sqrt() => kl.detach()
    root of the mean KL | float(expectation(kl.detach().sqrt().sum(1) / made, paths))
        => float(expectation(kl.detach().sum(1) / made, paths).sqrt())
    KL the other way around | policy_kl(new, old, t, x) => policy_kl(old, new, t, x)
ctrl.agents.cppo._rates
    advantages not per unit of time | running) / h => running)
ctrl.returns.regularised_rewards
    entropy missing in the advantages | rewards - problem.temperature * log_prob => rewards - 0 * log_prob
ctrl.agents.cppo.cppo
    descent for ascent | descend(-gain, actor) => descend(gain, actor)
    penalty moves the wrong way | if root_kl > (1 => if root_kl < (1
    tolerance ignored | elif root_kl < (1 - tolerance) * target => elif root_kl < target
"""
