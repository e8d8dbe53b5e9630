"""The KL-regularised optimum is a tilt, and its value a logarithm of an expectation.

maximise E[r(X_T)] - b KL: over laws (``tilt``), over controls of a linear SDE (``cole_hopf``), over
scores of a diffusion model (``optimal_score``). b is reward per nat. Each answer is held against
completed squares in precisions, against Bayes' rule, and against the Riccati equation.
"""

import numpy as np
import torch
from torch import Tensor

from verification.closed_form import tilt as exact


def coefficients(Q: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Coefficients of a quadratic, in one vector."""
    return torch.cat([Q.flatten(), slope, constant.reshape(1)])


def expected(value: exact.Quadratic) -> np.ndarray:
    """The same of a closed form."""
    return np.concatenate([value.Q.ravel(), value.l, [value.c]])
