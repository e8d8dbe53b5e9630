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
"""(time [], states [paths, *event]) -> number, [paths, *event] or [paths, dim, noise_dim]."""

NOISE_TYPES = ("diagonal", "scalar", "general")


@dataclass(frozen=True)
class ControlledSDE:
    """dX = b(t, X, a) dt + sigma(t, X) dW.

    Attributes:
        drift: b, in state/time.
        diffusion: sigma, in state/sqrt(time); its shape is what ``noise`` says.
        noise: which Brownian motions drive a path. "diagonal": one for each coordinate, sigma a
            number or [paths, *event]; "scalar": one for all coordinates, sigma the same; "general":
            noise_dim of them, states [paths, dim], sigma [paths, dim, noise_dim].
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
                f"for {self.noise} noise"
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

    def drift_at(
        self, t: Tensor, states: Float[Tensor, " paths *event"], actions: Tensor
    ) -> Float[Tensor, " paths *event"]:
        """b(t, X, a), state/time, refused where adding it to the states would broadcast or cast.

        Raises:
            ValueError: the drift has not the states' shape and dtype.
        """
        value = self.drift(t, states, actions)
        if value.shape != states.shape or value.dtype != states.dtype:
            raise ValueError(
                f"drift must return {list(states.shape)} in {states.dtype}, as the states are, got "
                f"{list(value.shape)} in {value.dtype}"
            )
        return value

    def diffusion_at(
        self, t: Tensor, states: Float[Tensor, " paths *event"]
    ) -> float | Float[Tensor, "..."]:
        """sigma(t, X), state/sqrt(time), in a shape that ``noise`` allows.

        Raises:
            ValueError: the diffusion has another shape.
        """
        value = self.diffusion(t, states)
        shape = value.shape if isinstance(value, Tensor) else ()
        general = (*states.shape, self.noise_dim)
        allowed = (general,) if self.noise == "general" else ((), tuple(states.shape))
        if tuple(shape) not in allowed:
            raise ValueError(
                f"diffusion must return {' or '.join(str(list(one)) for one in allowed)} for "
                f"{self.noise} noise, got {list(shape)}"
            )
        return value

    def spread(
        self, t: Tensor, states: Float[Tensor, " paths *event"], increment: Tensor
    ) -> Float[Tensor, " paths *event"]:
        """sigma(t, X) dW."""
        sigma = self.diffusion_at(t, states)
        if self.noise == "diagonal":
            return sigma * increment
        if self.noise == "scalar":
            return sigma * increment.view(-1, *[1] * (states.ndim - 1)).expand_as(states)
        assert isinstance(sigma, Tensor)
        return torch.einsum("pij,pj->pi", sigma, increment)

    def whiten(
        self, t: Tensor, states: Float[Tensor, " paths *event"], shift: Tensor
    ) -> Float[Tensor, "paths noise"]:
        """The least u that solves sigma(t, X) u = shift: a drift's change in units of the noise.

        Raises:
            ValueError: no such u exists: the diffusion is singular in the direction of ``shift``,
                and the laws have no likelihood ratio (their KL is infinite); or it is not finite.
        """
        sigma = torch.as_tensor(
            self.diffusion_at(t, states), dtype=states.dtype, device=states.device
        )
        if not bool(torch.isfinite(sigma).all()):
            raise ValueError(f"diffusion must be finite, but at t = {float(t):g} it is not")
        if self.noise == "diagonal":
            silent = sigma == 0
            if bool((silent & (shift != 0)).any()):
                raise ValueError(_SINGULAR.format(float(t)))
            return (shift / sigma.masked_fill(silent, 1)).reshape(len(states), -1)
        if self.noise == "scalar":
            sigma = sigma.expand_as(states).reshape(len(states), -1, 1)
        return _solve(sigma, shift.reshape(len(states), -1), float(t))


def _solve(
    sigma: Float[Tensor, "paths dim noise"], shift: Float[Tensor, "paths dim"], t: float
) -> Float[Tensor, "paths noise"]:
    """By singular values: lstsq of a rank-deficient matrix depends on the driver."""
    left, values, right = torch.linalg.svd(sigma, full_matrices=False)
    round_off = torch.finfo(values.dtype).eps * max(sigma.shape[-2:])
    largest = values.amax(-1, keepdim=True)
    inverse = values.masked_fill(values <= round_off * largest, torch.inf).reciprocal()
    u = torch.einsum("pji,pj->pi", right, inverse * torch.einsum("pij,pi->pj", left, shift))
    missed = (torch.einsum("pij,pj->pi", sigma, u) - shift).abs().amax(-1)
    # a solve is backward stable: it misses by round-off of |sigma| |u|, times a modest constant
    scale = largest[:, 0] * u.norm(dim=-1) + shift.norm(dim=-1)
    if bool((missed > 100 * round_off * scale).any()):
        raise ValueError(_SINGULAR.format(t))
    return u


_SINGULAR = (
    "the diffusion is singular at t = {:g} in a direction in which the drifts differ: the laws "
    "have no likelihood ratio and their KL is infinite; change only drifts that the noise can reach"
)
