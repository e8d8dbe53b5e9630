"""Smooth differential equations solved to round-off, with an answer at every time.

    y' = rate(t, y),  y(0) given,  on [0, horizon]

On a panel of time, y is a Chebyshev polynomial p whose derivative is the interpolant of rate(t, p)
at the Chebyshev points; it is found by Picard's iteration, which is one batched evaluation of
``rate`` a sweep. A panel on which the iteration or the polynomial's coefficients have not converged
to round-off is halved. The answer is differentiable in everything that ``rate`` and the start
depend on, and in time.

Sources  [CN63] Clenshaw & Norton 1963, the solution of nonlinear ordinary differential equations in
         Chebyshev series, Computer Journal 6.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import chebyshev
from torch import Tensor

Rate = Callable[[Tensor, Tensor], Tensor]
"""(times [nodes], y [nodes, *batch, dim]) -> [nodes, *batch, dim], 1/time."""

DEGREE = 16
SWEEPS = 20  # a panel that needs more is halved
CONVERGED = 1e-14  # last change of a sweep, relative to the largest entry of y on the panel
RESOLVED = 1e-13  # last two coefficients of the polynomial, likewise
NARROWEST = 1e-9  # panel, relative to the horizon

_POINTS = -np.cos(np.pi * np.arange(DEGREE + 1) / DEGREE)  # from -1 to 1
_TO_COEFFICIENTS = np.linalg.inv(chebyshev.chebvander(_POINTS, DEGREE))
_INTEGRATION = chebyshev.chebvander(_POINTS, DEGREE + 1) @ chebyshev.chebint(
    _TO_COEFFICIENTS, lbnd=-1
)  # values at the points -> values there of the interpolant's integral from -1


class FiniteEscapeError(ValueError):
    """The solution explodes (or is too stiff to follow) at ``time``."""

    def __init__(self, time: float):
        self.time = time
        super().__init__(f"the solution explodes, or is too stiff to follow, at time {time:.6g}")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """y(t) at any time: sum_k coefficients[panel, k] T_k, T_k Chebyshev on the panel.

    Attributes:
        breaks: where the panels begin and end.
        coefficients: of every panel.
    """

    breaks: Float[Tensor, " breaks"]
    coefficients: Float[Tensor, "panels terms *batch dim"]

    def __call__(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times_batch dim"]:
        """y at times of any shape; NaN before 0 and after the horizon."""
        at = t.detach()
        k = torch.searchsorted(self.breaks[1:-1].contiguous(), at.contiguous())
        begin, end = self.breaks[k], self.breaks[k + 1]
        u = (2 * t - begin - end) / (end - begin)
        slack = 1e-6 * self.breaks[-1]  # times may have been float32
        inside = (at >= -slack) & (at <= self.breaks[-1] + slack)
        u = torch.where(inside, u, torch.nan)
        u = u[(..., *[None] * (self.coefficients.ndim - 2))]
        first, *others = self.coefficients[k].movedim(t.ndim, 0)
        one, two = torch.zeros_like(first), torch.zeros_like(first)
        for coefficient in reversed(others):  # Clenshaw's recurrence
            one, two = coefficient + 2 * u * one - two, one
        return first + u * one - two


def integrate(rate: Rate, start: Float[Tensor, "*batch dim"], horizon: float) -> Trajectory:
    """The solution on [0, horizon].

    Args:
        rate: analytic in both of its arguments; batch members do not mix.
        start: y(0), float64.
        horizon: time.

    Raises:
        FiniteEscapeError: there is no solution up to the horizon.
    """
    points, to_coefficients, integration = (
        start.detach().new_tensor(each) for each in (_POINTS, _TO_COEFFICIENTS, _INTEGRATION)
    )
    breaks, panels = [0.0], list[Tensor]()
    width, y = horizon, start
    while (begin := breaks[-1]) < horizon:
        end = begin + width if begin + width < horizon * (1 - 1e-12) else horizon
        half = 0.5 * (end - begin)
        found, sweeps = _picard(rate, begin + half * (points + 1), y, half * integration)
        coefficients = torch.tensordot(to_coefficients, found, 1)
        tail = coefficients[-2:].detach().abs().amax((0, -1))
        if sweeps > SWEEPS or not bool((tail <= RESOLVED * _size(found)).all()):
            width = half
            if width < NARROWEST * horizon:
                raise FiniteEscapeError(begin)
            continue
        breaks.append(end)
        panels.append(coefficients)
        y = found[-1]
        width = 2 * half if sweeps > SWEEPS // 2 else 4 * half
    return Trajectory(start.detach().new_tensor(breaks), torch.stack(panels))


def _picard(
    rate: Rate, times: Tensor, start: Tensor, integration: Tensor
) -> tuple[Float[Tensor, "nodes *batch dim"], int]:
    """y at the points of a panel, and the sweeps it took (more than SWEEPS: not found)."""
    y = start.expand(len(times), *start.shape)
    for sweep in range(1, SWEEPS + 1):
        after = start + torch.tensordot(integration, rate(times, y), 1)
        change = (after - y).detach().abs().amax((0, -1))
        size, y = _size(after), after
        if not bool(torch.isfinite(size).all()):
            return y, SWEEPS + 1
        if bool((change <= CONVERGED * size).all()):
            # once more for the derivatives, which lag behind
            return start + torch.tensordot(integration, rate(times, y), 1), sweep
    return y, SWEEPS + 1


def _size(y: Float[Tensor, "nodes *batch dim"]) -> Float[Tensor, "*batch"]:
    return y.detach().abs().amax((0, -1)) + torch.finfo(y.dtype).tiny
