"""Mean-field linear-quadratic control, and the particles that it is the limit of.

    dX = (A X + A_mean m + B a + f) dt + sigma dW,    m = E X                  (one planner for all)
    running reward   -(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) - m'M_mean m/2  + temperature * entropy
    terminal reward  -(x'Hx/2 + h'x) - m'H_mean m/2

The deviation X - m and the mean m are two problems without the other's terms, both linear-quadratic
([Y13], [BP19]): the first has no linear costs, the second no noise, and A + A_mean, M + M_mean,
H + H_mean. So the optimum is Gaussian and explicit,

    a ~ N(K (x - m) + K_mean m + k, temperature N^{-1}),   V(law) = tr(S Cov)/2 + c + V_mean(m).

n particles with their average in the place of m are the same two problems, exactly: the average has
noise sigma / sqrt(n) and deviations keep sigma sqrt(1 - 1/n). Hence gains do not depend on n, and
values do by 1/n times a constant.

Sources  [Y13] Yong 2013, linear-quadratic optimal control problems for mean-field stochastic
         differential equations, SIAM J. Control and Optimization 51.
         [BP19] Basei & Pham 2019, a weak martingale approach to linear-quadratic McKean-Vlasov
         stochastic control problems, J. Optimization Theory and Applications 181.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.collocation import integrate
from ctrl.linear.gaussian import Gaussian
from ctrl.linear.lq import LinearQuadratic, require_symmetric, times
from ctrl.linear.riccati import FiniteHorizon, solve_lq
from ctrl.policy import DeterministicPolicy, GaussianPolicy
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE


@dataclass(frozen=True, eq=False)
class MeanFieldLQ:
    """A linear-quadratic problem with terms in the mean of the state; costs are what is minimised.

    Attributes:
        lq: the terms of a particle alone; one problem, with C = D = 0.
        A_mean: drift's part in the mean, [state, state], 1/time.
        M_mean: running cost of the mean, symmetric.
        H_mean: terminal cost of the mean, symmetric.
    """

    lq: LinearQuadratic
    A_mean: Float[Tensor, "state state"]
    M_mean: Float[Tensor, "state state"]
    H_mean: Float[Tensor, "state state"]

    def __post_init__(self) -> None:
        if self.lq.A.ndim != 2:
            raise ValueError(f"lq must be one problem, got a batch {list(self.lq.A.shape[:-2])}")
        if bool(self.lq.C.any()) or bool(self.lq.D.any()):
            raise ValueError(
                "lq must have C = 0 and D = 0, noise that is neither scaled by x nor a"
            )
        for name in ("A_mean", "M_mean", "H_mean"):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != self.lq.A.shape or tensor.dtype != self.lq.A.dtype:
                raise ValueError(
                    f"{name} must be {list(self.lq.A.shape)} in float64, as A is, got "
                    f"{list(tensor.shape)} in {tensor.dtype}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} must be finite")
        for name in ("M_mean", "H_mean"):
            require_symmetric(name, getattr(self, name))

    def particles(self, count: int, horizon: float) -> ControlProblem:
        """The problem of ``count`` particles, states [paths, particles, state], for ``simulate``.

        Rewards are averages over the particles, the entropy too. A path is a whole system.

        Args:
            count: at least 1.
            horizon: time.

        Raises:
            ValueError: ``count`` is below 1; or sigma is not diagonal.
        """
        _require_count(count)
        lq, sigma = self.lq, self.lq.sigma
        if sigma.shape[0] != sigma.shape[1] or bool((sigma - torch.diag(sigma.diagonal())).any()):
            raise ValueError(
                f"sigma must be diagonal for particles, got {sigma.tolist()}: choose coordinates "
                "of which each has its own Brownian motion"
            )
        scale = sigma.diagonal()

        def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            A, A_mean, B, f = (each.to(x) for each in (lq.A, self.A_mean, lq.B, lq.f))
            return x @ A.mT + x.mean(1, keepdim=True) @ A_mean.mT + a @ B.mT + f

        def diffusion(t: Tensor, x: Tensor) -> Tensor:
            return scale.to(x).expand_as(x)

        def running_reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            each = lq.running_reward(t, x.flatten(0, 1), a.flatten(0, 1)).view(x.shape[:2])
            return each.mean(1) - _cost(self.M_mean, x.mean(1))

        def terminal_reward(x: Tensor) -> Tensor:
            each = lq.terminal_reward(x.flatten(0, 1)).view(x.shape[:2])
            return each.mean(1) - _cost(self.H_mean, x.mean(1))

        return ControlProblem(
            ControlledSDE(drift, diffusion),
            horizon,
            running_reward,
            terminal_reward,
            discount=float(lq.rates[0]),
            temperature=float(lq.rates[1]) / count,
        )


def _cost(matrix: Tensor, mean: Float[Tensor, "paths state"]) -> Float[Tensor, " paths"]:
    return 0.5 * (mean * times(matrix.to(mean), mean)).sum(1)


def _require_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"particles must be an integer of at least 1, got {count!r}")


@dataclass(frozen=True, eq=False)
class MeanFieldSolution:
    """The optimum, for a number of particles or in their limit.

    Attributes:
        problem: whose.
        deviation: of X - m: gain K and, with c, what noise and entropy add.
        mean: of m: gain K_mean, offset k.
        particles: their number; None for infinitely many.
    """

    problem: MeanFieldLQ
    deviation: FiniteHorizon
    mean: FiniteHorizon
    particles: int | None

    def actions(
        self, t: Tensor, states: Float[Tensor, "*paths state"], mean: Float[Tensor, "*means state"]
    ) -> Float[Tensor, "*paths action"]:
        """The mean action K (x - m) + K_mean m + k.

        Args:
            t: time, [].
            states: x.
            mean: m, that broadcasts against ``states``.
        """
        apart, together = self.deviation.law_at(t), self.mean.law_at(t)
        return times(apart.gain.to(states), states - mean) + together.mean(mean)

    def policy(self) -> DeterministicPolicy | GaussianPolicy:
        """The policy of all particles, m their average; states [paths, particles, state].

        Raises:
            ValueError: the temperature is positive and N not diagonal.
        """

        def mean(t: Tensor, x: Tensor) -> Tensor:
            return self.actions(t, x, x.mean(1, keepdim=True))

        lq = self.problem.lq
        if not bool(lq.rates[1] > 0):
            return DeterministicPolicy(mean)
        if bool((lq.N - torch.diag(lq.N.diagonal())).any()):
            raise ValueError("N must be diagonal, or the actions of a particle are dependent")
        std = (lq.rates[1] / lq.N.diagonal()).sqrt()
        if len(std) == 1:
            return GaussianPolicy(mean, float(std))
        if self.particles is None:
            raise ValueError("particles must be a number where an action has several coordinates")
        return GaussianPolicy(mean, std.expand(self.particles, len(std)))

    def value(
        self, t: Tensor, states: Float[Tensor, "paths particles state"]
    ) -> Float[Tensor, " paths"]:
        """V(t, x) of particles: the average over deviations, and the value of their average."""
        mean = states.mean(1)
        apart = self.deviation.value_at(t)
        each = (states - mean.unsqueeze(1)).flatten(0, 1)
        return apart(each).view(states.shape[:2]).mean(1) + self.mean.value_at(t)(mean)

    def value_of(self, t: Tensor, law: Gaussian) -> Float[Tensor, ""]:
        """V(t, law), the limit of many particles with this law: tr(S Cov)/2 + c + V_mean(m)."""
        apart = self.deviation.value_at(t)
        spent = 0.5 * (apart.hessian * law.covariance).sum((-2, -1)) + apart.constant
        return spent + self.mean.value_at(t)(law.mean)

    def laws(self, start: Gaussian) -> Gaussian:
        """Mean and covariance of X at the nodes under the optimum, in the limit of many particles.

        m' = (A + A_mean + B K_mean) m + B k + f, and the covariance's Lyapunov equation of A + B K.

        Args:
            start: the law at the first node.
        """
        lq, n = self.problem.lq, self.problem.lq.A.shape[-1]
        nodes, begin = self.mean.times, self.mean.times[0]

        def rate(t: Tensor, y: Tensor) -> Tensor:
            m, C = y[..., :n], y[..., n:].unflatten(-1, (n, n))
            together, apart = self.mean.law_at(begin + t), self.deviation.law_at(begin + t)
            moved = times(lq.A + self.problem.A_mean, m) + times(lq.B, together.mean(m)) + lq.f
            both = (lq.A + lq.B @ apart.gain) @ C
            grown = both + both.mT + lq.sigma @ lq.sigma.mT
            return torch.cat([moved, grown.flatten(-2)], dim=-1)

        first = torch.cat([start.mean, start.covariance.flatten()])
        solved = integrate(rate, first, float(self.mean.times[-1] - begin))(nodes - begin)
        return Gaussian(solved[..., :n], solved[..., n:].unflatten(-1, (n, n)))


def solve(
    problem: MeanFieldLQ, times: Float[Tensor, " nodes"], particles: int | None = None
) -> MeanFieldSolution:
    """The optimal value and policy over a finite horizon, by two Riccati equations ([Y13]).

    Args:
        problem: to solve.
        times: increasing; the last is the horizon.
        particles: their number, for which the answer is exact too; None for infinitely many.

    Raises:
        ValueError: as ``linear.solve_lq``, for the deviation or for the mean.
    """
    share = 0.0
    if particles is not None:
        _require_count(particles)
        share = 1 / particles
    lq, zero = problem.lq, torch.zeros_like
    apart = replace(
        lq,
        sigma=lq.sigma * math.sqrt(1 - share),
        p=zero(lq.p),
        l=zero(lq.l),
        h=zero(lq.h),
        f=zero(lq.f),
    )
    together = replace(
        lq,
        A=lq.A + problem.A_mean,
        M=lq.M + problem.M_mean,
        H=lq.H + problem.H_mean,
        sigma=lq.sigma * math.sqrt(share),
        temperature=zero(lq.rates[1]),
    )
    return MeanFieldSolution(problem, solve_lq(apart, times), solve_lq(together, times), particles)
