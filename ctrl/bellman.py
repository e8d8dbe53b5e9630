"""The Bellman equation of a Markov chain in continuous time, and its solution.

    rate v = best(r + L v) + source        best = max over actions, or gam log int exp( . / gam) da

Policy iteration solves it: with the policy that is best for v, solve the linear equation of that
policy's value. That is Newton's method on this equation, so its convergence is quadratic; on a
monotone chain it is monotone too, from any start ([KD01] chapter 6).

Sources  [KD01] Kushner & Dupuis 2001, numerical methods for stochastic control problems in
         continuous time, 2nd edition.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.markov_chain import MarkovChain

Improvement = Callable[[Tensor], tuple[Tensor, Tensor]]
"""H [actions, points] -> its best mean, entropy paid [points]; the masses [actions, points]."""


@dataclass(frozen=True, eq=False)
class Solved:
    """A solution of the Bellman equation at one time.

    Attributes:
        v: value, [points].
        mass: probabilities of the best policy, [actions, points].
        residual: largest violation of the equation, reward/time.
        iterations: that it took.
    """

    v: Float[Tensor, " points"]
    mass: Float[Tensor, "actions points"]
    residual: float
    iterations: int


@dataclass(frozen=True)
class PolicyIteration:
    """Howard's iteration, in the form of Newton's: v + (rate - L)^{-1} residual.

    Attributes:
        tolerance: largest last change of v, in units of 1 + max |v|.
        iterations: allowed.
    """

    tolerance: float
    iterations: int

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            raise ValueError(f"tolerance must be positive and finite, got {self.tolerance}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def solve(
        self,
        chain: MarkovChain,
        improve: Improvement,
        rate: float | Float[Tensor, " points"],
        source: Float[Tensor, " points"],
        v: Float[Tensor, " points"],
    ) -> Solved:
        """The solution of rate v = best(r + L v) + source; at absorbing points, what is paid.

        Args:
            chain: r and L of every action.
            improve: best.
            rate: positive, 1/time, at every point where it differs; may be 0 where the chain is
                absorbed.
            source: reward/time.
            v: to start from.

        Raises:
            RuntimeError: no convergence.
        """
        best, mass = improve(chain.hamiltonian(v))
        residual = chain.residual(best + source, rate, v)
        for count in range(1, self.iterations + 1):
            change = chain.resolvent(mass, rate, residual)
            v = v + change
            best, mass = improve(chain.hamiltonian(v))
            residual = chain.residual(best + source, rate, v)
            if bool(change.abs().max() <= self.tolerance * (1 + v.abs().max())):
                return Solved(v, mass, float(residual.abs().max()), count)
        raise RuntimeError(
            f"no convergence in {self.iterations} policy iterations: the equation is violated by "
            f"{float(residual.abs().max()):g} reward/time; allow more, or use monotone differences"
        )


def greedy(H: Float[Tensor, "actions points"]) -> tuple[Tensor, Tensor]:
    """The maximum over actions, and all mass on the first that attains it."""
    best, index = H.max(0)
    return best, torch.zeros_like(H).scatter_(0, index.unsqueeze(0), 1.0)


def gibbs(weights: Float[Tensor, " actions"], temperature: float) -> Improvement:
    """gam log int exp(H / gam) da, and the masses of the Gibbs policy.

    Args:
        weights: of the quadrature rule over actions.
        temperature: gam, positive.
    """
    log_weights = weights.log().unsqueeze(1)

    def improve(H: Tensor) -> tuple[Tensor, Tensor]:
        logits = H / temperature + log_weights
        normaliser = logits.logsumexp(0)
        return temperature * normaliser, (logits - normaliser).exp()

    return improve


def backward(
    at: Callable[[float], tuple[MarkovChain, Improvement]],
    times: Float[Tensor, " times"],
    terminal: Float[Tensor, " points"],
    discount: Callable[[float], float | Tensor],
    method: PolicyIteration,
    order: int,
) -> Iterator[Solved]:
    """v_t + best(r + L v) - discount v = 0 at each time, from the last to the first.

    Args:
        at: the chain and the improvement of a time.
        times: equally spaced.
        terminal: v at the last time.
        discount: of a time, 1/time; a number or [points].
        method: for each time.
        order: 1, backward Euler; or 2, backward differentiation after a first step of Euler's.

    Raises:
        RuntimeError: no convergence.
    """
    h = float(times[-1] - times[0]) / (len(times) - 1)
    *earlier, last = times.tolist()
    v = before = terminal
    chain, improve = at(last)
    yield Solved(v, improve(chain.hamiltonian(v))[1], 0.0, 0)
    for k, t in enumerate(reversed(earlier)):
        chain, improve = at(t)
        if order == 1 or k == 0:  # v_t = (later - v) / h
            slope, source, guess = 1 / h, v / h, v
        else:  # v_t = (4 later - latest - 3 v) / (2 h)
            slope, source, guess = 1.5 / h, (4 * v - before) / (2 * h), 2 * v - before
        solved = method.solve(chain, improve, discount(t) + slope, source, guess)
        before, v = v, solved.v
        yield solved
