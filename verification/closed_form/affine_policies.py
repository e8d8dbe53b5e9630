"""Affine changes of a Gaussian model's score on DDIM's steps: path KL, its Hessian, performance.

Data N(m, S). At step k, from alpha-bar a_k to a_{k+1}, the action is score + D_k x + c_k with
    (D_k, c_k) = sum_t phi_t(k) (D^t, c^t),    theta = (D^0, D^1, ..., c^0, c^1, ...),
phi_t Legendre's polynomials of 2 sqrt(a_k) - 1. States are normal at every node. The SDE's path KL
of one policy from another charges w_k / 2 |difference of actions|^2 at the states of the first one,
w_k = ((1 + eta^2) / (2 eta))^2 log(a_{k+1} / a_k); so its Hessian where both are one policy is
    F = sum_k w_k E[z z'] x 1,    z = phi(k) x (X_k, 1).
"""

from dataclasses import dataclass

import numpy as np

from verification.answers import remembered
from verification.closed_form import complex_steps
from verification.closed_form.gaussian_law import Normal, Transition
from verification.closed_form.linear_adapter import Sampler


@dataclass(frozen=True, eq=False)
class AffinePolicies:
    """All policies of this kind of one model on one sampler.

    Attributes:
        sampler: DDIM's tables.
        mean: of the data.
        covariance: of the data.
        terms: how many polynomials.
    """

    sampler: Sampler
    mean: np.ndarray
    covariance: np.ndarray
    terms: int

    @property
    def dim(self) -> int:
        """Coordinates of a state."""
        return len(self.mean)

    @property
    def size(self) -> int:
        """Parameters."""
        return self.terms * self.dim * (self.dim + 1)

    @property
    def basis(self) -> np.ndarray:
        """phi, [steps, terms]."""
        z = 2 * np.sqrt(self.sampler.alpha_bar[:-1]) - 1
        return np.polynomial.legendre.legvander(z, self.terms - 1)

    @property
    def weights(self) -> np.ndarray:
        """w, [steps]."""
        return self.sampler.factor * self.sampler.clock

    def coefficients(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(D, c) of every step."""
        cut = self.terms * self.dim**2
        gains = theta[:cut].reshape(self.terms, self.dim, self.dim)
        shifts = theta[cut:].reshape(self.terms, self.dim)
        return np.einsum("kt,tij->kij", self.basis, gains), self.basis @ shifts

    def laws(self, theta: np.ndarray) -> list[Normal]:
        """The state's law at every node, from N(0, 1); analytic in theta."""
        unit, (gains, shifts) = np.eye(self.dim), self.coefficients(theta)
        laws: list[Normal] = [Normal(np.zeros(self.dim), unit)]
        a = self.sampler.alpha_bar
        for k in range(len(a) - 1):
            precision = np.linalg.inv(a[k] * self.covariance + (1 - a[k]) * unit)
            push = self.sampler.gain[k]
            matrix = np.sqrt(a[k + 1] / a[k]) * unit + push * (gains[k] - precision)
            shift = push * (shifts[k] + np.sqrt(a[k]) * precision @ self.mean)
            noise = self.sampler.std[k] ** 2 * unit
            laws.append(Transition(matrix, shift, noise).of(laws[-1]))
        return laws

    def path_kl(self, theta: np.ndarray, reference: np.ndarray) -> complex | float:
        """Of one policy from another, nats; analytic in theta."""
        gains, shifts = self.coefficients(theta - reference)
        total = 0.0
        for w, D, c, (m, P) in zip(self.weights, gains, shifts, self.laws(theta), strict=False):
            mean = D @ m + c
            total = total + 0.5 * w * (mean @ mean + np.trace(D @ P @ D.T))
        return total

    @remembered
    def fisher(self, theta: np.ndarray) -> np.ndarray:
        """F, [size, size]."""
        terms, dim = self.terms, self.dim
        F = np.zeros((self.size, self.size))
        for w, phi, (m, P) in zip(self.weights, self.basis, self.laws(theta), strict=False):
            # rows of d action / d theta as functions of (x, 1), in theta's order
            J = np.zeros((dim, self.size, dim + 1))
            for i in range(dim):
                for t in range(terms):
                    for j in range(dim):
                        J[i, (t * dim + i) * dim + j, j] = phi[t]
                    J[i, terms * dim**2 + t * dim + i, dim] = phi[t]
            second = np.block([[P + np.outer(m, m), m[:, None]], [m[None], np.ones((1, 1))]])
            F += w * np.einsum("ipa,ab,iqb->pq", J, second, J)
        return F

    def performance(
        self, theta: np.ndarray, curvature: np.ndarray, slope: np.ndarray, kl_weight: float
    ) -> complex | float:
        """J = E[-X'QX / 2 + l'X] - b path KL from the pretrained model; analytic in theta."""
        m, P = self.laws(theta)[-1]
        reward = slope @ m - 0.5 * (m @ curvature @ m + np.trace(curvature @ P))
        return reward - kl_weight * self.path_kl(theta, np.zeros(self.size))

    @remembered
    def gradient(
        self, theta: np.ndarray, curvature: np.ndarray, slope: np.ndarray, kl_weight: float
    ) -> np.ndarray:
        """Of the performance, by complex steps, which cancel nothing."""
        return complex_steps.gradient(
            lambda moved: self.performance(moved, curvature, slope, kl_weight), theta
        )


def krylov_solution(matrix: np.ndarray, vector: np.ndarray, dimension: int) -> np.ndarray:
    """The vector of span(b, Ab, A^2 b, ...) nearest to A^-1 b in A's norm, by projection."""
    basis = np.empty((len(vector), 0))
    power = vector
    for _ in range(dimension):
        for _ in range(2):  # once more: what cancelled
            power = power - basis @ (basis.T @ power)
        basis = np.column_stack([basis, power / np.linalg.norm(power)])
        power = matrix @ basis[:, -1]
    return basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ vector)
