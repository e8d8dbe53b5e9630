"""Continuous-time proximal policy optimisation, with the penalty that its bound asks for.

Sources  [ZTY] Zhao, Tang & Yao 2023, policy optimisation in continuous time, NeurIPS 36, section 4.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ctrl.advantages import continuous_gae
from ctrl.agents.descent import descend, expectation
from ctrl.devices import as_like
from ctrl.martingale import ctd0
from ctrl.paths import Paths, kept_actions, over_steps
from ctrl.policy import RandomPolicy, policy_kl
from ctrl.problem import ControlProblem
from ctrl.returns import discount_rates, regularised_rewards
from ctrl.trust_region import penalised_surrogate
from ctrl.value import Value, discount_factors, values


def cppo(
    problem: ControlProblem,
    module: nn.Module,
    policy: Callable[[nn.Module], RandomPolicy],
    value: Value,
    sample: Callable[[], Paths],
    actor: Optimizer,
    critic: Optimizer,
    updates: int,
    *,
    critic_loss: Callable[[Paths], Tensor] | None = None,
    critic_updates: int = 1,
    epochs: int = 4,
    rate: float = math.inf,
    penalty: float = 1.0,
    target: float = 0.02,
    tolerance: float = 0.1,
    factor: float = 1.5,
) -> Iterator[tuple[Paths, float]]:
    """Ascend the surrogate less penalty E sqrt(KL), the penalty adapted to a target.

    After every update the penalty is multiplied by ``factor`` where the mean of sqrt(KL) came out
    above (1 + tolerance) target and divided by it below (1 - tolerance) target. The KL is that of
    the drawn actions at a state: it does not depend on the step.

    Args:
        problem: which pays.
        module: what is learned of the policy; copied to remember the old policy.
        policy: module -> policy.
        value: to learn.
        sample: fresh paths of ``policy(module)``.
        actor: optimiser of the module's parameters.
        critic: optimiser of the value's parameters.
        updates: how many.
        critic_loss: paths -> one number a path; ``martingale.ctd0`` if not given.
        critic_updates: steps of the value for each set of paths.
        epochs: steps of the policy for each set of paths.
        rate: of the advantages' ``continuous_gae``, 1/time.
        penalty: first penalty, reward/time per sqrt(nat).
        target: of the mean sqrt(KL) of an update, sqrt(nat).
        tolerance: relative half-width of the band around the target.
        factor: by which the penalty moves.

    Yields:
        The paths of every update and the penalty after it.

    Raises:
        ValueError: a setting is out of its range.
        FloatingPointError: a loss or gradient is not finite.
    """
    for name, setting, least in (
        ("target", target, 0),
        ("factor", factor, 1),
        ("epochs", epochs, 0),
    ):
        if not setting > least:
            raise ValueError(f"{name} must be more than {least}, got {setting}")
    for _ in range(updates):
        paths = sample()
        for _ in range(critic_updates):
            if critic_loss is None:
                error = ctd0(value, problem, paths, policy(module))
            else:
                error = critic_loss(paths)
            descend(expectation(error, paths), critic)
        old = policy(copy.deepcopy(module).requires_grad_(False))
        with torch.no_grad():
            old_log_prob = over_steps(old.log_prob, paths, kept_actions(paths))
            advantages = _rates(problem, value, old, paths, rate)
        for _ in range(epochs):
            gain, _ = _surrogate(
                problem, policy(module), old, paths, old_log_prob, advantages, penalty
            )
            descend(-gain, actor)
        with torch.no_grad():
            _, root_kl = _surrogate(
                problem, policy(module), old, paths, old_log_prob, advantages, penalty
            )
        if root_kl > (1 + tolerance) * target:
            penalty *= factor
        elif root_kl < (1 - tolerance) * target:
            penalty /= factor
        yield paths, penalty


def _rates(
    problem: ControlProblem, value: Value, policy: RandomPolicy, paths: Paths, rate: float
) -> Tensor:
    """Estimates of q - temperature log pi of every step, reward/time."""
    h = as_like(paths.grid.steps, paths.states)
    rewards = regularised_rewards(problem, paths, policy)
    along = values(value, problem, paths)
    discount = discount_rates(problem, paths)
    running = None if paths.ends is None else paths.running
    return continuous_gae(along, rewards, h, rate, discount, running) / h


def _surrogate(
    problem: ControlProblem,
    new: RandomPolicy,
    old: RandomPolicy,
    paths: Paths,
    old_log_prob: Tensor,
    advantages: Tensor,
    penalty: float,
) -> tuple[Tensor, float]:
    """The penalised surrogate, time-integrated and averaged; and the mean of sqrt(KL)."""

    def divergence(t: Tensor, x: Tensor) -> Tensor:
        return policy_kl(new, old, t, x)

    log_ratio = over_steps(new.log_prob, paths, kept_actions(paths)) - old_log_prob
    kl = over_steps(divergence, paths).clamp_min(0)  # round-off of equal policies
    rows = penalised_surrogate(
        log_ratio.flatten(), advantages.flatten(), kl.flatten(), penalty
    ).view_as(kl)
    weights = discount_factors(problem, paths) * as_like(paths.grid.steps, kl)
    gain = expectation((weights * rows).sum(1), paths)
    made = paths.running.sum(1)  # a path's own steps
    return gain, float(expectation(kl.detach().sqrt().sum(1) / made, paths))
