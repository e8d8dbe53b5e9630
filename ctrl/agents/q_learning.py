"""q-learning, offline over whole paths and online over single steps ([JZ23] Algorithms 1 to 4).

The pair (V, q) is learned together; q satisfies its constraint by construction, so there is no
policy to improve beside it: with ``GibbsQ(policy, temperature)`` the policy's parameters are q's.

Sources  [JZ23] Jia & Zhou 2023, q-learning in continuous time, JMLR 24.
"""

from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Generator, Tensor
from torch.optim import Optimizer

from ctrl.agents.descent import descend, expectation
from ctrl.agents.online import OnlineStep, one_step_paths
from ctrl.paths import Paths
from ctrl.policy import RandomPolicy
from ctrl.problem import ControlProblem
from ctrl.q_learning import QRate, increments, orthogonality_loss
from ctrl.solvers import Solver
from ctrl.value import Value

Loss = Callable[[Value, QRate, ControlProblem, Paths], Tensor]
"""(value, q, problem, paths) -> one number a path."""


def q_learning(
    problem: ControlProblem,
    value: Value,
    q: QRate,
    sample: Callable[[], Paths],
    optimiser: Optimizer,
    updates: int,
    *,
    loss: Loss = orthogonality_loss,
) -> Iterator[Paths]:
    """Learn value and q-rate together, from paths of their policy or of any other.

    Args:
        problem: which pays.
        value: to learn.
        q: to learn; ``GibbsQ`` or ``ConsistentQ``.
        sample: fresh paths, or old ones.
        optimiser: of the parameters of both.
        updates: how many.
        loss: ``q_learning.orthogonality_loss`` or ``q_learning.martingale_loss``.

    Yields:
        The paths of every update, after it.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    for _ in range(updates):
        paths = sample()
        descend(expectation(loss(value, q, problem, paths), paths), optimiser)
        yield paths


def online_q_learning(
    problem: ControlProblem,
    policy: RandomPolicy,
    value: Value,
    q: QRate,
    start: Float[Tensor, " paths *event"],
    step_size: float,
    steps: int,
    optimiser: Optimizer,
    generator: Generator,
    *,
    average_reward: float = 0.0,
    average_rate: float = 1.0,
    schedule: Callable[[float], float] = lambda time: 1.0,
    solver: Solver | None = None,
) -> Iterator[OnlineStep]:
    """Ergodic q-learning, one update for every step of time ([JZ23] Algorithm 4).

        dM = V(X') - V(X) + (r - q - average) h
        theta += d_theta V dM,   psi += d_psi q dM,   average += average_rate dM

    Args:
        problem: ergodic, time-homogeneous: infinite horizon, no discount.
        policy: that acts; q's own Gibbs policy (on-policy) or another.
        value: to learn, without a constant.
        q: to learn.
        start: of the parallel paths; their gradients are averaged.
        step_size: h, time.
        steps: how many.
        optimiser: of the parameters of value and q; learning rates are per unit of time.
        generator: of all randomness.
        average_reward: first estimate, reward/time.
        average_rate: its learning rate, 1/time.
        schedule: time -> factor on the learning rates.
        solver: one-step map.

    Yields:
        Every step, after its update.

    Raises:
        ValueError: the problem has an end or a discount.
        FloatingPointError: a loss or gradient is not finite.
    """
    full = [(group, group["lr"]) for group in optimiser.param_groups]
    walk = one_step_paths(problem, policy, start, step_size, steps, generator, solver)
    for k, paths in enumerate(walk):
        factor = schedule(k * step_size)
        for group, rate in full:
            group["lr"] = rate * factor
        dm = increments(value, q, problem, paths, average_reward).detach()
        error = orthogonality_loss(value, q, problem, paths, average_reward)
        descend(expectation(error, paths), optimiser)
        average_reward += factor * average_rate * float(expectation(dm.sum(1), paths))
        yield OnlineStep((k + 1) * step_size, paths, average_reward)
