"""Chains of Euler steps whose noise is scaled by state and action: values of affine controls.

    X' = X + h (A X + B u + f) + sqrt(h) sum_j (C_j X + D_j u + s_j) z_j,    u_k = K_k x + k_k
    paid per step: -h (x'Mx/2 + u'Rx + u'Nu/2 + p'x + l'u); at the end -(x'Hx/2 + h'x)

By recursion of the quadratics V_k (``lq_policies``), polynomials in K and k.
"""

import numpy as np

from verification.closed_form import complex_steps
from verification.closed_form.lq import LQ
from verification.closed_form.lq_policies import Law, before, hessian, pairs, row

NODES = np.array([0.0, 0.3, 0.5, 0.9])
STEPS = np.diff(NODES)
START = np.array([0.7, -0.5])
PROBLEM = LQ(
    A=np.array([[-0.5, 0.3], [0.2, -0.8]]),
    B=np.array([[0.9], [0.4]]),
    sigma=np.array([[0.4, 0.0], [0.1, 0.3]]),
    M=np.array([[1.0, 0.2], [0.2, 0.7]]),
    N=np.array([[0.6]]),
    R=np.array([[0.2, -0.1]]),
    p=np.array([0.3, -0.2]),
    l=np.array([0.15]),
    H=np.array([[0.9, -0.1], [-0.1, 1.2]]),
    h=np.array([-0.4, 0.5]),
    f=np.array([0.2, -0.3]),
    C=np.array([[[0.3, -0.1], [0.0, 0.2]], [[0.1, 0.2], [-0.2, 0.1]]]),
    D=np.array([[[0.5], [0.2]], [[-0.3], [0.4]]]),
    discount=0.4,
    temperature=0.0,
)
GAINS = np.array([[[-0.3, 0.4]], [[0.2, -0.6]], [[-0.5, 0.1]]])  # not the best
OFFSETS = np.array([[0.1], [-0.2], [0.3]])
_LAST = row(-PROBLEM.H, -PROBLEM.h, 0.0)
_EXACTLY = np.zeros((1, 1))  # the covariance of a control


def performance(K: np.ndarray, k: np.ndarray) -> complex:
    """J, from START."""
    v = _LAST
    for h, gain, offset in zip(STEPS[::-1], K[::-1], k[::-1], strict=True):
        v = before(PROBLEM.of_pairs(), Law(gain, offset, _EXACTLY), h, v)
    return complex(v @ pairs(START))


def gradient(K: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Derivatives of J in all gains, then in all offsets."""

    def of(flat: np.ndarray) -> complex:
        return performance(flat[: K.size].reshape(K.shape), flat[K.size :].reshape(k.shape))

    return complex_steps.gradient(of, np.concatenate([K.ravel(), k.ravel()]))


def optimum() -> tuple[np.ndarray, np.ndarray]:
    """The best gains and offsets of every step: h r + e^{-discount h} E V' is a square of u."""
    p, v, best = PROBLEM.of_pairs(), _LAST, []
    for h in STEPS[::-1]:
        S, keep = hessian(v), np.exp(-p.discount * h)
        BS, DS = h * p.B.T @ S, h * p.D.swapaxes(1, 2) @ S
        W = h * p.N - keep * (h * BS @ p.B + (DS @ p.D).sum(0))
        G = keep * (BS @ (np.eye(3) + h * p.A) + (DS @ p.C).sum(0)) - h * p.R
        k, K = np.split(np.linalg.solve(W, G), [1], axis=1)
        best.append((K, k[:, 0]))
        v = before(p, Law(K, k[:, 0], _EXACTLY), h, v)
    gains, offsets = zip(*best[::-1], strict=True)
    return np.array(gains), np.array(offsets)
