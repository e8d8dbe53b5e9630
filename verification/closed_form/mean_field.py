"""A few particles as one linear-quadratic problem of all their coordinates, by scipy.

Nothing is split into deviations and mean: with n particles of two coordinates the state has 2 n,
the average is a matrix, and one Riccati equation is integrated backwards. For independent particles
of one law E V_n = V + constant / n, V the limit, so that two numbers of particles tell V.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp

from verification.answers import remembered

A = np.array([[-0.4, 0.3], [0.2, -0.7]])
A_MEAN = np.array([[0.5, -0.2], [0.1, 0.3]])
B = np.array([[0.9, 0.0], [0.3, 0.6]])
DRIFT = np.array([0.2, -0.1])
SIGMA = np.array([0.5, 0.3])  # diagonal
M = np.array([[0.9, 0.2], [0.2, 0.7]])
M_MEAN = np.array([[0.6, -0.1], [-0.1, 0.4]])
N = np.array([0.8, 1.1])  # diagonal
R = np.array([[0.1, -0.2], [0.05, 0.15]])
P, L = np.array([0.3, -0.5]), np.array([-0.2, 0.1])
H = np.array([[1.1, 0.1], [0.1, 0.5]])
H_MEAN = np.array([[-0.3, 0.2], [0.2, 0.8]])
LAST = np.array([0.4, -0.6])
DISCOUNT, TEMPERATURE, HORIZON = 0.2, 0.12, 0.9
MEAN, COVARIANCE = np.array([0.6, -0.3]), np.array([[0.5, 0.1], [0.1, 0.3]])


@dataclass(frozen=True)
class Joint:
    """The optimum of all particles at time 0: V = x'Sx/2 + e'x + c, a = K x + k."""

    S: np.ndarray
    e: np.ndarray
    c: float
    K: np.ndarray
    k: np.ndarray


def average(n: int) -> np.ndarray:
    """The matrix that puts the average of n particles in the place of each."""
    return np.kron(np.full((n, n), 1 / n), np.eye(2))


def drift(n: int) -> np.ndarray:
    """Of all coordinates."""
    return np.kron(np.eye(n), A) + np.kron(np.eye(n), A_MEAN) @ average(n)


def cost(n: int, own: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Of all coordinates: x'(.)x / 2 is the average of the particles' cost, and the mean's."""
    return (np.kron(np.eye(n), own) + np.kron(np.eye(n), mean) @ average(n)) / n


@remembered
def joint(n: int) -> Joint:
    """The optimum of n particles, whose reward is their average."""
    eye, ones = np.eye(n), np.ones(n)
    A_n, B_n, f = drift(n), np.kron(eye, B), np.kron(ones, DRIFT)
    M_n, R_n, N_n = cost(n, M, M_MEAN), np.kron(eye, R) / n, np.kron(ones, N) / n
    p, l = np.kron(ones, P) / n, np.kron(ones, L) / n  # noqa: E741  # the literature's name
    noise = np.kron(ones, SIGMA) ** 2
    heat = TEMPERATURE / n
    entropy = 0.5 * heat * np.log(2 * np.pi * heat / N_n).sum()  # less the cost of variance

    def law(S: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (B_n.T @ S - R_n) / N_n[:, None], (B_n.T @ e - l) / N_n

    def rate(_: float, y: np.ndarray) -> np.ndarray:
        S, e, c = y[: 4 * n * n].reshape(2 * n, 2 * n), y[4 * n * n : -1], y[-1]
        K, k = law(S, e)
        won = K.T @ (N_n[:, None] * K)
        S_rate = A_n.T @ S + S @ A_n - M_n + won - DISCOUNT * S
        e_rate = A_n.T @ e + S @ f - p + K.T @ (N_n * k) - DISCOUNT * e
        c_rate = e @ f + 0.5 * np.diag(S) @ noise + 0.5 * k @ (N_n * k) + entropy - DISCOUNT * c
        return np.concatenate([S_rate.ravel(), e_rate, [c_rate]])

    end = np.concatenate([-cost(n, H, H_MEAN).ravel(), -np.kron(ones, LAST) / n, [0.0]])
    y = solve_ivp(rate, (0, HORIZON), end, "DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    S, e = y[: 4 * n * n].reshape(2 * n, 2 * n), y[4 * n * n : -1]
    K, k = law(S, e)
    return Joint(S, e, float(y[-1]), K, k)


def expected(n: int) -> float:
    """E V of n independent particles of N(MEAN, COVARIANCE), at time 0."""
    best, mean = joint(n), np.kron(np.ones(n), MEAN)
    spent = np.trace(best.S @ np.kron(np.eye(n), COVARIANCE))
    return float(0.5 * (mean @ best.S @ mean + spent) + best.e @ mean + best.c)


def many() -> float:
    """V of the law N(MEAN, COVARIANCE) in the limit of many particles."""
    return 3 * expected(3) - 2 * expected(2)
