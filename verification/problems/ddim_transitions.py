"""DDIM's transitions as decisions: their densities, ratios and divergences.

    x' = N(alpha' x0 + sqrt(sigma'^2 - c^2) eps, c^2)
    c = eta (sigma' / sigma) sqrt(1 - (alpha / alpha')^2)
with x0 and eps predicted from x. The reference writes these in numpy; a sampler whose last step has
no noise has no density, and must say so.
"""

import numpy as np
import torch
from torch import Tensor

from ctrl.devices import as_like
from diffusion_envs.objectives import Rows
from diffusion_envs.samplers import GaussianSteps


def log_density(at: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Log-density of independent normals, summed over coordinates."""
    gaps = (at - mean) / std
    return np.sum(-0.5 * gaps**2 - np.log(std) - 0.5 * np.log(2 * np.pi), axis=-1)


def rows_of_steps(
    sampler: GaussianSteps, step: Tensor, noise: Tensor, action: Tensor, old_action: Tensor
) -> Rows:
    """Rows of these steps as losses get them; the old policy is the pretrained one too."""
    gain, std, size = (
        as_like(table, noise)[step] for table in (sampler.gain, sampler.std, sampler.step_sizes)
    )
    factor = sampler.kl_factor
    return Rows(
        mean=action,
        old_mean=old_action,
        reference_score=old_action,
        noise=noise,
        advantage=torch.zeros_like(std),
        step_size=size,
        horizon=as_like(sampler.step_sizes.sum(), noise),
        score_gain=gain,
        std=std,
        kl_factor=as_like(factor, noise)[step] if isinstance(factor, Tensor) else factor,
    )
