"""Equations whose coefficients switch between regimes at random times.

    dX = b(t, X, a, I) dt + sigma(t, X, I) dW,   I jumps from i to j at the rate rates_ij(t, X, a)

The regime is the last coordinate of the state, a number 0, 1, ..., and its switches are jumps of
the SDE (``ctrl.jumps``), one kind for each regime that is switched to. So whatever takes jumps
takes regimes: roll-outs, the generator

    L V(t, x, i) = (L_i V(., i))(t, x) + sum_j rates_ij (V(t, x, j) - V(t, x, i))   ([YZ10] 2.4)

and the likelihood ratio of two policies that move the rates. A step holds the rates of its left
end and is of weak order 1; where two switches fall into one step the later kind has the last word.

Sources  [YZ10] Yin & Zhu 2010, Hybrid Switching Diffusions.
         [CFT13] Costa, Fragoso & Todorov 2013, Continuous-Time Markov Jump Linear Systems.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctrl.jumps import Jumps
from ctrl.linear.lq import LinearQuadratic, times
from ctrl.linear.riccati import FiniteHorizon, require_rates
from ctrl.policy import DeterministicPolicy
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE

Drift = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(time [], x [paths, dim], actions, regimes [paths]) -> [paths, dim], state/time."""
Diffusion = Callable[[Tensor, Tensor, Tensor], Tensor | float]
"""(time, x, regimes) -> number or [paths, dim], or [paths, dim, noise_dim] of general noise."""
Rates = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(time, x, actions, regimes) -> [paths, regimes], to each regime, 1/time; to its own: not used."""


def join(x: Float[Tensor, "paths dim"], regimes: Tensor | int) -> Float[Tensor, "paths more"]:
    """States of the switching equation, from those without regimes and the regimes."""
    last = torch.as_tensor(regimes, device=x.device).expand(len(x)).to(x.dtype)
    return torch.cat([x, last.unsqueeze(1)], dim=1)


def split(
    states: Float[Tensor, "paths more"],
) -> tuple[Float[Tensor, "paths dim"], Int[Tensor, " paths"]]:
    """States without their regimes, and these."""
    return states[:, :-1], states[:, -1].detach().round().long()


def regime_switching(
    drift: Drift,
    diffusion: Diffusion,
    rates: Rates | Float[Tensor, "regimes regimes"],
    regimes: int,
    *,
    noise: Literal["diagonal", "general"] = "diagonal",
    noise_dim: int | None = None,
) -> ControlledSDE:
    """The switching equation of states (x, regime), [paths, dim + 1].

    Args:
        drift: b.
        diffusion: sigma.
        rates: of switching, a function, or a matrix that is the same at all times.
        regimes: how many, at least 2.
        noise: of x, as for ``ControlledSDE``.
        noise_dim: of general noise.

    Raises:
        ValueError: there are fewer than two regimes, or a rate is negative or not finite.
    """
    if isinstance(regimes, bool) or not isinstance(regimes, int) or regimes < 2:
        raise ValueError(f"regimes must be an integer of at least 2, got {regimes!r}")
    moves = require_rates(rates, (regimes,)) if isinstance(rates, Tensor) else None

    def rates_at(t: Tensor, x: Tensor, a: Tensor, i: Tensor) -> Tensor:
        if moves is not None:
            return moves.to(x)[i]
        assert not isinstance(rates, Tensor)
        given = rates(t, x, a, i)
        if given.shape != (len(x), regimes):
            raise ValueError(
                f"rates must return [{len(x)}, {regimes}], one to each regime, got "
                f"{list(given.shape)}"
            )
        return given

    def kind(j: int) -> Jumps:
        def intensity(t: Tensor, states: Tensor, a: Tensor) -> Tensor:
            x, i = split(states)
            return torch.where(i == j, 0.0, rates_at(t, x, a, i)[:, j])

        def sizes(t: Tensor, states: Tensor, a: Tensor, marks: Tensor) -> Tensor:
            return join(torch.zeros_like(states[:, :-1]), j - states[:, -1])

        return Jumps(intensity, sizes)

    def whole_drift(t: Tensor, states: Tensor, a: Tensor) -> Tensor:
        x, i = split(states)
        return join(drift(t, x, a, i), 0)

    def whole_diffusion(t: Tensor, states: Tensor) -> Tensor:
        x, i = split(states)
        sigma = diffusion(t, x, i)
        if noise == "diagonal":
            return join(torch.as_tensor(sigma).to(x).expand_as(x), 0)
        assert isinstance(sigma, Tensor)
        return torch.nn.functional.pad(sigma, (0, 0, 0, 1))

    kinds = tuple(kind(j) for j in range(regimes))
    return ControlledSDE(whole_drift, whole_diffusion, noise, noise_dim, jumps=kinds)


def switching_problem(
    lq: LinearQuadratic,
    rates: Rates | Float[Tensor, "regimes regimes"],
    horizon: float = math.inf,
) -> ControlProblem:
    """A linear-quadratic problem for each regime, as one problem of states (x, regime).

    Args:
        lq: the regimes' problems, a batch [regimes], without noise in proportion to the action.
        rates: of switching.
        horizon: time; may be infinite where there is no terminal cost.

    Raises:
        ValueError: ``lq`` is no batch, its temperature is not 0, or the action scales the noise.
    """
    if lq.A.ndim != 3 or bool(lq.D.any()) or bool(lq.rates[1].any()):
        raise ValueError(
            "lq must be a batch [regimes] of problems without temperature and without D, got "
            f"a batch {list(lq.A.shape[:-2])}"
        )

    def drift(t: Tensor, x: Tensor, a: Tensor, i: Tensor) -> Tensor:
        A, B, f = (each.to(x)[i] for each in (lq.A, lq.B, lq.f))
        return times(A, x) + times(B, a) + f

    def diffusion(t: Tensor, x: Tensor, i: Tensor) -> Tensor:
        C, sigma = lq.C.to(x)[i], lq.sigma.to(x)[i]
        return times(C, x.unsqueeze(-2)).mT + sigma

    def running(t: Tensor, states: Tensor, a: Tensor) -> Tensor:
        x, i = split(states)
        return _of(lq, i).running_reward(t, x, a)

    def terminal(states: Tensor) -> Tensor:
        x, i = split(states)
        return _of(lq, i).terminal_reward(x)

    def discount(t: Tensor, states: Tensor) -> Tensor:
        return lq.rates[0].to(states)[split(states)[1]]

    sde = regime_switching(
        drift, diffusion, rates, len(lq.A), noise="general", noise_dim=lq.sigma.shape[-1]
    )
    ends = bool(lq.H.any()) or bool(lq.h.any())
    return ControlProblem(sde, horizon, running, terminal if ends else None, discount)


def switching_value(solution: FiniteHorizon, t: Tensor, states: Tensor) -> Float[Tensor, " paths"]:
    """V(t, x, i) of ``linear.solve_lq_switching``, reward; differentiable in t and x."""
    x, i = split(states)
    value = solution.value_at(t)
    S, e, c = (each.to(states)[i] for each in (value.hessian, value.slope, value.constant))
    return (x * (0.5 * times(S, x) + e)).sum(-1) + c


def switching_policy(solution: FiniteHorizon) -> DeterministicPolicy:
    """The optimal policy of ``linear.solve_lq_switching``, on states (x, regime)."""

    def mean(t: Tensor, states: Tensor) -> Tensor:
        x, i = split(states)
        law = solution.law_at(t)
        return times(law.gain.to(x)[i], x) + law.offset.to(x)[i]

    return DeterministicPolicy(mean)


def _of(lq: LinearQuadratic, i: Tensor) -> LinearQuadratic:
    """The problem of each path."""
    parts = {name: getattr(lq, name)[i] for name in ("A", "B", "sigma", "M", "N", "R", "p", "l")}
    return LinearQuadratic(**parts, H=lq.H[i], h=lq.h[i])
