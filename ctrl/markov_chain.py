"""The Markov chain on a grid that approximates a controlled diffusion ([KD01] chapter 5).

    L^a v(x) = b . grad v + 1/2 tr(sigma sigma' Hess v)  ~  sum_y rate(x, y, a) (v(y) - v(x))

over neighbours y of x. With non-negative rates the scheme is monotone, so that it converges to the
(viscosity) solution of the control problem. Along a coordinate with spacing h the differences are

    central, order 2                 where the noise allows it: sigma^2 >= |b| h
    with the least artificial noise that keeps the rates non-negative elsewhere: sigma^2 is replaced
    by |b| h, which is upwind differencing, order 1, where there is no noise at all.

Correlated noise goes along the diagonals of a cell: along the one on which the two noises agree in
sign, where the covariance is diagonally dominant in units of the spacings, and where it is not
along wider moves (``ctrl.wide_stencil``); or, for central differences throughout, along both
diagonals with opposite signs, of order 2 and for any.

Where the problem has a domain, points that are not inside are absorbing: v is there what is paid at
the exit (Dirichlet's condition). Put points onto its walls, or v is off by O(spacing).

Sources  [KD01] Kushner & Dupuis 2001, numerical methods for stochastic control problems in
         continuous time, 2nd edition.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse  # pyright: ignore[reportMissingTypeStubs]  # scipy has none
import scipy.sparse.linalg as splinalg  # pyright: ignore[reportMissingTypeStubs]  # nor here
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctrl.problem import ControlProblem
from ctrl.state_grid import Axis, grid_points, neighbours
from ctrl.wide_stencil import wide_moves

_ROWS = 2**18  # states and actions that are evaluated at once: tens of megabytes


@dataclass(frozen=True, eq=False)
class MarkovChain:
    """Rates and rewards of every action at every point of a grid.

    Attributes:
        neighbours: index of the point that each move leads to, [moves, points].
        rates: of each move, 1/time, [moves, actions, points].
        rewards: running reward, reward/time, [actions, points].
        absorbing: points at which the chain ends, if there are any; they have rates and rewards 0.
        paid: what is paid there, reward; 0 elsewhere.
    """

    neighbours: Tensor
    rates: Float[Tensor, "moves actions points"]
    rewards: Float[Tensor, "actions points"]
    absorbing: Bool[Tensor, " points"] | None = None
    paid: Float[Tensor, " points"] | None = None

    def residual(
        self,
        best: Float[Tensor, " points"],
        rate: float | Float[Tensor, " points"],
        v: Float[Tensor, " points"],
    ) -> Float[Tensor, " points"]:
        """best - rate v, or paid - v at absorbing points: 0 for the solution."""
        inside = best - rate * v
        if self.absorbing is None or self.paid is None:
            return inside
        return torch.where(self.absorbing, self.paid - v, inside)

    def hamiltonian(self, v: Float[Tensor, " points"]) -> Float[Tensor, "actions points"]:
        """r + L^a v, reward/time."""
        total = self.rewards.clone()
        for neighbour, rate in zip(self.neighbours, self.rates, strict=True):
            total.addcmul_(rate, v[neighbour] - v)
        return total

    def resolvent(
        self,
        mass: Float[Tensor, "actions points"],
        rate: float | Float[Tensor, " points"],
        source: Float[Tensor, " points"],
    ) -> Float[Tensor, " points"]:
        """The solution v of rate v - L v = source, L averaged over actions with ``mass``.

        At absorbing points v = source.
        """
        moves, points = self.neighbours.shape
        averaged = (self.rates * mass).sum(1)  # [moves, points]
        here = np.arange(points)
        leaves = rate + averaged.sum(0)
        if self.absorbing is not None:
            leaves = torch.where(self.absorbing, 1, leaves)
        values = np.concatenate([-averaged.numpy().ravel(), leaves.numpy()])
        rows = np.concatenate([np.tile(here, moves), here])
        columns = np.concatenate([self.neighbours.numpy().ravel(), here])
        matrix = sparse.csc_matrix((values, (rows, columns)), shape=(points, points))
        return torch.from_numpy(splinalg.splu(matrix).solve(source.numpy()))


def markov_chain(
    problem: ControlProblem,
    axes: tuple[Axis, ...],
    t: float,
    actions: Float[Tensor, " actions #points *action"],
    *,
    monotone: bool = True,
) -> MarkovChain:
    """The chain of a problem at one time.

    Args:
        problem: whose functions are called on [rows, dim] states and [rows, *action] actions.
        axes: of the grid, one or two.
        t: time.
        actions: at each point, or for all points, float64.
        monotone: whether artificial noise keeps the rates non-negative. Central differences
            without it are of order 2 everywhere, take noise of any correlation, and may oscillate
            where the solution has layers of the width of a cell.

    Raises:
        ValueError: drift, diffusion or reward has a wrong shape or is not finite, or the noise is
            correlated too strongly for a monotone scheme on this grid.
    """
    points = grid_points(axes)
    absorbing = absorbing_points(problem, axes, t)
    asked = points
    if absorbing is not None:  # on a wall the coefficients need not be finite
        asked = torch.where(absorbing.unsqueeze(1), points[~absorbing][:1], points)
    actions = actions.expand(actions.shape[0], len(points), *actions.shape[2:])
    at_once = max(1, _ROWS // len(points))
    parts = [_coefficients(problem, t, asked, some) for some in actions.split(at_once)]
    drift, covariance, rewards = (torch.cat(part) for part in zip(*parts, strict=True))
    moves, rates = _rates(axes, drift, covariance, monotone)
    reached = torch.stack([neighbours(axes, move) for move in moves])
    if absorbing is None:
        return MarkovChain(reached, rates, rewards)
    paid = exit_rewards(problem, t, points, absorbing)
    rates, rewards = (torch.where(absorbing, 0, each) for each in (rates, rewards))
    return MarkovChain(reached, rates, rewards, absorbing, paid)


def absorbing_points(
    problem: ControlProblem, axes: tuple[Axis, ...], t: float
) -> Bool[Tensor, " points"] | None:
    """Points of the grid that are not inside the problem's domain; None where it has none.

    Raises:
        ValueError: all points are inside, so that the walls are beyond the grid; or none is.
    """
    if problem.domain is None:
        return None
    points = grid_points(axes)
    distance = problem.domain.signed_distance(points.new_tensor(t), points)
    # a node on a wall may be inside by round-off
    outside = distance <= 1e-9 * min(axis.spacing for axis in axes)
    if bool(outside.all()) or not bool(outside.any()):
        where = "outside" if bool(outside.all()) else "inside"
        raise ValueError(
            f"axes must reach from inside the problem's domain to its walls, but at t = {t:g} all "
            f"points are {where}; put the first or the last node of an axis onto a wall"
        )
    return outside


def exit_rewards(
    problem: ControlProblem, t: float, points: Tensor, absorbing: Tensor
) -> Float[Tensor, " points"]:
    """What is paid at absorbing points, 0 at others."""
    at = points[absorbing]
    paid = at.new_zeros(len(at))
    if problem.exit_reward is not None:
        paid = problem.exit_reward(at.new_full((len(at),), t), at)
    elif problem.terminal_reward is not None:
        paid = problem.terminal_reward(at)
    if paid.shape != at.shape[:1] or not bool(torch.isfinite(paid).all()):
        raise ValueError(
            f"what is paid at an exit must be [{len(at)}] finite numbers, one for each state, got "
            f"{list(paid.shape)}"
        )
    return points.new_zeros(len(points)).masked_scatter(absorbing, paid.to(points))


def _coefficients(
    problem: ControlProblem, t: float, points: Tensor, actions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """b [actions, points, dim], sigma sigma' [.., dim, dim] and r [..]."""
    many, (n, dim) = len(actions), points.shape
    time = points.new_tensor(t)
    x = points.expand(many, n, dim).reshape(-1, dim)
    a = actions.reshape(many * n, *actions.shape[2:])
    b = problem.dynamics.drift_at(time, x, a)
    sigma = problem.dynamics.columns(time, x, a).to(x)
    r = x.new_zeros(len(x))
    if problem.running_reward is not None:
        r = problem.running_reward(time, x, a)
        if r.shape != x.shape[:1]:
            raise ValueError(
                f"running_reward must return [{len(x)}], one for each state, got {list(r.shape)}"
            )
    for name, values in (("drift", b), ("diffusion", sigma), ("running_reward", r)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite on the grid, at t = {t:g} it is not")
    covariance = sigma @ sigma.mT
    return b.view(many, n, dim), covariance.view(many, n, dim, dim), r.to(x).view(many, n)


def _is_too_correlated(axes: tuple[Axis, ...], covariance: Tensor, cross: Tensor) -> bool:
    """Whether moves to the neighbours alone would have a negative rate somewhere."""
    noises = [covariance[..., i, i] / (2 * axis.spacing**2) for i, axis in enumerate(axes)]
    return any(bool((noise - cross.abs() < -1e-12 * noise.abs().max()).any()) for noise in noises)


def _rates(
    axes: tuple[Axis, ...], drift: Tensor, covariance: Tensor, monotone: bool
) -> tuple[list[tuple[int, ...]], Tensor]:
    """Moves, and their rates [moves, actions, points]."""
    moves: list[tuple[int, ...]] = []
    rates: list[Tensor] = []
    diagonal = covariance.new_zeros(covariance.shape[:2])
    wide: list[Tensor] | None = None  # noise along the axes, where moves off them are wide
    if len(axes) == 2:
        cross = covariance[..., 0, 1] / (2 * axes[0].spacing * axes[1].spacing)
        if bool(cross.any()):
            moves += [(1, 1), (-1, -1), (1, -1), (-1, 1)]
            if monotone and _is_too_correlated(axes, covariance, cross):
                h = covariance.new_tensor([axis.spacing for axis in axes])
                moves, rates, wide = wide_moves(covariance / (h[:, None] * h))
            elif monotone:
                diagonal = cross.abs()  # of the noise along the axes it takes this part
                rates += 2 * [cross.clamp(min=0)] + 2 * [(-cross).clamp(min=0)]
            else:
                rates += 2 * [0.5 * cross] + 2 * [-0.5 * cross]
    shape = [axis.nodes for axis in axes]
    for i, axis in enumerate(axes):
        h = axis.spacing
        noise = covariance[..., i, i] / (2 * h * h)
        diffusive = noise - diagonal if wide is None else wide[i]
        diffusive, pull = diffusive.clamp(min=0), drift[..., i] / (2 * h)
        full = torch.maximum(diffusive, pull.abs()) if monotone else diffusive
        for sign in (1, -1):
            rate = (full + sign * pull).unflatten(1, shape).clone()
            if not axis.periodic:
                inner, outer = (0, -1)[::sign]  # noise is mirrored and outward drift ends at a wall
                inward = torch.maximum(2 * diffusive, 2 * sign * pull).unflatten(1, shape)
                rate.select(i + 1, inner).copy_(inward.select(i + 1, inner))
                rate.select(i + 1, outer).zero_()
            moves.append(tuple(sign if j == i else 0 for j in range(len(axes))))
            rates.append(rate.flatten(1))
    return moves, torch.stack(rates)
