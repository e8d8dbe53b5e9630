"""A linear-quadratic problem with everything at once: two dimensions, coefficients of time.

    dX = (A(t) X + B(t) a) dt + S(t) dW,   a ~ N(K X + k, L L'), held over a step
    reward rate X' M(t) X / 2 + m(t)' X + n(t) - a' N(t) a / 2 - temperature log pi(a)
    terminal reward V(horizon, X);  discount, a rate

The reward of the state is chosen so that the policy THETA has, in continuous time, the value
    V(t, x) = x' P(t) x / 2 + e(t)' x + c(t)
that is written down here: all coefficients are polynomials of time. Parameters in a row:
theta = (K, k, lower triangle of L), rows first; rows and pairs are those of ``lq_policies``.
"""

from dataclasses import dataclass, field

import numpy as np

from verification.closed_form.lq_policies import (
    Law,
    Linear,
    affine,
    average_q,
    hessian,
    pairs,
    row,
    with_zeros,
)

DIM = 2
HORIZON = 0.9
NODES = np.array([0.0, 0.35, HORIZON])
LOWER = np.tril_indices(DIM)
GAIN = np.array([[0.4, -0.3], [0.15, -0.55]])
OFFSET = np.array([0.25, -0.4])
SCALE = np.array([[0.6, 0.0], [-0.35, 0.45]])
THETA = np.concatenate([GAIN.ravel(), OFFSET, SCALE[LOWER]])


_FIRST = row(np.array([(-1.3, 0.4), (0.4, -0.75)]), np.array([0.4, -0.7]), 0.3)
_SLOPE = row(np.array([(0.5, -0.1), (-0.1, 0.2)]), np.array([-0.3, 0.2]), -0.45)


def value(t: float) -> tuple[np.ndarray, np.ndarray]:
    """V of the policy THETA and its derivative in time, rows: V is linear in time."""
    return _FIRST + t * _SLOPE, _SLOPE


@dataclass(frozen=True)
class MatrixLQ:
    """The numbers; no symmetry but where costs must have it."""

    drift: np.ndarray = field(default_factory=lambda: np.array([(-0.7, 0.35), (-0.2, 0.3)]))
    push: np.ndarray = field(default_factory=lambda: np.array([(0.9, -0.25), (0.4, 0.65)]))
    noise: np.ndarray = field(default_factory=lambda: np.array([(0.5, 0.2), (-0.3, 0.7)]))
    action_cost: np.ndarray = field(default_factory=lambda: np.array([(0.5, 0.1), (0.1, 0.35)]))
    discount: float = 0.35
    temperature: float = 0.2
    start: tuple[float, float] = (0.75, -0.5)
    last: np.ndarray = field(default_factory=lambda: value(HORIZON)[0])

    @property
    def first(self) -> np.ndarray:
        """At a point."""
        return pairs(np.array(self.start))

    def at(self, t: float) -> Linear:
        """The cost of the state is what V lacks to be a martingale under THETA."""
        still = np.zeros((DIM, DIM))
        free = Linear(
            A=affine(still[0], self.drift * (1 + 0.8 * t)),
            B=with_zeros(self.push * (1 - 0.4 * t)),
            C=affine(self.noise.T * (1 + 0.6 * t), np.stack([still, still])),
            D=np.zeros((DIM, 3, DIM)),
            M=np.zeros((3, 3)),
            N=self.action_cost * (1 + 0.7 * t),
            R=np.zeros((DIM, 3)),
            discount=self.discount,
            temperature=self.temperature,
        )
        return free._replace(M=hessian(average_q(free, self.law(THETA), *value(t))))

    def law(self, theta: np.ndarray) -> Law:
        """N(K x + k, L L')."""
        gain, offset, scale = unpack(theta)
        return Law(gain, offset, scale @ scale.T)


def unpack(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K, k and L."""
    square = DIM**2
    scale = np.zeros((DIM, DIM), dtype=theta.dtype)
    scale[LOWER] = theta[square + DIM :]
    return theta[:square].reshape(DIM, DIM), theta[square : square + DIM], scale
