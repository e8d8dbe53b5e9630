"""Smooth differential equations solved to round-off, with an answer at every time.

    y' = rate(t, y),  y(0) given,  on [0, horizon]

On a panel of time, y is a Chebyshev polynomial through its values at the Chebyshev points. Where
these are known in closed form they are asked for (``follow``). Else p' is the interpolant of
rate(t, p) at the points, by Picard's iteration, which is one batched evaluation of ``rate`` a
sweep (``integrate``, [CN63]). A panel on which the iteration or the polynomial's coefficients have
not converged to round-off is halved: panels are what halving [0, horizon] leads to. The answer is
differentiable in everything that the values and the start depend on, and in time.

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

Panel = Callable[[float, int, Tensor], Tensor | None]
"""(begin, halvings, y at begin) -> y at the points of [begin, begin + horizon / 2^halvings],
[nodes, *batch, dim]; None where they are not resolved."""

DEGREE = 16
SWEEPS = 20  # a panel that needs more is halved
CONVERGED = 1e-14  # last change of a sweep, relative to the largest entry of y on the panel
RESOLVED = 1e-13  # last two coefficients of the polynomial, relative to the sum of all
HALVINGS = 30  # of the horizon at most
HOLD = 4  # panels after one that was too wide, before a wider one is tried

POINTS = -np.cos(np.pi * np.arange(DEGREE + 1) / DEGREE)  # from -1 to 1
_TO_COEFFICIENTS = np.linalg.inv(chebyshev.chebvander(POINTS, DEGREE))
INTEGRATION = chebyshev.chebvander(POINTS, DEGREE + 1) @ chebyshev.chebint(
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

    def covers(self, t: Float[Tensor, "*times"]) -> Tensor:
        """Whether times are from 0 to the horizon, up to the precision of float32."""
        slack = 1e-6 * self.breaks[-1]
        return (t >= -slack) & (t <= self.breaks[-1] + slack)

    def __call__(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times_batch dim"]:
        """y at times of any shape; NaN before 0 and after the horizon."""
        at = t.detach()
        k = torch.searchsorted(self.breaks[1:-1].contiguous(), at.contiguous())
        begin, end = self.breaks[k], self.breaks[k + 1]
        u = (2 * t - begin - end) / (end - begin)
        u = torch.where(self.covers(at), u, torch.nan)
        u = u[(..., *[None] * (self.coefficients.ndim - 2))]
        first, *others = self.coefficients[k].movedim(t.ndim, 0)
        one, two, double = torch.zeros_like(first), torch.zeros_like(first), 2 * u
        for coefficient in reversed(others):  # Clenshaw's recurrence
            one, two = coefficient + double * one - two, one
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
    points, integration = (start.detach().new_tensor(each) for each in (POINTS, INTEGRATION))

    def panel(begin: float, halvings: int, y: Tensor) -> Tensor | None:
        half = 0.5 * horizon / 2**halvings
        return _picard(rate, begin + half * (points + 1), y, half * integration)

    return follow(panel, start, horizon)


def follow(panel: Panel, start: Float[Tensor, "*batch dim"], horizon: float) -> Trajectory:
    """The function on [0, horizon] whose values on a panel follow from that at its beginning.

    Args:
        panel: the values.
        start: the value at 0, float64.
        horizon: time.

    Raises:
        FiniteEscapeError: no panel is narrow enough for a polynomial.
    """
    to_coefficients = start.detach().new_tensor(_TO_COEFFICIENTS)
    begin, halvings, y = 0.0, 0, start  # begin and widths are parts of the horizon, exactly
    breaks, panels, hold = [0.0], list[Tensor](), 0
    while begin < 1:
        while begin % 0.5**halvings or begin + 0.5**halvings > 1:
            halvings += 1
        panel_values = panel(begin * horizon, halvings, y)
        coefficients = (
            None if panel_values is None else torch.tensordot(to_coefficients, panel_values, 1)
        )
        if panel_values is not None and coefficients is not None and _resolved(coefficients):
            begin += 0.5**halvings
            breaks.append(begin * horizon)
            panels.append(coefficients)
            y, hold = panel_values[-1], hold - 1
            if hold < 0 and halvings and _resolved(coefficients, doubled=True):
                halvings -= 1
        else:
            halvings, hold = halvings + 1, HOLD
            if halvings > HALVINGS:
                raise FiniteEscapeError(begin * horizon)
    return Trajectory(start.detach().new_tensor(breaks), torch.stack(panels))


def _resolved(coefficients: Float[Tensor, "terms *batch dim"], doubled: bool = False) -> bool:
    """Whether the last two coefficients are nothing; or would be on a panel twice as wide.

    Coefficients fall like r^-k, and twice the width halves r: the last become the middle's square
    times 2^DEGREE.
    """
    size = coefficients.detach().abs().amax(-1)  # [terms, *batch]
    largest = size.sum(0) + torch.finfo(size.dtype).tiny  # bounds y
    last = (size[DEGREE // 2] / largest).square() * 2**DEGREE if doubled else size[-2:] / largest
    return bool((last <= RESOLVED).all())


def _picard(
    rate: Rate, times: Tensor, start: Tensor, integration: Tensor
) -> Float[Tensor, "nodes *batch dim"] | None:
    """y at the points of a panel; None if that takes more than SWEEPS."""
    y = start.expand(len(times), *start.shape)
    for _ in range(SWEEPS):
        after = start + torch.tensordot(integration, rate(times, y), 1)
        change = (after - y).detach().abs().amax((0, -1))
        size, y = _size(after), after
        if not bool(torch.isfinite(size).all()):
            return None
        if bool((change <= CONVERGED * size).all()):
            # once more for the derivatives, which lag behind
            return start + torch.tensordot(integration, rate(times, y), 1)
    return None


def _size(y: Float[Tensor, "nodes *batch dim"]) -> Float[Tensor, "*batch"]:
    return y.detach().abs().amax((0, -1)) + torch.finfo(y.dtype).tiny
