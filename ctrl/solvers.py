"""One-step maps, and which of them have a transition density."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ctrl.sde import ControlledSDE


@runtime_checkable
class Solver(Protocol):
    """A one-step map; a diffusion sampler is one too. Times come in the grid's own precision."""

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """States at t1 from states at t0, the action held in between, given W(t1) - W(t0)."""
        ...


@runtime_checkable
class TransitionSolver(Solver, Protocol):
    """A solver whose step is Gaussian: step = mean + std * increment / sqrt(t1 - t0)."""

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean [paths, *event] and standard deviation ([] or [paths, *event]) of the next."""
        ...


@dataclass(frozen=True)
class EulerMaruyama:
    """X + b h + sigma dW: strong order 1/2 (1 for additive noise), weak order 1."""

    def step(
        self,
        sde: ControlledSDE,
        t0: Tensor,
        t1: Tensor,
        states: Tensor,
        action: Tensor,
        increment: Tensor,
    ) -> Tensor:
        """One step."""
        t = t0.to(states)
        moved = states + float(t1 - t0) * sde.drift_at(t, states, action)
        return moved + sde.spread(t, states, increment)

    def transition(
        self, sde: ControlledSDE, t0: Tensor, t1: Tensor, states: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next state, for diagonal noise.

        Raises:
            ValueError: the noise is not diagonal, so the next state's coordinates are dependent.
        """
        if sde.noise != "diagonal":
            raise ValueError(
                f"sde must have diagonal noise, got {sde.noise}: the next state's coordinates are "
                "dependent; use girsanov.log_ratio, which takes any noise"
            )
        t, h = t0.to(states), float(t1 - t0)
        sigma = torch.as_tensor(
            sde.diffusion_at(t, states), dtype=states.dtype, device=states.device
        )
        return states + h * sde.drift_at(t, states, action), sigma.abs() * math.sqrt(h)


def require_transition(solver: Solver) -> TransitionSolver:
    """The solver, if it has a transition density.

    Raises:
        TypeError: it has none; the message names the remedy.
    """
    if isinstance(solver, TransitionSolver):
        return solver
    raise TypeError(
        f"{type(solver).__name__} has no transition density; use EulerMaruyama or a DDIM with "
        "eta > 0, or treat drawn actions as the decision (GaussianPolicy.log_prob)"
    )
