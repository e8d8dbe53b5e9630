"""A linear-quadratic problem with everything at once: two dimensions, coefficients of time.

    dX = (A(t) X + B(t) a) dt + S(t) dW,   a ~ N(K X + k, L L'), held over a step
    reward rate X' M(t) X / 2 + m(t)' X + n(t) - a' N(t) a / 2 - temperature log pi(a)
    terminal reward V(horizon, X);  discount, a rate

The reward of the state is chosen so that the policy THETA has, in continuous time, the value
    V(t, x) = x' P(t) x / 2 + e(t)' x + c(t)
that is written down here: all coefficients are polynomials of time. Euler chains have a value of
their own, by a recursion. Parameters in a row: theta = (K, k, lower triangle of L), rows first;
recursions are analytic in theta, so that derivatives are complex steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.integrate import solve_ivp

from verification.answers import remembered
from verification.closed_form import gaussian_law

DIM = 2
HORIZON = 0.9
NODES = np.array([0.0, 0.35, HORIZON])
LOWER = np.tril_indices(DIM)
GAIN = np.array([[0.4, -0.3], [0.15, -0.55]])
OFFSET = np.array([0.25, -0.4])
SCALE = np.array([[0.6, 0.0], [-0.35, 0.45]])
THETA = np.concatenate([GAIN.ravel(), OFFSET, SCALE[LOWER]])


class Quadratic(NamedTuple):
    """x'P x / 2 + e'x + c."""

    P: np.ndarray
    e: np.ndarray
    c: float | complex

    def __call__(self, x: np.ndarray) -> np.ndarray | np.number:
        """At states [..., dim]."""
        return np.einsum("...i,ij,...j", x, self.P, x) / 2 + x @ self.e + self.c

    def less(self, other: "Quadratic") -> "Quadratic":
        """The difference of two."""
        return Quadratic(self.P - other.P, self.e - other.e, self.c - other.c)

    def expected(self, mean: np.ndarray, second: np.ndarray) -> float | complex:
        """Of states with this mean and these second moments."""
        return np.sum(self.P * second) / 2 + self.e @ mean + self.c


def value(t: float) -> Quadratic:
    """V of the policy THETA."""
    P = np.array([(-1.3, 0.4), (0.4, -0.75)]) + t * np.array([(0.5, -0.1), (-0.1, 0.2)])
    return Quadratic(P, np.array([0.4, -0.7]) + t * np.array([-0.3, 0.2]), 0.3 - 0.45 * t)


def slope(t: float) -> Quadratic:
    """dV / dt: V is linear in time."""
    return value(t + 1).less(value(t))


class Coefficients(NamedTuple):
    """At one time."""

    A: np.ndarray
    B: np.ndarray
    S: np.ndarray
    N: np.ndarray


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

    def at(self, t: float) -> Coefficients:
        """A, B, S and N."""
        return Coefficients(
            self.drift * (1 + 0.8 * t),
            self.push * (1 - 0.4 * t),
            self.noise * (1 + 0.6 * t),
            self.action_cost * (1 + 0.7 * t),
        )

    def reward(self, t: float) -> Quadratic:
        """M, m and n: what V lacks to be a martingale under THETA."""
        none = Quadratic(np.zeros((DIM, DIM)), np.zeros(DIM), 0.0)
        return none.less(_average(self, t, value(t), slope(t), THETA, none))


def unpack(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K, k and L."""
    square = DIM**2
    scale = np.zeros((DIM, DIM), dtype=theta.dtype)
    scale[LOWER] = theta[square + DIM :]
    return theta[:square].reshape(DIM, DIM), theta[square : square + DIM], scale


def _average(
    p: MatrixLQ, t: float, v: Quadratic, dv: Quadratic, theta: np.ndarray, reward: Quadratic
) -> Quadratic:
    """E_{a ~ theta}[ q - temperature log pi ] of V = v with derivative dv in time, at every x."""
    (gain, offset, scale), (A, B, S, N) = unpack(theta), p.at(t)
    F, push, covariance = A + B @ gain, B @ offset, scale @ scale.T
    cost = (offset @ N @ offset + np.trace(N @ covariance)) / 2
    constant = dv.c + push @ v.e + np.trace(S @ S.T @ v.P) / 2 - cost
    return Quadratic(
        dv.P + F.T @ v.P + v.P @ F - gain.T @ N @ gain - p.discount * v.P + reward.P,
        dv.e + F.T @ v.e + v.P @ push - gain.T @ N @ offset - p.discount * v.e + reward.e,
        constant + p.temperature * _entropy(scale) - p.discount * v.c + reward.c,
    )


def _entropy(scale: np.ndarray) -> float | complex:
    return 0.5 * DIM * np.log(2 * np.pi * np.e) + np.log(np.diag(scale)).sum()


def log_density(theta: np.ndarray, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """log pi(a | x), [paths]."""
    gain, offset, scale = unpack(theta)
    return gaussian_law.log_density(a, x @ gain.T + offset, scale @ scale.T)


def paid(p: MatrixLQ, t: float, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """The reward rate without its entropy, [paths]."""
    return p.reward(t)(x) - np.einsum("pi,ij,pj->p", a, p.at(t).N, a) / 2


def q_rate(p: MatrixLQ, t: float, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """q of V, [paths]."""
    (A, B, S, _), v = p.at(t), value(t)
    along = np.sum((x @ A.T + a @ B.T) * (x @ v.P + v.e), axis=1) + np.trace(S @ S.T @ v.P) / 2
    return slope(t)(x) + along + paid(p, t, x, a) - p.discount * v(x)


def chain_q(
    p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray, k: int, x: np.ndarray, a: np.ndarray
) -> np.ndarray:
    """(e^{-discount h} E[V_{k+1} | x, a] - V_k) / h + r of the chain's own V, [paths]."""
    h, (A, B, S, _) = nodes[k + 1] - nodes[k], p.at(nodes[k])
    now, after = chain_value(p, theta, nodes)[k : k + 2]
    ahead = after(x + h * (x @ A.T + a @ B.T)) + h * np.trace(S @ S.T @ after.P) / 2
    return (np.exp(-p.discount * h) * ahead - now(x)) / h + paid(p, nodes[k], x, a)


def chain_value(p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray) -> list[Quadratic]:
    """The chain's own V at every node: backward recursion."""
    gain, offset, scale = unpack(theta)
    P, e, c = value(nodes[-1])
    backward = [Quadratic(P, e, c)]
    for t, h in zip(nodes[-2::-1], np.diff(nodes)[::-1], strict=True):
        (A, B, S, N), (M, m, n) = p.at(t), p.reward(t)
        keep = np.exp(-p.discount * h)
        F, b = np.eye(DIM) + h * (A + B @ gain), h * B @ offset
        covariance = h * S @ S.T + h**2 * B @ scale @ scale.T @ B.T
        cost = (offset @ N @ offset + np.trace(N @ scale @ scale.T)) / 2
        c = keep * (b @ P @ b / 2 + e @ b + np.trace(P @ covariance) / 2 + c)
        c = c + h * (n + p.temperature * _entropy(scale) - cost)
        e = keep * F.T @ (P @ b + e) + h * (m - gain.T @ N @ offset)
        P = keep * F.T @ P @ F + h * (M - gain.T @ N @ gain)
        backward.append(Quadratic(P, e, c))
    return backward[::-1]


@remembered
def performance(p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray) -> float | complex:
    """V(0, start) of the chain."""
    return chain_value(p, theta, nodes)[0](np.array(p.start)).item()


@remembered
def continuous_performance(p: MatrixLQ, theta: np.ndarray) -> float:
    """V(0, start) of any policy in continuous time: V of THETA, and the difference of the two.

    The moments of the state and what is earned, by their differential equations.
    """
    gain, offset, scale = unpack(theta)

    def rates(t: float, y: np.ndarray) -> np.ndarray:
        mean, second = y[:DIM], y[DIM:-1].reshape(DIM, DIM)
        (A, B, S, N), reward = p.at(t), p.reward(t)
        F, push = A + B @ gain, B @ offset
        turned = F @ second + np.outer(push, mean)
        cost = np.sum(gain.T @ N @ gain * second) / 2 + offset @ N @ gain @ mean
        cost += (offset @ N @ offset + np.trace(N @ scale @ scale.T)) / 2
        earned = reward.expected(mean, second) - cost + p.temperature * _entropy(scale)
        second_rate = turned + turned.T + S @ S.T
        earned *= np.exp(-p.discount * t)
        return np.concatenate([F @ mean + push, second_rate.ravel(), [earned]])

    start = np.array(p.start)
    begin = np.concatenate([start, np.outer(start, start).ravel(), [0.0]])
    end = solve_ivp(rates, (0, HORIZON), begin, rtol=1e-12, atol=1e-13).y[:, -1]
    terminal = value(HORIZON).expected(end[:DIM], end[DIM:-1].reshape(DIM, DIM))
    return float(end[-1] + np.exp(-p.discount * HORIZON) * terminal)


def moments(
    p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray
) -> Iterator[tuple[float, float, np.ndarray, np.ndarray]]:
    """Time, step size, mean and second moments of the chain's states at every step."""
    gain, offset, scale = unpack(theta)
    mean = np.array(p.start)
    second = np.outer(mean, mean)
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        yield float(t), float(h), mean, second
        A, B, S, _ = p.at(t)
        F, b = np.eye(DIM) + h * (A + B @ gain), h * B @ offset
        covariance = h * S @ S.T + h**2 * B @ scale @ scale.T @ B.T
        crossed = np.outer(F @ mean, b)
        second = F @ second @ F.T + crossed + crossed.T + np.outer(b, b) + covariance
        mean = F @ mean + b


@remembered
def q_rate_sum(p: MatrixLQ, nodes: np.ndarray, visiting: np.ndarray, acting: np.ndarray) -> float:
    """sum h_k e^{-discount t_k} E[ q - temperature log pi ], q of V, along the chain of a policy.

    Args:
        p: the problem.
        nodes: of the chain.
        visiting: the policy whose chain's states count.
        acting: the policy that draws the actions at these states.
    """
    total = 0.0
    for t, h, mean, second in moments(p, visiting, nodes):
        rate = _average(p, t, value(t), slope(t), acting, p.reward(t))
        total += h * np.exp(-p.discount * t) * float(np.real(rate.expected(mean, second)))
    return total


@remembered
def q_rate_gradient(p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """sum h_k e^{-discount t_k} E[ grad log pi (q - temperature log pi) ], q of V.

    By Stein's identity it is the mean of (d a / d theta)' grad_a (q - temperature log pi).
    """
    gain, offset, scale = unpack(theta)
    total = np.zeros(len(theta))
    for t, h, mean, second in moments(p, theta, nodes):
        (_, B, _, N), v = p.at(t), value(t)
        steep = B.T @ v.P - N @ gain  # of grad_a q at the mean action, in x
        constant = B.T @ v.e - N @ offset
        by_gain = steep @ second + np.outer(constant, mean)
        by_scale = -N @ scale + p.temperature * np.diag(1 / np.diag(scale))
        each = [by_gain.ravel(), steep @ mean + constant, by_scale[LOWER]]
        total += np.exp(-p.discount * t) * h * np.concatenate(each)
    return total
