"""Moments of linear diffusions, generators of polynomials, and discounted sums: by hand."""

from dataclasses import dataclass

import numpy as np

from verification.closed_form.lq_policies import transition


@dataclass(frozen=True)
class Linear:
    """dX = (drift X + push) dt + noise dW in the plane, from a point."""

    drift: np.ndarray
    push: np.ndarray
    noise: np.ndarray
    start: np.ndarray

    def law(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance at a time, exactly."""
        F, f, C = transition(self.drift, self.push, self.noise, t)
        return F @ self.start + f, C


def normal_nodes(mean: np.ndarray, covariance: np.ndarray, nodes: int = 5):
    """Points [n, 2] and masses whose sums are expectations of N(mean, covariance)."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    grid = np.stack(np.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    return mean + grid @ root.T, np.outer(w, w).ravel()


def polynomial(t: float, x: np.ndarray) -> np.ndarray:
    """phi = (1 + t^2) x1^2 x2 + t x2^3 + 0.5 x1^4 - x1 x2."""
    a, b = x[:, 0], x[:, 1]
    return (1 + t**2) * a**2 * b + t * b**3 + 0.5 * a**4 - a * b


def generator(t: float, x: np.ndarray, drift: np.ndarray, square: np.ndarray) -> np.ndarray:
    """d_t phi + drift . grad phi + tr(square Hess phi) / 2, differentiated by hand.

    Args:
        t: time.
        x: [n, 2].
        drift: [n, 2].
        square: sigma sigma', [n, 2, 2].
    """
    a, b = x[:, 0], x[:, 1]
    in_time = 2 * t * a**2 * b + b**3
    first = [(1 + t**2) * 2 * a * b + 2 * a**3 - b, (1 + t**2) * a**2 + 3 * t * b**2 - a]
    aa, ab, bb = (1 + t**2) * 2 * b + 6 * a**2, (1 + t**2) * 2 * a - 1, 6 * t * b
    second = square[:, 0, 0] * aa + 2 * square[:, 0, 1] * ab + square[:, 1, 1] * bb
    return in_time + drift[:, 0] * first[0] + drift[:, 1] * first[1] + second / 2


def discounted_square(
    pull: float, noise: float, mean: float, variance: float, discount: float, horizon: float
) -> float:
    """E int_0^T e^{-discount t} X^2 dt of dX = -pull X dt + noise dW."""
    rest = noise**2 / (2 * pull)

    def integral(rate: float) -> float:
        return (1 - np.exp(-rate * horizon)) / rate

    faded = integral(discount + 2 * pull)
    return rest * integral(discount) + (variance - rest + mean**2) * faded
