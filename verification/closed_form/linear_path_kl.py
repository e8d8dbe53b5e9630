"""KL of the paths of two linear SDEs with matrices, by the equation of the state's moments.

dX = (A X + b) dt + NOISE dW, three Brownian motions for two coordinates
KL = 1/2 int tr((A - A_0)' R (A - A_0) (P + m m')) + ... dt,  R = (NOISE NOISE')^{-1}
"""

import numpy as np

from verification.closed_form.lq_policies import bordered, earned, uncontrolled

LAW = (np.array([[-1.1, 0.4], [0.3, -0.7]]), np.array([0.35, -0.2]))
REFERENCE = (np.array([[-0.4, 0.15], [-0.25, -0.9]]), np.array([-0.1, 0.45]))
NOISE = np.array([[0.5, -0.3, 0.4], [0.2, 0.7, -0.6]])
START = (np.array([0.6, -0.4]), np.array([[0.3, 0.1], [0.1, 0.2]]))


def path_kl(time: float) -> float:
    """On [0, time], nats."""
    (matrix, vector), (reference, constant), (mean, covariance) = LAW, REFERENCE, START
    apart = np.column_stack([vector - constant, matrix - reference])  # of (1, x)
    energy = apart.T @ np.linalg.inv(NOISE @ NOISE.T) @ apart / 2
    first = bordered(covariance + np.outer(mean, mean), mean, 1.0).ravel()
    return earned(uncontrolled(matrix, vector, NOISE), energy.ravel(), first, time)[0]
