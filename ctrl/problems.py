"""Ready problems with known answers, to try an algorithm on.

Sources  [JZ22b] Jia & Zhou 2022, policy gradient and actor-critic in continuous time and space,
         JMLR 23.
         [WZ20] Wang & Zhou 2020, continuous-time mean-variance portfolio selection: a reinforcement
         learning framework, Mathematical Finance 30.
         [WZZ20] Wang, Zariphopoulou & Zhou 2020, reinforcement learning in continuous time and
         space: a stochastic control approach, JMLR 21.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl.linear import LinearQuadratic, solve_lq_discounted, solve_lq_ergodic
from ctrl.policy import (
    DeterministicPolicy,
    GaussianPolicy,
    MultivariateGaussianPolicy,
)
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE
from ctrl.value import Value


@dataclass(frozen=True, eq=False)
class SolvedProblem:
    """A problem and its answer.

    Attributes:
        problem: to simulate and to learn on; states and actions are [paths, 1].
        optimal_policy: for its temperature.
        value: the optimal V(t, x), [paths]; up to a constant where the reward is averaged.
        average_reward: the best, per unit of time, entropy included; of ergodic problems only.
    """

    problem: ControlProblem
    optimal_policy: DeterministicPolicy | GaussianPolicy | MultivariateGaussianPolicy
    value: Value
    average_reward: float | None = None


@dataclass(frozen=True, eq=False)
class MeanVariancePortfolio:
    """Least variance of terminal wealth at a given mean.

    Attributes:
        problem: with the multiplier in its terminal reward -(x - w)^2 + (w - z)^2; states (wealth)
            and actions (money in the stock) are [paths, 1], both discounted.
        optimal_policy: for its temperature.
        value: the optimal V(t, x), [paths].
        multiplier: w, at which the mean of terminal wealth under the optimal policy is the target.
        terminal_mean: z, money.
        terminal_variance: of wealth at the horizon under the optimal policy, money^2.
    """

    problem: ControlProblem
    optimal_policy: DeterministicPolicy | GaussianPolicy
    value: Value
    multiplier: float
    terminal_mean: float
    terminal_variance: float


def exploratory_lq_benchmark(temperature: float = 0.1) -> SolvedProblem:
    """The ergodic linear-quadratic problem of [JZ22b] section 6, whose control moves the noise.

    dX = -X dt + a dW, reward -(x^2 + x a + a^2 + x + 2 a) per unit of time, averaged. At the
    paper's temperature 0.1 the optimal policy is N(-0.354249 x - 0.708497, 0.035425); the best
    average reward is 0.708497, of which drawing the actions costs temperature / 2.

    Args:
        temperature: reward per nat of entropy and unit of time.
    """
    lq = LinearQuadratic(
        A=_matrix(-1.0),
        B=_matrix(0.0),
        sigma=_matrix(0.0),
        M=_matrix(2.0),
        N=_matrix(2.0),
        R=_matrix(1.0),
        p=_vector(1.0),
        l=_vector(2.0),
        D=_matrix(1.0).unsqueeze(0),
        temperature=temperature,
    )
    solution = solve_lq_ergodic(lq)
    assert solution.average_reward is not None
    average = float(solution.average_reward)
    return SolvedProblem(lq.problem(), solution.policy(), solution.value, average)


def ornstein_uhlenbeck_tracking(
    *,
    pull: float = 1.2,
    level: float = 0.5,
    noise: float = 0.7,
    target: float = -0.4,
    state_cost: float = 1.5,
    action_cost: float = 0.8,
    discount: float = 0.3,
    temperature: float = 0.1,
) -> SolvedProblem:
    """A mean-reverting state, steered to a target without end ([WZZ20] section 4.3).

    dX = (pull (level - X) + a) dt + noise dW, reward -(state_cost (x - target)^2 + action_cost a^2)
    / 2 per unit of time, discounted.

    Args:
        pull: 1/time; negative values push away.
        level: that the state returns to by itself.
        noise: state/sqrt(time).
        target: to which the state should go.
        state_cost: reward/state^2/time.
        action_cost: positive, reward/action^2/time.
        discount: positive, 1/time.
        temperature: reward per nat of entropy and unit of time.

    Raises:
        ValueError: a number is out of its range, or the problem has no finite value.
    """
    # linear-quadratic in the distance to the target
    lq = LinearQuadratic(
        A=_matrix(-pull),
        B=_matrix(1.0),
        sigma=_matrix(noise),
        M=_matrix(state_cost),
        N=_matrix(action_cost),
        f=_vector(pull * (level - target)),
        discount=discount,
        temperature=temperature,
    )
    solution = solve_lq_discounted(lq)
    policy = solution.policy()

    def mean(t: Tensor, x: Tensor) -> Tensor:
        return policy.mean(t, x - target)

    def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return -0.5 * (state_cost * (x - target).square() + action_cost * a.square()).sum(-1)

    problem = ControlProblem(
        ControlledSDE(lambda t, x, a: pull * (level - x) + a, lambda t, x: noise),
        horizon=math.inf,
        running_reward=reward,
        discount=discount,
        temperature=temperature,
    )
    if isinstance(policy, DeterministicPolicy):
        optimal = DeterministicPolicy(mean)
    else:
        optimal = GaussianPolicy(mean, math.sqrt(float(solution.law.covariance)))
    return SolvedProblem(problem, optimal, lambda t, x: solution.value(t, x - target))


def mean_variance_portfolio(
    *,
    sharpe_ratio: float = 0.6,
    volatility: float = 0.25,
    horizon: float = 1.0,
    wealth: float = 1.0,
    target: float = 1.4,
    temperature: float = 0.1,
) -> MeanVariancePortfolio:
    """Mean-variance portfolio selection with exploration ([WZ20] Theorem 3.1).

    Discounted wealth dX = volatility a (sharpe_ratio dt + dW), a the discounted money in the stock;
    the reward is -(X_T - w)^2 + (w - target)^2 at the horizon, which for the right multiplier w has
    the optimum of: least variance at E[X_T] = target. With rho the Sharpe ratio and s the
    volatility,

        pi*(t, x) = N( -(rho / s) (x - w), temperature / (2 s^2) e^{rho^2 (T - t)} ).

    Args:
        sharpe_ratio: excess return over volatility, 1/sqrt(time), not 0.
        volatility: of the stock, 1/sqrt(time), positive.
        horizon: T, time.
        wealth: at time 0, money, from which w is computed.
        target: mean of terminal wealth, discounted.
        temperature: reward (money^2) per nat of entropy and unit of time.

    Raises:
        ValueError: a number is out of its range.
    """
    numbers = {"sharpe_ratio": sharpe_ratio, "volatility": volatility, "horizon": horizon}
    numbers |= {"wealth": wealth, "target": target, "temperature": temperature}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    if sharpe_ratio == 0:
        raise ValueError("sharpe_ratio must not be 0, or no portfolio moves the mean")
    if volatility <= 0:
        raise ValueError(f"volatility must be positive, got {volatility}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if horizon <= 0:
        raise ValueError(f"horizon must be positive, got {horizon}")

    speed = sharpe_ratio**2
    growth = math.exp(speed * horizon)
    w = (target * growth - wealth) / (growth - 1)
    cold = temperature == 0
    precision = 0.0 if cold else math.log(volatility**2 / (math.pi * temperature))

    def value(t: Tensor, x: Tensor) -> Tensor:
        left = horizon - t
        distance = (x - w).square().sum(-1) * torch.exp(-speed * left)
        drawn = 0.25 * speed * (horizon**2 - t**2) - 0.5 * (speed * horizon - precision) * left
        return (w - target) ** 2 - distance - temperature * drawn

    def mean(t: Tensor, x: Tensor) -> Tensor:
        return -(sharpe_ratio / volatility) * (x - w)

    def std(t: Tensor) -> Tensor:
        return math.sqrt(0.5 * temperature) / volatility * torch.exp(0.5 * speed * (horizon - t))

    sde = ControlledSDE(
        lambda t, x, a: volatility * sharpe_ratio * a,
        lambda t, x, a: volatility * a,
        noise="scalar",
        controls_diffusion=True,
    )
    problem = ControlProblem(
        sde,
        horizon,
        terminal_reward=lambda x: (w - target) ** 2 - (x - w).square().sum(-1),
        temperature=temperature,
    )
    return MeanVariancePortfolio(
        problem=problem,
        optimal_policy=DeterministicPolicy(mean) if cold else GaussianPolicy(mean, std),
        value=value,
        multiplier=w,
        terminal_mean=target,
        terminal_variance=(target - wealth) ** 2 / (growth - 1) + 0.5 * temperature * horizon,
    )


def _matrix(number: float) -> Tensor:
    return torch.tensor([[number]], dtype=torch.float64)


def _vector(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float64)
