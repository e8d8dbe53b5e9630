"""Exploratory linear-quadratic control, by completed squares, matrix exponentials and moments.

    dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + sigma_j) dW_j
    reward   -(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) + temperature * entropy, discounted
    terminal -(x'Hx/2 + h'x)

A value is x'Sx/2 + e'x + c, a policy N(K x + k, Sigma). sigma, C and D have the Brownian motion as
their first index here. Of (1, x), as in ``lq_policies``, there are no affine terms.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.integrate
import scipy.linalg

from verification.answers import remembered
from verification.closed_form import complex_steps, lq_policies
from verification.closed_form.lq_policies import (
    Law,
    Linear,
    Number,
    affine,
    bordered,
    earned,
    motion,
    paid,
    pairs,
    row,
    with_zeros,
)


@dataclass(frozen=True)
class LQ:
    """The numbers of a problem."""

    A: np.ndarray
    B: np.ndarray
    sigma: np.ndarray
    M: np.ndarray
    N: np.ndarray
    R: np.ndarray
    p: np.ndarray
    l: np.ndarray  # noqa: E741  # the literature's name
    H: np.ndarray
    h: np.ndarray
    f: np.ndarray
    C: np.ndarray
    D: np.ndarray
    discount: float
    temperature: float

    def of_pairs(self) -> Linear:
        """The same problem of (1, x)."""
        return Linear(
            A=affine(self.f, self.A),
            B=with_zeros(self.B),
            C=affine(self.sigma, self.C),
            D=with_zeros(self.D),
            M=bordered(self.M, self.p, 0.0),
            N=self.N,
            R=np.column_stack([self.l, self.R]),
            discount=self.discount,
            temperature=self.temperature,
        )


Quadratic = tuple[np.ndarray, np.ndarray, float]
"""S, e, c."""


def example(*, noise_moves: bool = True) -> LQ:
    """Two states, two actions, two Brownian motions; every coefficient, none 0, 1 or repeated.

    Args:
        noise_moves: whether state and action enter the diffusion (C and D are not 0).
    """
    return LQ(
        A=np.array([[-0.7, 0.4], [-0.25, 0.15]]),
        B=np.array([[0.9, -0.35], [0.2, 0.65]]),
        sigma=np.array([[0.6, 0.12], [-0.28, 0.53]]),
        M=np.array([[1.3, 0.21], [0.21, 0.75]]),
        N=np.array([[0.8, -0.14], [-0.14, 0.57]]),
        R=np.array([[0.11, -0.06], [0.08, 0.17]]),
        p=np.array([0.31, -0.47]),
        l=np.array([-0.23, 0.37]),
        H=np.array([[0.95, -0.18], [-0.18, 1.45]]),
        h=np.array([-0.41, 0.29]),
        f=np.array([0.26, -0.33]),
        C=noise_moves * np.array([[[0.19, -0.09], [0.07, 0.24]], [[-0.13, 0.16], [0.22, 0.04]]]),
        D=noise_moves * np.array([[[0.34, 0.1], [-0.15, 0.27]], [[0.05, -0.2], [0.3, 0.13]]]),
        discount=0.36,
        temperature=0.22,
    )


def q_rate(lq: LQ, value: Quadratic, slope: Quadratic, x: np.ndarray, a: np.ndarray) -> Any:
    """d_t V + b . grad V + tr(sigma sigma' Hess V) / 2 + r - discount V at x and actions.

    Args:
        lq: the problem.
        value: V.
        slope: its derivative in time.
        x: state.
        a: actions [..., actions].
    """
    return lq_policies.q_rate(lq.of_pairs(), row(*value), row(*slope), x, a)


def _square(p: Linear, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W and G of q = a'G y - a'Wa/2 + ..., y = (1, x), for V = y'Py/2."""
    DP = p.D.swapaxes(1, 2) @ P
    return p.N - (DP @ p.D).sum(0), p.B.T @ P - p.R + (DP @ p.C).sum(0)


def soft_maximum(lq: LQ, value: Quadratic, slope: Quadratic, x: np.ndarray) -> float:
    """gam log int exp(q / gam) da = max_a q + (gam / 2) log det(2 pi gam W^{-1}); no e in it."""
    W, G = _square(lq.of_pairs(), lq_policies.hessian(row(*value)))
    best = np.linalg.solve(W, G @ lq_policies.with_one(x))
    log_det = np.linalg.slogdet(2 * math.pi * lq.temperature * np.linalg.inv(W))[1]
    return float(q_rate(lq, value, slope, x, best) + lq.temperature / 2 * log_det)


# ---- the optimum over a finite horizon, in two ways


def riccati_rate(lq: LQ, y: np.ndarray) -> np.ndarray:
    """max over policies of L V + r - discount V + entropy's share, V = (S, e, c) in a row.

    Analytic in y, so that complex steps differentiate it.
    """
    return _riccati_rate(lq.of_pairs(), y)


def _riccati_rate(p: Linear, y: np.ndarray) -> np.ndarray:
    S, e, c = _parts(y, len(p.A) - 1)
    P = bordered(S, e, 2 * c)
    W, G = _square(p, P)
    rate = p.A.T @ P + P @ p.A + (p.C.swapaxes(1, 2) @ P @ p.C).sum(0) - p.M - p.discount * P
    rate = rate + G.T @ np.linalg.solve(W, G)
    if p.temperature:
        volume = (2 * np.pi * p.temperature) ** len(W) / np.linalg.det(W)
        rate[0, 0] += p.temperature * np.log(volume)
    return np.concatenate([rate[1:, 1:].ravel(), rate[0, 1:], [rate[0, 0] / 2]])


def _parts(y: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, Number]:
    return y[: n * n].reshape(n, n), y[n * n : -1], y[-1]


@remembered
def riccati(lq: LQ, horizon: float) -> Quadratic:
    """The optimal value at time to go ``horizon``: the completed square, by DOP853."""
    p = lq.of_pairs()
    solution = scipy.integrate.solve_ivp(
        lambda _, y: _riccati_rate(p, y),
        (0, horizon),
        np.concatenate([-lq.H.ravel(), -lq.h, [0.0]]),
        method="DOP853",
        rtol=3e-14,
        atol=1e-14,
    )
    S, e, c = _parts(solution.y[:, -1], len(lq.A))
    return S, e, float(c)


@remembered
def riccati_by_exponential(lq: LQ, horizon: float, nodes: int = 14) -> Quadratic:
    """The same where C and D are 0: Radon's linear system in (x, 1), and Gauss-Legendre for c."""
    n, p = len(lq.A), lq.of_pairs()
    one, back = np.eye(n + 1), np.linalg.solve(p.N, p.R)
    A, M = p.A - p.discount / 2 * one - p.B @ back, p.M - p.R.T @ back
    # P = -S solves P' = A'P + P A - P B N^{-1} B' P + M in time to go; P = Y X^{-1}
    radon = np.block([[-A, p.B @ np.linalg.solve(p.N, p.B.T)], [M, A.T]])
    begin = np.vstack([one, bordered(lq.H, lq.h, 0.0)])

    def at(s: float) -> np.ndarray:
        X, Y = np.split(scipy.linalg.expm(s * radon) @ begin, 2)
        return -np.linalg.solve(X.T, Y.T)

    volume = np.linalg.slogdet(2 * np.pi * p.temperature * np.linalg.inv(p.N))[1]
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights = horizon / 2 * (points + 1), horizon / 2 * weights
    square = lq.sigma.T @ lq.sigma
    grown = [p.temperature / 2 * volume + np.sum(square * at(s)[1:, 1:]) / 2 for s in points]
    noise = np.sum(weights * np.exp(-p.discount * (horizon - points)) * grown)
    end = at(horizon)
    return end[1:, 1:], end[0, 1:], float(end[0, 0] / 2 + noise)


# ---- the value of a policy, by the moments of the state


@remembered
def value_by_moments(lq: LQ, law: Law, x: np.ndarray, horizon: float) -> float:
    """Expected discounted reward of a constant policy from x: one matrix exponential."""
    p, z = lq.of_pairs(), pairs(x)
    fading = motion(p, law)[0] - lq.discount * np.eye(len(z))
    running, end = earned(fading, paid(p, law), z, horizon)
    return running - float(row(lq.H, lq.h, 0.0) @ end)


def _resolvent(lq: LQ, law: Law, x: np.ndarray) -> np.ndarray:
    """int e^{-discount t} E z dt, by (discount - L)^{-1} z."""
    L, _ = motion(lq.of_pairs(), law)
    return np.linalg.solve(lq.discount * np.eye(len(L)) - L, pairs(x))


@remembered
def discounted_value_by_moments(lq: LQ, law: Law, x: np.ndarray) -> Number:
    """The same without end."""
    return (paid(lq.of_pairs(), law) @ _resolvent(lq, law, x)).item()


def average_reward_by_moments(lq: LQ, law: Law) -> float:
    """Expected reward rate at rest."""
    L, _ = motion(lq.of_pairs(), law)
    rest = np.concatenate([[1.0], -np.linalg.solve(L[1:, 1:], L[1:, 0])])
    return float(paid(lq.of_pairs(), law) @ rest)


def stationary_hessian(lq: LQ) -> np.ndarray:
    """S of the optimum without end where C and D are 0, by scipy's Schur method."""
    shifted = lq.A - lq.discount / 2 * np.eye(len(lq.A))
    return -scipy.linalg.solve_continuous_are(shifted, lq.B, lq.M, lq.N, s=lq.R.T)


# ---- one state, one action, one Brownian motion: the published formulas


@dataclass(frozen=True)
class Scalar:
    """dX = (A X + B a) dt + (C X + D a + s) dW, -(M x^2/2 + R x a + N a^2/2 + P x + L a)."""

    A: float
    B: float
    C: float
    D: float
    M: float
    R: float
    N: float
    P: float
    L: float
    discount: float
    temperature: float
    s: float = 0.0

    def lq(self) -> LQ:
        """The same with matrices; nothing is paid at the end."""
        one = np.ones((1, 1))
        return LQ(
            self.A * one, self.B * one, self.s * one, self.M * one, self.N * one, self.R * one,
            self.P * one[0], self.L * one[0], 0 * one, 0 * one[0], 0 * one[0], self.C * one[None],
            self.D * one[None], self.discount, self.temperature,
        )  # fmt: skip


DISCOUNTED = Scalar(-0.6, 0.8, 0.27, 0.5, 1.3, 0.4, 0.9, 0.33, -0.21, 0.45, 0.3)
ERGODIC = Scalar(-0.6, 0.8, 0.27, 0.5, 1.3, 0.4, 0.9, 0.33, -0.21, 0.0, 0.3)
BENCHMARK = Scalar(-1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.1)
"""Jia & Zhou 2022b, section 6, without discount."""


@dataclass(frozen=True)
class ScalarSolution:
    """v = k2 x^2/2 + k1 x + k0, pi* = N(gain x + offset, variance).

    ``rate`` is discount times k0, or the average reward where there is no discount.
    """

    k2: float
    k1: float
    rate: float
    gain: float
    offset: float
    variance: float


def solve_scalar(p: Scalar) -> ScalarSolution:
    """Wang, Zariphopoulou & Zhou 2020, section 4; Jia & Zhou 2022b, appendix B2: a square root.

    (discount - 2 A - C^2) k2 = (k2 (B + C D) - R)^2 / (N - k2 D^2) - M, times the denominator, is a
    quadratic equation; its root is the negative one.
    """
    u, v = p.B + p.C * p.D, p.discount - 2 * p.A - p.C**2
    a = u**2 + v * p.D**2
    b = -2 * u * p.R + p.M * p.D**2 - v * p.N
    c = p.R**2 - p.M * p.N
    k2 = 2 * c / (-b + math.sqrt(b * b - 4 * a * c))
    gain = (k2 * u - p.R) / (p.N - k2 * p.D**2)
    k1 = gain * (k2 * p.D * p.s - p.L) - p.P + k2 * p.C * p.s
    k1 = k1 / (p.discount - p.A - p.B * gain)
    _, offset, variance = scalar_gibbs(p, k2, k1)
    rate = (k2 * p.s**2 + offset**2 * (p.N - k2 * p.D**2)) / 2
    if p.temperature:
        rate += p.temperature / 2 * math.log(2 * math.pi * variance)
    return ScalarSolution(k2, k1, rate, gain, offset, variance)


def scalar_gibbs(p: Scalar, k2: float, k1: float) -> tuple[float, float, float]:
    """Gain, offset and variance of exp(q / temperature) for k2 x^2/2 + k1 x, optimal or not."""
    W = p.N - k2 * p.D**2
    offset = (k1 * p.B - p.L + k2 * p.D * p.s) / W
    return (k2 * (p.B + p.C * p.D) - p.R) / W, offset, p.temperature / W


# ---- the cost of exploration


def one_action(lq: LQ) -> LQ:
    """The same problem with the first action alone, so that states and actions differ in number."""
    return replace(
        lq, B=lq.B[:, :1], N=lq.N[:1, :1], R=lq.R[:1], l=lq.l[:1], D=lq.D[:, :, :1]
    )  # fmt: skip


def exploration_cost(temperature: float, actions: int, discount: float, horizon: float) -> float:
    """gam d / 2 times int_0^horizon e^{-discount t} dt, as its limit where one is 0 or infinite."""
    if discount == 0:
        return temperature * actions * horizon / 2
    return temperature * actions / (2 * discount) * (1 - math.exp(-discount * horizon))


def entropy_gain(W: np.ndarray, temperature: float, discount: float) -> float:
    """V_gam - V_0 without horizon: gam log det(2 pi gam W^{-1}) / (2 discount)."""
    log_det = float(np.linalg.slogdet(2 * math.pi * temperature * np.linalg.inv(W))[1])
    return temperature * log_det / (2 * discount)


# ---- discounted occupation


@remembered
def occupation(lq: LQ, law: Law, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of d = discount int e^{-discount t} law(X_t) dt, X_0 = x."""
    n = len(x) + 1
    second = lq.discount * _resolvent(lq, law, x).reshape(n, n)
    mean = second[0, 1:]
    return mean, second[1:, 1:] - np.outer(mean, mean)


@remembered
def gradient_in_law(lq: LQ, law: Law, x: np.ndarray) -> np.ndarray:
    """d V(x) in K, k and the lower triangular root of Sigma, by complex steps."""
    m, n = law.K.shape
    lower = np.tril_indices(m)
    theta = np.concatenate([law.K.ravel(), law.k, np.linalg.cholesky(law.Sigma)[lower]])

    def value(theta: np.ndarray) -> Number:
        root = np.zeros((m, m), theta.dtype)
        root[lower] = theta[m * n + m :]
        moved = Law(theta[: m * n].reshape(m, n), theta[m * n : m * n + m], root @ root.T)
        return discounted_value_by_moments(lq, moved, x)

    return complex_steps.gradient(value, theta)
