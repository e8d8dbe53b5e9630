"""Controlled stochastic differential equations, in the sense of Ito or of Stratonovich.

    Ito             dX = b(t, X, a) dt + sigma(t, X) dW
    Stratonovich    dX = b(t, X, a) dt + sigma(t, X) o dW

The same X solves both where b_ito = b_stratonovich + 1/2 sum_j (d sigma_j / dx) sigma_j, sigma_j
the column of the j-th Brownian motion ([KP92] section 4.9).

The control enters the drift, and the diffusion only where that is asked for: with a control-free
diffusion the laws of two policies are equivalent and have a likelihood ratio (``ctrl.girsanov``).

Per-path parameters (a batch of problems) need nothing special: coefficients may be closures over
tensors whose rows are the paths.

Sources  [KP92] Kloeden & Platen, Numerical Solution of Stochastic Differential Equations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require
from ctrl.jumps import Jumps
from ctrl.user_functions import call, like_states, own_memory, require_order, takes

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(time [], states [paths, *event], actions [paths, *action]) -> [paths, *event], state/time."""
Diffusion = Callable[[Tensor, Tensor], Tensor | float]
"""(time [], states [paths, *event]) -> number, [paths, *event] or [paths, dim, noise_dim]."""
ControlledDiffusion = Callable[[Tensor, Tensor, Tensor], Tensor | float]
"""The same of (time, states, actions [paths, *action]), where the control enters the diffusion."""

NOISE_TYPES = ("diagonal", "scalar", "general")
CALCULI = ("ito", "stratonovich")


@dataclass(frozen=True)
class ControlledSDE:
    """dX = b(t, X, a) dt + sigma(t, X) dW.

    Attributes:
        drift: b, in state/time.
        diffusion: sigma, in state/sqrt(time); its shape is what ``noise`` says.
        noise: which Brownian motions drive a path. "diagonal": one for each coordinate, sigma a
            number or [paths, *event]; "scalar": one for all coordinates, sigma the same; "general":
            noise_dim of them, states [paths, dim], sigma [paths, dim, noise_dim].
        noise_dim: number of Brownian motions, the columns of sigma; needed, and allowed, for
            "general" only.
        calculus: the sense of sigma dW, "ito" or "stratonovich". A solver takes the sense that it
            is made for and refuses the other; ``to_ito`` and ``to_stratonovich`` convert.
        controls_diffusion: whether ``diffusion`` takes the action too, as sigma(t, x, a).
        jumps: one kind of jumps, or several, which are added to this (``ctrl.jumps``).
    """

    drift: Drift
    diffusion: Diffusion | ControlledDiffusion
    noise: Literal["diagonal", "scalar", "general"] = "diagonal"
    noise_dim: int | None = None
    calculus: Literal["ito", "stratonovich"] = "ito"
    controls_diffusion: bool = False
    jumps: Jumps | tuple[Jumps, ...] | None = None

    def __post_init__(self) -> None:
        for kind in self.jump_kinds:
            if not isinstance(kind, Jumps):
                raise TypeError(f"jumps must be Jumps or a tuple of them, got {self.jumps!r}")
        for name, arguments in (
            ("drift", "t, x, a"),
            ("diffusion", "t, x, a" if self.controls_diffusion else "t, x"),
        ):
            if not callable(value := getattr(self, name)):
                raise TypeError(
                    f"{name} must be a function of ({arguments}), got {value!r}; a constant is one "
                    f"too: lambda {arguments}: ..."
                )
        if self.noise not in NOISE_TYPES:
            raise ValueError(f"noise must be one of {NOISE_TYPES}, got {self.noise!r}")
        if self.calculus not in CALCULI:
            raise ValueError(f"calculus must be one of {CALCULI}, got {self.calculus!r}")
        if (self.noise == "general") != (self.noise_dim is not None):
            raise ValueError(
                "noise_dim must be given for general noise, as many as a matrix sigma has columns, "
                f"and only then; got {self.noise_dim} for {self.noise} noise: "
                + (
                    "noise_dim=2, say, for sigma [paths, dim, 2]"
                    if self.noise_dim is None
                    else 'noise="general" is that of a matrix'
                )
            )
        if self.noise_dim is not None and (
            isinstance(self.noise_dim, bool) or not isinstance(self.noise_dim, int)
        ):
            raise TypeError(f"noise_dim must be an integer, got {self.noise_dim!r}")
        if self.noise_dim is not None and self.noise_dim < 1:
            raise ValueError(f"noise_dim must be at least 1, got {self.noise_dim}")
        if not takes(self.drift, 3):
            raise TypeError("drift must take three arguments, (t, states, actions)")
        if not takes(self.diffusion, 3 if self.controls_diffusion else 2):
            raise TypeError(
                "diffusion must take (t, states, actions) where controls_diffusion=True"
                if self.controls_diffusion
                else "diffusion must take (t, states); where the action enters it too, say so: "
                "ControlledSDE(..., controls_diffusion=True)"
            )
        require_order("drift", self.drift, "(t, states, actions)")
        require_order("diffusion", self.diffusion, "(t, states)")

    @property
    def jump_kinds(self) -> tuple[Jumps, ...]:
        """Kinds of jumps, of which there may be none."""
        if self.jumps is None:
            return ()
        return self.jumps if isinstance(self.jumps, tuple) else (self.jumps,)

    def require_no_jumps(self, what: str) -> None:
        """Refuse jumps, where something is made for continuous paths.

        Raises:
            ValueError: there are kinds of jumps.
        """
        if self.jump_kinds:
            raise ValueError(
                f"sde.jumps must be None, got {len(self.jump_kinds)} kinds of jumps: {what}"
            )

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
            ValueError: the drift has not the states' shape and dtype, or writes into its inputs.
            TypeError: it is not a tensor.
        """
        value = call("drift", self.drift, t, states, actions)
        like_states("drift", value, states)
        return value

    def diffusion_at(
        self, t: Tensor, states: Float[Tensor, " paths *event"], actions: Tensor | None = None
    ) -> float | Float[Tensor, "..."]:
        """sigma(t, X), or sigma(t, X, a), state/sqrt(time), in a shape that ``noise`` allows.

        Raises:
            ValueError: the diffusion has another shape, or is controlled and no action was given.
            TypeError: it is neither a number nor a tensor.
        """
        value = self._raw_diffusion(t, states, actions)
        if not isinstance(value, (Tensor, Real)):
            raise TypeError(
                f"diffusion must return a number or a tensor, got {type(value).__name__}: "
                "torch.tensor(...).to(x).expand_as(x) is one number for each coordinate of states x"
            )
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        general = (*states.shape, self.noise_dim)
        allowed = (general,) if self.noise == "general" else ((), tuple(states.shape))
        if shape not in allowed:
            raise ValueError(
                f"diffusion must return {' or '.join(str(list(one)) for one in allowed)} for "
                f"{self.noise} noise, got {list(shape)}{self._remedy(shape, tuple(states.shape))}"
            )
        return value

    def _remedy(self, shape: tuple[int, ...], states: tuple[int, ...]) -> str:
        """What makes a diffusion of this shape one that is taken, where that can be told."""
        if self.noise != "general" and len(states) == 2 and shape[:-1] in (states, states[1:]):
            matrices = "" if shape[:-1] == states else ", expanded to [paths, dim, noise_dim]"
            return (
                f': ControlledSDE(..., noise="general", noise_dim={shape[-1]}) takes a matrix for '
                f"each path{matrices}"
            )
        if self.noise == "general" and shape == (*states[1:], self.noise_dim):
            return f": .expand(len(x), {shape[0]}, {shape[1]}) makes it one matrix for each path"
        if self.noise == "general":
            return ": sigma has one row for each coordinate and one column for each of noise_dim"
        if shape in (states[1:], (*states[:-1], 1)):
            return ": .expand_as(x) of states x repeats it, where that is meant"
        if shape == states[:1]:
            return ": .unsqueeze(1).expand_as(x) of states x is one number for each path"
        return ""

    def _raw_diffusion(self, t: Tensor, states: Tensor, actions: Tensor | None) -> Tensor | float:
        if not self.controls_diffusion:
            return call("diffusion", cast(Diffusion, self.diffusion), t, states)
        if actions is None:
            raise ValueError("actions must be given: they control this diffusion")
        controlled = cast(ControlledDiffusion, self.diffusion)
        return call("diffusion", controlled, t, states, actions)

    def diffuse(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        increment: Tensor,
        actions: Tensor | None = None,
    ) -> Float[Tensor, " paths *event"]:
        """What Brownian increments add to the states: sigma(t, X) dW, state."""
        sigma = self.diffusion_at(t, states, actions)
        if self.noise == "diagonal":
            return sigma * increment
        if self.noise == "scalar":
            return sigma * increment.view(-1, *[1] * (states.ndim - 1)).expand_as(states)
        assert isinstance(sigma, Tensor)
        return torch.einsum("pij,pj->pi", sigma, increment)

    def columns(
        self, t: Tensor, states: Float[Tensor, "paths dim"], actions: Tensor | None = None
    ) -> Float[Tensor, "paths dim noise"]:
        """sigma as a matrix, one column for each Brownian motion, whatever ``noise`` is."""
        sigma = as_like(self.diffusion_at(t, states, actions), states)
        if self.noise == "general":
            return sigma
        sigma = sigma.expand_as(states)
        return torch.diag_embed(sigma) if self.noise == "diagonal" else sigma.unsqueeze(-1)

    def noise_drift(
        self, t: Tensor, states: Float[Tensor, " paths *event"], actions: Tensor | None = None
    ) -> Float[Tensor, " paths *event"]:
        """sum_j (d sigma_j / dx) sigma_j, state/time: twice what Ito and Stratonovich differ by.

        By automatic differentiation, so ``diffusion`` must be made of differentiable torch
        operations.

        Raises:
            ValueError: diagonal noise whose sigma_i depends on another coordinate than x_i.
        """
        sigma = self.diffusion_at(t, states, actions)
        if not isinstance(sigma, Tensor) or sigma.ndim == 0:
            return torch.zeros_like(states)

        def diffusion(x: Tensor) -> Tensor:
            return torch.as_tensor(self._raw_diffusion(t, x, actions))

        states = own_memory(states)
        if self.noise == "diagonal":
            return sigma * self._own_derivative(diffusion, states)

        def along(direction: Tensor) -> Tensor:
            return cast(Tensor, torch.func.jvp(diffusion, (states,), (own_memory(direction),))[1])

        if self.noise == "scalar":
            return along(sigma)
        each = zip(sigma.unbind(-1), range(sigma.shape[-1]), strict=True)
        return torch.stack([along(column)[..., j] for column, j in each]).sum(0)

    @staticmethod
    def _own_derivative(
        diffusion: Callable[[Tensor], Tensor], states: Float[Tensor, " paths *event"]
    ) -> Float[Tensor, " paths *event"]:
        """d sigma_i / d x_i: the column sums of a Jacobian J that must be diagonal."""
        sigma, pull = cast(
            tuple[Tensor, Callable[[Tensor], tuple[Tensor]]], torch.func.vjp(diffusion, states)
        )
        derivative = pull(torch.ones_like(sigma))[0]
        # of a diagonal Jacobian: J' w = w (J' 1) for every w
        coordinates = max(1, states[0].numel())
        w = torch.linspace(1, 2, coordinates, dtype=states.dtype, device=states.device)
        w = w.view(states.shape[1:])
        missed = (pull(w.expand_as(sigma).contiguous())[0] - w * derivative).abs().max()
        slack = 1e3 * torch.finfo(states.dtype).eps * derivative.abs().max()
        # not (... > ...): what is not a number is reported where the states are looked at
        require(~(missed > slack), lambda: ValueError(_MIXED))
        return derivative

    def require_calculus(self, calculus: str, solver: str) -> None:
        """Refuse an equation in the other sense.

        Raises:
            ValueError: the sense is not ``calculus``; the message names the conversion.
        """
        if self.calculus != calculus:
            raise ValueError(
                f"{solver} solves {calculus} equations, and sde.calculus is {self.calculus!r}; "
                f"give it sde.to_{calculus}(), or choose another solver"
            )

    def to_ito(self) -> "ControlledSDE":
        """The Ito equation with the same solution."""
        return self if self.calculus == "ito" else self._converted("ito", 0.5)

    def to_stratonovich(self) -> "ControlledSDE":
        """The Stratonovich equation with the same solution."""
        return self if self.calculus == "stratonovich" else self._converted("stratonovich", -0.5)

    def _converted(self, calculus: Literal["ito", "stratonovich"], share: float) -> "ControlledSDE":
        def drift(t: Tensor, states: Tensor, actions: Tensor) -> Tensor:
            correction = self.noise_drift(t, states, actions)
            return self.drift_at(t, states, actions) + share * correction

        return replace(self, drift=drift, calculus=calculus)

    def whiten(
        self,
        t: Tensor,
        states: Float[Tensor, " paths *event"],
        shift: Tensor,
        actions: Tensor | None = None,
    ) -> Float[Tensor, "paths noise"]:
        """The least u that solves sigma(t, X) u = shift: a drift's change in units of the noise.

        Raises:
            ValueError: no such u exists: the diffusion is singular in the direction of ``shift``,
                and the laws have no likelihood ratio (their KL is infinite); or it is not finite.
        """
        sigma = as_like(self.diffusion_at(t, states, actions), states)
        require(
            torch.isfinite(sigma).all(),
            lambda: ValueError(f"diffusion must be finite, but at t = {float(t):g} it is not"),
        )
        if self.noise == "diagonal":
            silent = sigma == 0
            reached = ~(silent & (shift != 0)).any()
            require(reached, lambda: ValueError(_SINGULAR.format(float(t))))
            return (shift / sigma.masked_fill(silent, 1)).reshape(len(states), -1)
        if self.noise == "scalar":
            sigma = sigma.expand_as(states).reshape(len(states), -1, 1)
        return _solve(sigma, shift.reshape(len(states), -1), t)


def _solve(
    sigma: Float[Tensor, "paths dim noise"], shift: Float[Tensor, "paths dim"], t: Tensor
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
    reached = ~(missed > 100 * round_off * scale).any()
    require(reached, lambda: ValueError(_SINGULAR.format(float(t))))
    return u


_MIXED = (
    "diffusion of diagonal noise must give coordinate i from x_i alone where its derivative is "
    "needed; write it as general noise, [paths, dim, noise_dim]"
)
_SINGULAR = (
    "the diffusion is singular at t = {:g} in a direction in which the drifts differ: the laws "
    "have no likelihood ratio and their KL is infinite; change only drifts that the noise can reach"
)
