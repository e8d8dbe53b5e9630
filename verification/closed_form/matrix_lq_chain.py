"""An exploratory LQ problem in several dimensions: its Euler chain, by matrix recursions.

    dX = (drift X + push a) dt + noise dW,   a ~ N(K X + k, L L'), held over a step
    reward rate -(X' state_cost X + a' action_cost a) / 2 - temperature log pi(a)
    terminal reward -X' terminal_cost X / 2;  discount, a rate

Parameters in a row: theta = (K, k, lower triangle of L), rows first. Recursions are analytic in
theta, so that derivatives are complex steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

DIM = 2
LOWER = np.tril_indices(DIM)
GAIN = np.array([[0.4, -0.3], [0.15, -0.55]])
OFFSET = np.array([0.25, -0.4])
SCALE = np.array([[0.6, 0.0], [-0.35, 0.45]])
THETA = np.concatenate([GAIN.ravel(), OFFSET, SCALE[LOWER]])


@dataclass(frozen=True)
class MatrixLQ:
    """The numbers; no symmetry but where costs must have it."""

    drift: np.ndarray = field(default_factory=lambda: np.array([(-0.7, 0.35), (-0.2, 0.3)]))
    push: np.ndarray = field(default_factory=lambda: np.array([(0.9, -0.25), (0.4, 0.65)]))
    noise: np.ndarray = field(default_factory=lambda: np.array([(0.5, 0.2), (-0.3, 0.7)]))
    state_cost: np.ndarray = field(default_factory=lambda: np.array([(0.8, -0.15), (-0.15, 0.45)]))
    action_cost: np.ndarray = field(default_factory=lambda: np.array([(0.5, 0.1), (0.1, 0.35)]))
    terminal_cost: np.ndarray = field(default_factory=lambda: np.array([(1.3, 0.4), (0.4, 0.75)]))
    discount: float = 0.35
    temperature: float = 0.2
    start: tuple[float, float] = (0.75, -0.5)


def unpack(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K, k and L."""
    square = DIM**2
    scale = np.zeros((DIM, DIM), dtype=theta.dtype)
    scale[LOWER] = theta[square + DIM :]
    return theta[:square].reshape(DIM, DIM), theta[square : square + DIM], scale


def chain_value(
    p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, float | complex]]:
    """(P, e, c) of V = x'Px/2 + e'x + c at every node: backward recursion."""
    gain, offset, scale = unpack(theta)
    action_covariance = scale @ scale.T
    entropy = 0.5 * DIM * np.log(2 * np.pi * np.e) + np.log(np.diag(scale)).sum()
    P, e, c = -p.terminal_cost, np.zeros(DIM), 0.0
    backward: list[tuple[np.ndarray, np.ndarray, float | complex]] = [(P, e, c)]
    for h in np.diff(nodes)[::-1]:
        keep = np.exp(-p.discount * h)
        F, b = np.eye(DIM) + h * (p.drift + p.push @ gain), h * p.push @ offset
        covariance = h * p.noise @ p.noise.T + h**2 * p.push @ action_covariance @ p.push.T
        cost = (offset @ p.action_cost @ offset + np.trace(p.action_cost @ action_covariance)) / 2
        c = keep * (b @ P @ b / 2 + e @ b + np.trace(P @ covariance) / 2 + c)
        c = c + h * (p.temperature * entropy - cost)
        e = keep * F.T @ (P @ b + e) - h * gain.T @ p.action_cost @ offset
        P = keep * F.T @ P @ F - h * (p.state_cost + gain.T @ p.action_cost @ gain)
        backward.append((P, e, c))
    return backward[::-1]


def performance(p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray) -> float | complex:
    """V(0, start)."""
    (P, e, c), x = chain_value(p, theta, nodes)[0], np.array(p.start)
    return (x @ P @ x / 2 + e @ x + c).item()


def gradient(function: Callable[[np.ndarray], float | complex], theta: np.ndarray) -> np.ndarray:
    """d function / d theta, by complex steps."""
    step = 1e-30
    return np.array([np.imag(function(theta + 1j * step * e)) / step for e in np.eye(len(theta))])


def q_rate_gradient(
    p: MatrixLQ, theta: np.ndarray, nodes: np.ndarray, P: np.ndarray, e: np.ndarray
) -> np.ndarray:
    """sum h_k e^{-discount t_k} E[ grad log pi (q - temperature log pi) ], V = x'Px/2 + e'x + c(t).

    By Stein's identity it is the mean of (d a / d theta)' grad_a (q - temperature log pi).
    """
    gain, offset, scale = unpack(theta)
    mean, total = np.array(p.start), np.zeros(len(theta))
    second = np.outer(mean, mean)
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        slope = p.push.T @ P - p.action_cost @ gain  # of grad_a q at the mean action, in x
        constant = p.push.T @ e - p.action_cost @ offset
        by_gain = slope @ second + np.outer(constant, mean)
        by_scale = -p.action_cost @ scale + p.temperature * np.diag(1 / np.diag(scale))
        each = [by_gain.ravel(), slope @ mean + constant, by_scale[LOWER]]
        total += np.exp(-p.discount * (t - nodes[0])) * h * np.concatenate(each)
        F, b = np.eye(DIM) + h * (p.drift + p.push @ gain), h * p.push @ offset
        covariance = h * p.noise @ p.noise.T
        covariance = covariance + h**2 * p.push @ scale @ scale.T @ p.push.T
        next_mean = F @ mean
        second = F @ second @ F.T + np.outer(next_mean, b) + np.outer(b, next_mean) + np.outer(b, b)
        second, mean = second + covariance, next_mean + b
    return total
