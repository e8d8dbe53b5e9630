"""Moments of dX = A X dt + sum_j B_j X dW_j (Ito), and a diffusion with its derivatives.

E X_t = exp(A t) x,   E X X' =: M with M' = A M + M A' + sum_j B_j M B_j'.
"""

from collections.abc import Callable

import numpy as np
from scipy.linalg import expm

from verification.closed_form import complex_steps
from verification.closed_form.lq_policies import generator


def first(a: np.ndarray, start: np.ndarray, horizon: float) -> np.ndarray:
    """E X_T."""
    return expm(horizon * a) @ start


def second(a: np.ndarray, b: np.ndarray, start: np.ndarray, horizon: float) -> np.ndarray:
    """E X_T X_T', for columns b[j]."""
    whole = expm(horizon * generator(a, b)) @ np.outer(start, start).ravel()
    return whole.reshape(len(a), len(a))


def noise_drift(sigma: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """sum_jk (d sigma_ij / d x_k) sigma_kj of a diffusion x [dim] -> [dim, noise], complex steps.

    The derivative is Im sigma(x + i eps e_k) / eps, exact but for terms of order eps^2.
    """
    return np.einsum("kij,kj->i", complex_steps.gradient(sigma, x), sigma(x))
