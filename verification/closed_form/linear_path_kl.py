"""KL of the paths of two linear SDEs with matrices, by equations of moments solved numerically.

dX = (A X + b) dt + NOISE dW, three Brownian motions for two coordinates
KL = 1/2 int tr((A - A_0)' R (A - A_0) (P + m m')) + ... dt,  R = (NOISE NOISE')^{-1}
"""

import numpy as np
from scipy.integrate import solve_ivp

LAW = (np.array([[-1.1, 0.4], [0.3, -0.7]]), np.array([0.35, -0.2]))
REFERENCE = (np.array([[-0.4, 0.15], [-0.25, -0.9]]), np.array([-0.1, 0.45]))
NOISE = np.array([[0.5, -0.3, 0.4], [0.2, 0.7, -0.6]])
START = (np.array([0.6, -0.4]), np.array([[0.3, 0.1], [0.1, 0.2]]))


def path_kl(time: float) -> float:
    """On [0, time], nats."""
    (matrix, vector), (reference, constant) = LAW, REFERENCE
    noise_covariance = NOISE @ NOISE.T
    weight = np.linalg.inv(noise_covariance)

    def rate(_: float, y: np.ndarray) -> np.ndarray:
        mean, covariance = y[:2], y[2:6].reshape(2, 2)
        apart = (matrix - reference) @ mean + vector - constant
        turn = matrix - reference
        energy = apart @ weight @ apart + np.trace(turn.T @ weight @ turn @ covariance)
        transported = matrix @ covariance
        return np.concatenate(
            [
                matrix @ mean + vector,
                (transported + transported.T + noise_covariance).ravel(),
                [0.5 * energy],
            ]
        )

    start = np.concatenate([START[0], START[1].ravel(), [0.0]])
    solution = solve_ivp(rate, (0, time), start, method="DOP853", rtol=1e-12, atol=1e-13)
    return float(solution.y[-1, -1])
