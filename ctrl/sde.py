"""Controlled stochastic differential equations, in the sense of Ito.

    dX = b(t, X, a) dt + sigma(t, X) dW

The control enters the drift; the diffusion is control-free, so that the laws of two policies are
equivalent and have a likelihood ratio (``ctrl.girsanov``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths, *event], state/time."""
Diffusion = Callable[[Tensor, Tensor], Tensor | float]
"""(time [], states [paths, *event]) -> float, [paths, *event] or [paths, dim, noise_dim]."""

NOISE_TYPES = ("diagonal", "scalar", "general")


@dataclass(frozen=True)
class ControlledSDE:
    """dX = b(t, X, a) dt + sigma(t, X) dW.

    Attributes:
        drift: b, in state/time.
        diffusion: sigma, in state/sqrt(time). A number, or what ``noise`` says.
        noise: "diagonal": one Brownian motion for each coordinate, sigma [paths, *event] or a
        number;
            "scalar": one for all coordinates of a path, sigma [paths, *event] or a number;
            "general": noise_dim of them, events are vectors, sigma [paths, dim, noise_dim].
        noise_dim: number of Brownian motions; needed, and allowed, for "general" only.
    """

    drift: Drift
    diffusion: Diffusion
    noise: Literal["diagonal", "scalar", "general"] = "diagonal"
    noise_dim: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.drift) or not callable(self.diffusion):
            raise TypeError("drift and diffusion must be functions of (t, x, a) and of (t, x)")
        if self.noise not in NOISE_TYPES:
            raise ValueError(f"noise must be one of {NOISE_TYPES}, got {self.noise!r}")
        if (self.noise == "general") != (self.noise_dim is not None):
            raise ValueError(
                f"noise_dim must be given for general noise, and only then; got {self.noise_dim} "
                f"for "
                f"{self.noise}"
            )
        if self.noise_dim is not None and self.noise_dim < 1:
            raise ValueError(f"noise_dim must be at least 1, got {self.noise_dim}")

    def noise_shape(self, event: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one Brownian increment of one path with states of shape ``event``.

        Raises:
            ValueError: general noise drives vectors only.
        """
        if self.noise == "diagonal":
            return event
        if self.noise == "scalar":
            return ()
        if len(event) != 1:
            raise ValueError(f"general noise drives states [paths, dim], got events {event}")
        assert self.noise_dim is not None
        return (self.noise_dim,)

    def spread(
        self, t: Tensor, states: Float[Tensor, " paths *event"], increment: Tensor
    ) -> Float[Tensor, " paths *event"]:
        """sigma(t, X) dW."""
        sigma = self.diffusion(t, states)
        if self.noise == "diagonal":
            return sigma * increment
        if self.noise == "scalar":
            return sigma * increment.view(-1, *[1] * (states.ndim - 1)).expand_as(states)
        assert isinstance(sigma, Tensor)
        return torch.einsum("pij,pj->pi", sigma, increment)

    def whiten(
        self, t: Tensor, states: Float[Tensor, " paths *event"], shift: Tensor
    ) -> Float[Tensor, "paths noise"]:
        """The u that solves sigma(t, X) u = shift: a drift's change in units of the noise.

        Raises:
            ValueError: no such u exists: the diffusion is singular in the direction of ``shift``,
            and
                the laws have no likelihood ratio (their KL is infinite).
        """
        sigma = self.diffusion(t, states)
        if self.noise == "diagonal":
            sigma = torch.as_tensor(sigma, dtype=states.dtype, device=states.device)
            if bool(((sigma == 0) & (shift != 0)).any()):
                raise ValueError(_SINGULAR.format(float(t)))
            return torch.where(shift == 0, shift, shift / sigma).flatten(1)
        if self.noise == "scalar":
            column = torch.as_tensor(sigma, dtype=states.dtype, device=states.device)
            column = column.expand_as(states).flatten(1)[:, :, None]
        else:
            assert isinstance(sigma, Tensor)
            column = sigma
        # by singular values: lstsq of a rank-deficient matrix depends on the driver
        left, values, right = torch.linalg.svd(column, full_matrices=False)
        kept = values > values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps * max(
            column.shape[-2:]
        )
        flat = shift.flatten(1)
        along = torch.einsum("pij,pi->pj", left, flat)
        u = torch.einsum("pji,pj->pi", right, torch.where(kept, along / values, 0 * along))
        reached = torch.einsum("pij,pj->pi", column, u)
        allowed = 1e3 * torch.finfo(flat.dtype).eps * flat.abs().amax(-1, keepdim=True)
        if bool(((reached - flat).abs() > allowed).any()):
            raise ValueError(_SINGULAR.format(float(t)))
        return u


_SINGULAR = (
    "the diffusion is singular at t = {:g} in a direction in which the drifts differ: the laws "
    "have no "
    "likelihood ratio and their KL is infinite; change only drifts that the noise can reach"
)
