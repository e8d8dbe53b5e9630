"""DDIM's transitions as decisions: their densities, ratios and divergences.

    x' = N(alpha' x0 + sqrt(sigma'^2 - c^2) eps, c^2)
    c = eta (sigma' / sigma) sqrt(1 - (alpha / alpha')^2)
with x0 and eps predicted from x. The reference writes these in numpy; a sampler whose last step has
no noise has no density, and must say so.
"""

import numpy as np


def log_density(at: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Log-density of independent normals, summed over coordinates."""
    gaps = (at - mean) / std
    return np.sum(-0.5 * gaps**2 - np.log(std) - 0.5 * np.log(2 * np.pi), axis=-1)
