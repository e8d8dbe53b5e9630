"""Chains of Euler steps whose noise is scaled by state and action: values of affine controls.

    X' = X + h (A X + B u + f) + sqrt(h) sum_j (C_j X + D_j u + s_j) z_j
    paid per step: -h (x'Mx/2 + u'Rx + u'Nu/2 + p'x + l'u); at the end -(x'Hx/2 + q'x)

By recursion of the quadratics V_k, with u_k = K_k x + k_k. Polynomial in K and k, so that
derivatives are taken in the complex plane.
"""

import numpy as np

from verification.closed_form import complex_steps

NODES = np.array([0.0, 0.3, 0.5, 0.9])
H = np.diff(NODES)
DISCOUNT = 0.4
START = np.array([0.7, -0.5])
A = np.array([[-0.5, 0.3], [0.2, -0.8]])
B = np.array([[0.9], [0.4]])
DRIFT = np.array([0.2, -0.3])
C = np.array([[[0.3, -0.1], [0.0, 0.2]], [[0.1, 0.2], [-0.2, 0.1]]])
D = np.array([[[0.5], [0.2]], [[-0.3], [0.4]]])
SIGMA = np.array([[0.4, 0.1], [0.0, 0.3]])  # a column for each Brownian motion
M = np.array([[1.0, 0.2], [0.2, 0.7]])
N = np.array([[0.6]])
R = np.array([[0.2, -0.1]])
P, L = np.array([0.3, -0.2]), np.array([0.15])
LAST, TILT = np.array([[0.9, -0.1], [-0.1, 1.2]]), np.array([-0.4, 0.5])
GAINS = np.array([[[-0.3, 0.4]], [[0.2, -0.6]], [[-0.5, 0.1]]])  # not the best
OFFSETS = np.array([[0.1], [-0.2], [0.3]])


def before(
    S: np.ndarray, e: np.ndarray, c: complex, h: float, K: np.ndarray, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray, complex]:
    """The value a step earlier."""
    keep = np.exp(-DISCOUNT * h)
    F, f = np.eye(2) + h * (A + B @ K), h * (DRIFT + B @ k)
    hessian, slope = F.T @ S @ F, F.T @ (S @ f + e)
    constant = c + e @ f + 0.5 * f @ S @ f
    for C_j, D_j, s in zip(C, D, SIGMA.T, strict=True):
        G, g = C_j + D_j @ K, s + D_j @ k
        hessian = hessian + h * G.T @ S @ G
        slope = slope + h * G.T @ S @ g
        constant = constant + 0.5 * h * g @ S @ g
    paid = M + K.T @ N @ K + R.T @ K + K.T @ R
    return (
        keep * hessian - h * paid,
        keep * slope - h * (P + K.T @ N @ k + R.T @ k + K.T @ L),
        keep * constant - h * (0.5 * k @ N @ k + L @ k),
    )


def performance(K: np.ndarray, k: np.ndarray) -> complex:
    """J, from START."""
    S, e, c = -LAST.astype(K.dtype), -TILT.astype(K.dtype), 0.0
    for i in (2, 1, 0):
        S, e, c = before(S, e, c, H[i], K[i], k[i])
    return complex(0.5 * START @ S @ START + e @ START + c)


def gradient(K: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Derivatives of J in all gains, then in all offsets."""

    def of(flat: np.ndarray) -> complex:
        return performance(flat[: K.size].reshape(K.shape), flat[K.size :].reshape(k.shape))

    return complex_steps.gradient(of, np.concatenate([K.ravel(), k.ravel()]))


def optimum() -> tuple[np.ndarray, np.ndarray]:
    """The best gains and offsets of every step."""
    S, e, c, gains, offsets = -LAST, -TILT, 0.0, [], []
    for h in H[::-1]:
        keep = np.exp(-DISCOUNT * h)
        W = h * N - keep * h**2 * B.T @ S @ B
        G = keep * h * B.T @ S @ (np.eye(2) + h * A) - h * R
        g = keep * h * B.T @ (h * S @ DRIFT + e) - h * L
        for C_j, D_j, s in zip(C, D, SIGMA.T, strict=True):
            W = W - keep * h * D_j.T @ S @ D_j
            G = G + keep * h * D_j.T @ S @ C_j
            g = g + keep * h * D_j.T @ S @ s
        K, k = np.linalg.solve(W, G), np.linalg.solve(W, g)
        S, e, c = before(S, e, c, h, K, k)
        gains.append(K)
        offsets.append(k)
    return np.array(gains[::-1]), np.array(offsets[::-1])
