"""Actor-critic, offline over whole paths and online over single steps ([JZ22b] Algorithms 1 to 3).

Sources  [JZ22b] Jia & Zhou 2022, policy gradient and actor-critic, JMLR 23.
"""

import math
from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Generator, Tensor
from torch.optim import Optimizer

from ctrl.agents.descent import descend, expectation
from ctrl.agents.online import OnlineStep, one_step_paths
from ctrl.martingale import ctd0, increments
from ctrl.paths import Paths
from ctrl.policy import Policy, RandomPolicy
from ctrl.policy_gradient import Decisions, DrawnActions, temporal_difference_gradient
from ctrl.problem import ControlProblem
from ctrl.solvers import Solver
from ctrl.value import Value


def actor_critic(
    problem: ControlProblem,
    policy: Policy,
    value: Value,
    sample: Callable[[], Paths],
    actor: Optimizer,
    critic: Optimizer,
    updates: int,
    *,
    critic_loss: Callable[[Paths], Tensor] | None = None,
    critic_updates: int = 1,
    decisions: Decisions | None = None,
    rate: float = math.inf,
) -> Iterator[Paths]:
    """Alternate a step of the value and a step of the policy along fresh paths.

    Args:
        problem: which pays.
        policy: to improve.
        value: to learn.
        sample: fresh paths of the current policy.
        actor: optimiser of the policy's parameters.
        critic: optimiser of the value's parameters.
        updates: how many.
        critic_loss: paths -> one number a path; ``martingale.ctd0`` if not given.
        critic_updates: steps of the value for one of the policy, on the same paths.
        decisions: ``DrawnActions()`` if not given.
        rate: of the advantages' ``continuous_gae``, 1/time.

    Yields:
        The paths of every update, after it.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    for _ in range(updates):
        paths = sample()
        for _ in range(critic_updates):
            if critic_loss is None:
                error = ctd0(value, problem, paths, policy)
            else:
                error = critic_loss(paths)
            descend(expectation(error, paths), critic)
        gain = temporal_difference_gradient(problem, policy, value, paths, decisions, rate=rate)
        descend(-expectation(gain, paths), actor)
        yield paths


def online_actor_critic(
    problem: ControlProblem,
    policy: RandomPolicy,
    value: Value,
    start: Float[Tensor, " paths *event"],
    step_size: float,
    steps: int,
    actor: Optimizer,
    critic: Optimizer,
    generator: Generator,
    *,
    average_reward: float = 0.0,
    average_rate: float = 1.0,
    schedule: Callable[[float], float] = lambda time: 1.0,
    solver: Solver | None = None,
) -> Iterator[OnlineStep]:
    """Ergodic actor-critic, three updates for every step of time ([JZ22b] Algorithm 3).

        dM = V(X') - V(X) + (r - temperature log pi - average) h
        theta += d_theta V dM,   phi += grad log pi dM,   average += average_rate dM

    each times its optimiser's learning rate and the schedule. A learning rate here is per unit of
    time: dM is of the size of h.

    Args:
        problem: ergodic, time-homogeneous: infinite horizon, no discount.
        policy: to improve.
        value: to learn, without a constant.
        start: of the parallel paths; their gradients are averaged.
        step_size: h, time.
        steps: how many.
        actor: optimiser of the policy's parameters; plain SGD is the paper's.
        critic: optimiser of the value's parameters.
        generator: of all randomness.
        average_reward: first estimate, reward/time.
        average_rate: its learning rate, 1/time.
        schedule: time -> factor on the three learning rates.
        solver: one-step map.

    Yields:
        Every step, after its updates.

    Raises:
        ValueError: the problem has an end or a discount.
        FloatingPointError: a loss or gradient is not finite.
    """
    full = [(g, g["lr"]) for optimiser in (actor, critic) for g in optimiser.param_groups]
    walk = one_step_paths(problem, policy, start, step_size, steps, generator, solver)
    for k, paths in enumerate(walk):
        factor = schedule(k * step_size)
        for group, rate in full:
            group["lr"] = rate * factor
        dm = increments(value, problem, paths, policy, average_reward).detach()
        error = ctd0(value, problem, paths, policy, average_reward)
        gain = DrawnActions().log_prob(problem, policy, paths) * dm
        descend(expectation(error - gain.sum(1), paths), actor, critic)
        average_reward += factor * average_rate * float(expectation(dm.sum(1), paths))
        yield OnlineStep((k + 1) * step_size, paths, average_reward)
