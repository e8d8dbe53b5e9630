"""Chains of the eta family of samplers under linear scores, and the weight of their path KL.

Noising      beta(s) = BETA[0] + (BETA[1] - BETA[0]) s,  s in [0, 1];  abar(s) = exp(-int_0^s beta)
Generation   dX = (beta X / 2 + (1 + eta^2) / 2 beta a) dt + eta sqrt(beta) dW at t = 1 - s
Score        a(x) = matrix x + vector
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad

BETA = (0.7, 2.6)
Steps = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LinearScore:
    """a(x) = matrix x + vector."""

    matrix: np.ndarray
    vector: np.ndarray


SCORE = LinearScore(np.array([[-0.8, 0.3], [0.2, -1.1]]), np.array([0.35, -0.2]))
REFERENCE = LinearScore(np.array([[-1.2, 0.1], [0.1, -0.9]]), np.array([-0.15, 0.25]))


def beta(s: float) -> float:
    """g^2 at noising time s."""
    return BETA[0] + (BETA[1] - BETA[0]) * s


def alpha_bar(s: float) -> float:
    """exp(-int_0^s beta), by quadrature."""
    return float(np.exp(-quad(beta, 0, s, epsabs=0, epsrel=1e-13)[0]))


def weight(eta: float) -> float:
    """Weight of int g^2 E |difference of scores|^2 dt in the path KL."""
    return (1 + eta**2) ** 2 / (8 * eta**2)


def euler_steps(score: LinearScore, eta: float, nodes: np.ndarray) -> Steps:
    """Euler-Maruyama on the nodes t."""
    transitions, eye = [], np.eye(2)
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        b, share = beta(1 - t), (1 + eta**2) / 2
        matrix = eye + h * b * (0.5 * eye + share * score.matrix)
        transitions.append((matrix, h * b * share * score.vector, eta**2 * b * h * eye))
    return transitions


def ddim_steps(score: LinearScore, eta: float, times: np.ndarray) -> Steps:
    """Song, Meng & Ermon 2021, equation 12, on decreasing noising times, written with epsilon."""
    transitions, eye = [], np.eye(2)
    for s, s_next in itertools.pairwise(times):
        a, b = alpha_bar(s), alpha_bar(s_next)
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        epsilon, constant = -np.sqrt(1 - a) * score.matrix, -np.sqrt(1 - a) * score.vector
        # x' = sqrt(b) (x - sqrt(1 - a) epsilon) / sqrt(a) + sqrt(1 - b - variance) epsilon
        gain = np.sqrt(1 - b - variance) - np.sqrt(b / a * (1 - a))
        transitions.append((np.sqrt(b / a) * eye + gain * epsilon, gain * constant, variance * eye))
    return transitions
