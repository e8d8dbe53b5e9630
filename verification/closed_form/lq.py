"""Exploratory linear-quadratic control, by completed squares, matrix exponentials and moments.

    dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + sigma_j) dW_j
    reward   -(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) + temperature * entropy, discounted
    terminal -(x'Hx/2 + h'x)

A value is x'Sx/2 + e'x + c, a policy N(K x + k, Sigma). sigma, C and D have the Brownian motion as
their first index here.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.integrate
import scipy.linalg

from verification.answers import remembered


@dataclass(frozen=True)
class LQ:
    """The numbers of a problem."""

    A: np.ndarray
    B: np.ndarray
    sigma: np.ndarray
    M: np.ndarray
    N: np.ndarray
    R: np.ndarray
    p: np.ndarray
    l: np.ndarray  # noqa: E741  # the literature's name
    H: np.ndarray
    h: np.ndarray
    f: np.ndarray
    C: np.ndarray
    D: np.ndarray
    discount: float
    temperature: float


@dataclass(frozen=True)
class Law:
    """N(K x + k, Sigma)."""

    K: np.ndarray
    k: np.ndarray
    Sigma: np.ndarray


Quadratic = tuple[np.ndarray, np.ndarray, float]
"""S, e, c."""


def example(*, noise_moves: bool = True) -> LQ:
    """Two states, two actions, two Brownian motions; every coefficient, none 0, 1 or repeated.

    Args:
        noise_moves: whether state and action enter the diffusion (C and D are not 0).
    """
    return LQ(
        A=np.array([[-0.7, 0.4], [-0.25, 0.15]]),
        B=np.array([[0.9, -0.35], [0.2, 0.65]]),
        sigma=np.array([[0.6, 0.12], [-0.28, 0.53]]),
        M=np.array([[1.3, 0.21], [0.21, 0.75]]),
        N=np.array([[0.8, -0.14], [-0.14, 0.57]]),
        R=np.array([[0.11, -0.06], [0.08, 0.17]]),
        p=np.array([0.31, -0.47]),
        l=np.array([-0.23, 0.37]),
        H=np.array([[0.95, -0.18], [-0.18, 1.45]]),
        h=np.array([-0.41, 0.29]),
        f=np.array([0.26, -0.33]),
        C=noise_moves * np.array([[[0.19, -0.09], [0.07, 0.24]], [[-0.13, 0.16], [0.22, 0.04]]]),
        D=noise_moves * np.array([[[0.34, 0.1], [-0.15, 0.27]], [[0.05, -0.2], [0.3, 0.13]]]),
        discount=0.36,
        temperature=0.22,
    )


def q_rate(lq: LQ, value: Quadratic, slope: Quadratic, x: np.ndarray, a: np.ndarray) -> float:
    """d_t V + b . grad V + tr(sigma sigma' Hess V) / 2 + r - discount V at one (x, a).

    Args:
        lq: the problem.
        value: V.
        slope: its derivative in time.
        x: state.
        a: action.
    """
    S, e, c = value
    noise = lq.C @ x + lq.D @ a + lq.sigma
    gain = (lq.A @ x + lq.B @ a + lq.f) @ (S @ x + e) + np.einsum("ji,ik,jk", noise, S, noise) / 2
    cost = x @ lq.M @ x / 2 + a @ lq.R @ x + a @ lq.N @ a / 2 + lq.p @ x + lq.l @ a
    here = x @ S @ x / 2 + e @ x + c
    in_time = x @ slope[0] @ x / 2 + slope[1] @ x + slope[2]
    return float(in_time + gain - cost - lq.discount * here)


def soft_maximum(lq: LQ, value: Quadratic, slope: Quadratic, x: np.ndarray) -> float:
    """gam log int exp(q / gam) da = max_a q + (gam / 2) log det(2 pi gam W^{-1}); no e in it."""
    S, e, _ = value
    W = lq.N - np.einsum("jia,ik,jkb->ab", lq.D, S, lq.D)
    noise = lq.C @ x + lq.sigma
    linear = lq.B.T @ (S @ x + e) + np.einsum("jia,ik,jk", lq.D, S, noise) - lq.R @ x - lq.l
    best = np.linalg.solve(W, linear)
    log_det = np.linalg.slogdet(2 * math.pi * lq.temperature * np.linalg.inv(W))[1]
    return q_rate(lq, value, slope, x, best) + lq.temperature / 2 * float(log_det)


# ---- the optimum over a finite horizon, in two ways


def riccati_rate(lq: LQ, y: np.ndarray) -> np.ndarray:
    """max over policies of L V + r - discount V + entropy's share, V = (S, e, c) in a row.

    Analytic in y, so that complex steps differentiate it.
    """
    n = len(lq.A)
    S, e, c = y[: n * n].reshape(n, n), y[n * n : -1], y[-1]
    W, G, g = lq.N.copy(), lq.B.T @ S - lq.R, lq.B.T @ e - lq.l
    Q, q, k = lq.A.T @ S + S @ lq.A - lq.M, lq.A.T @ e + S @ lq.f - lq.p, e @ lq.f
    for Cj, Dj, sj in zip(lq.C, lq.D, lq.sigma, strict=True):
        W = W - Dj.T @ S @ Dj
        G, g = G + Dj.T @ S @ Cj, g + Dj.T @ S @ sj
        Q, q, k = Q + Cj.T @ S @ Cj, q + Cj.T @ S @ sj, k + sj @ S @ sj / 2
    K = np.linalg.solve(W, np.column_stack([G, g]))
    k = k + g @ K[:, -1] / 2 - lq.discount * c
    if lq.temperature:
        volume = (2 * np.pi * lq.temperature) ** len(W) / np.linalg.det(W)
        k = k + lq.temperature / 2 * np.log(volume)
    S_rate, e_rate = Q + G.T @ K[:, :-1] - lq.discount * S, q + G.T @ K[:, -1]
    return np.concatenate([S_rate.ravel(), e_rate - lq.discount * e, [k]])


@remembered
def riccati(lq: LQ, horizon: float) -> Quadratic:
    """The optimal value at time to go ``horizon``: the completed square, by DOP853."""
    n = len(lq.A)
    start = np.concatenate([-lq.H.ravel(), -lq.h, [0.0]])
    solution = scipy.integrate.solve_ivp(
        lambda _, y: riccati_rate(lq, y),
        (0, horizon),
        start,
        method="DOP853",
        rtol=3e-14,
        atol=1e-14,
    )
    y = solution.y[:, -1]
    return y[: n * n].reshape(n, n), y[n * n : -1], float(y[-1])


@remembered
def riccati_by_exponential(lq: LQ, horizon: float, nodes: int = 14) -> Quadratic:
    """The same where C and D are 0: Radon's linear system in (x, 1), and Gauss-Legendre for c."""
    n = len(lq.A)
    A = np.block([[lq.A, lq.f[:, None]], [np.zeros((1, n + 1))]])
    A = A - lq.discount / 2 * np.eye(n + 1)
    B = np.vstack([lq.B, np.zeros((1, lq.B.shape[1]))])
    M, R = _bordered(lq.M, lq.p), np.column_stack([lq.R, lq.l])
    back = np.linalg.solve(lq.N, R)
    A, M, across = A - B @ back, M - R.T @ back, B @ np.linalg.solve(lq.N, B.T)
    # P = -S solves P' = A'P + P A - P across P + M in time to go; P = Y X^{-1}
    radon = np.block([[-A, across], [M, A.T]])
    begin = np.vstack([np.eye(n + 1), _bordered(lq.H, lq.h)])

    def at(s: float) -> np.ndarray:
        X, Y = np.split(scipy.linalg.expm(s * radon) @ begin, 2)
        return -np.linalg.solve(X.T, Y.T)

    rate = lq.temperature / 2 * np.linalg.slogdet(2 * np.pi * lq.temperature * _inverse(lq.N))[1]
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights = horizon / 2 * (points + 1), horizon / 2 * weights
    square = lq.sigma.T @ lq.sigma
    grown = [rate + np.sum(square * at(s)[:n, :n]) / 2 for s in points]
    noise = np.sum(weights * np.exp(-lq.discount * (horizon - points)) * grown)
    end = at(horizon)
    return end[:n, :n], end[:n, n], float(end[n, n] / 2 + noise)


def _bordered(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.block([[matrix, vector[:, None]], [vector[None], np.zeros((1, 1))]])


def _inverse(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.inv(matrix)


# ---- the value of a policy, by the moments of the state


def _moment_system(lq: LQ, law: Law) -> tuple[np.ndarray, np.ndarray]:
    """z' = L z for z = (1, E X, vec E X X'); and the row with E reward = row z."""
    n = len(lq.A)
    A, f = lq.A + lq.B @ law.K, lq.f + lq.B @ law.k
    L = np.zeros((1 + n + n * n,) * 2)
    L[1 : n + 1, 0], L[1 : n + 1, 1 : n + 1] = f, A
    eye = np.eye(n)
    L[n + 1 :, 1 : n + 1] = np.kron(f[:, None], eye) + np.kron(eye, f[:, None])
    L[n + 1 :, n + 1 :] = np.kron(A, eye) + np.kron(eye, A)
    for Cj, Dj, sj in zip(lq.C, lq.D, lq.sigma, strict=True):
        C, s = Cj + Dj @ law.K, sj + Dj @ law.k
        L[n + 1 :, n + 1 :] += np.kron(C, C)
        L[n + 1 :, 1 : n + 1] += np.kron(s[:, None], C) + np.kron(C, s[:, None])
        L[n + 1 :, 0] += np.kron(s, s) + (Dj @ law.Sigma @ Dj.T).ravel()
    K, k = law.K, law.k
    constant = k @ lq.N @ k / 2 + np.sum(lq.N * law.Sigma) / 2 + lq.l @ k
    first = lq.p + lq.R.T @ k + K.T @ (lq.N @ k + lq.l)
    second = lq.M / 2 + K.T @ lq.R + K.T @ lq.N @ K / 2
    row = -np.concatenate([[constant], first, second.ravel()])
    row[0] += lq.temperature * entropy(law.Sigma) if lq.temperature else 0.0
    return L, row


def entropy(Sigma: np.ndarray) -> float:
    """Entropy of N(., Sigma), nats."""
    return float(np.linalg.slogdet(2 * math.pi * math.e * Sigma)[1]) / 2


def _moments(x: np.ndarray) -> np.ndarray:
    return np.concatenate([[1.0], x, np.outer(x, x).ravel()])


@remembered
def value_by_moments(lq: LQ, law: Law, x: np.ndarray, horizon: float) -> float:
    """Expected discounted reward of a constant policy from x: one matrix exponential."""
    L, row = _moment_system(lq, law)
    size = len(row)
    both = np.zeros((size + 1, size + 1))
    both[:size, :size], both[size, :size] = L - lq.discount * np.eye(size), row
    end = scipy.linalg.expm(horizon * both) @ np.append(_moments(x), 0.0)
    terminal = np.concatenate([[0.0], lq.h, (lq.H / 2).ravel()])
    return float(end[size] - terminal @ end[:size])


@remembered
def discounted_value_by_moments(lq: LQ, law: Law, x: np.ndarray) -> float:
    """The same without end: row (discount - L)^{-1} z."""
    L, row = _moment_system(lq, law)
    return float(row @ np.linalg.solve(lq.discount * np.eye(len(row)) - L, _moments(x)))


def average_reward_by_moments(lq: LQ, law: Law) -> float:
    """Expected reward rate at rest."""
    L, row = _moment_system(lq, law)
    rest = np.concatenate([[1.0], -np.linalg.solve(L[1:, 1:], L[1:, 0])])
    return float(row @ rest)


def stationary_hessian(lq: LQ) -> np.ndarray:
    """S of the optimum without end where C and D are 0, by scipy's Schur method."""
    shifted = lq.A - lq.discount / 2 * np.eye(len(lq.A))
    return -scipy.linalg.solve_continuous_are(shifted, lq.B, lq.M, lq.N, s=lq.R.T)


# ---- one state, one action, one Brownian motion: the published formulas


@dataclass(frozen=True)
class Scalar:
    """dX = (A X + B a) dt + (C X + D a) dW, -(M x^2/2 + R x a + N a^2/2 + P x + L a)."""

    A: float
    B: float
    C: float
    D: float
    M: float
    R: float
    N: float
    P: float
    L: float
    discount: float
    temperature: float


DISCOUNTED = Scalar(-0.6, 0.8, 0.27, 0.5, 1.3, 0.4, 0.9, 0.33, -0.21, 0.45, 0.3)
ERGODIC = Scalar(-0.6, 0.8, 0.27, 0.5, 1.3, 0.4, 0.9, 0.33, -0.21, 0.0, 0.3)
BENCHMARK = Scalar(-1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.1)
"""Jia & Zhou 2022b, section 6, without discount."""


@dataclass(frozen=True)
class ScalarSolution:
    """v = k2 x^2/2 + k1 x + k0, pi* = N(gain x + offset, variance).

    ``rate`` is discount times k0, or the average reward where there is no discount.
    """

    k2: float
    k1: float
    rate: float
    gain: float
    offset: float
    variance: float


def solve_scalar(p: Scalar) -> ScalarSolution:
    """Wang, Zariphopoulou & Zhou 2020, section 4; Jia & Zhou 2022b, appendix B2: a square root.

    (discount - 2 A - C^2) k2 = (k2 (B + C D) - R)^2 / (N - k2 D^2) - M, times the denominator, is a
    quadratic equation; its root is the negative one.
    """
    u, v = p.B + p.C * p.D, p.discount - 2 * p.A - p.C**2
    a = u**2 + v * p.D**2
    b = -2 * u * p.R + p.M * p.D**2 - v * p.N
    c = p.R**2 - p.M * p.N
    k2 = 2 * c / (-b + math.sqrt(b * b - 4 * a * c))
    W = p.N - k2 * p.D**2
    gain = (k2 * u - p.R) / W
    k1 = -(p.L * gain + p.P) / (p.discount - p.A - p.B * gain)
    rate = (k1 * p.B - p.L) ** 2 / (2 * W)
    if p.temperature:
        log_variance = math.log(2 * math.pi * math.e * p.temperature / W)
        rate += p.temperature / 2 * (log_variance - 1)
    return ScalarSolution(k2, k1, rate, gain, (k1 * p.B - p.L) / W, p.temperature / W)


# ---- the cost of exploration


def one_action(lq: LQ) -> LQ:
    """The same problem with the first action alone, so that states and actions differ in number."""
    return replace(
        lq, B=lq.B[:, :1], N=lq.N[:1, :1], R=lq.R[:1], l=lq.l[:1], D=lq.D[:, :, :1]
    )  # fmt: skip


def exploration_cost(temperature: float, actions: int, discount: float, horizon: float) -> float:
    """gam d / 2 times int_0^horizon e^{-discount t} dt, as its limit where one is 0 or infinite."""
    if discount == 0:
        return temperature * actions * horizon / 2
    return temperature * actions / (2 * discount) * (1 - math.exp(-discount * horizon))


def entropy_gain(W: np.ndarray, temperature: float, discount: float) -> float:
    """V_gam - V_0 without horizon: gam log det(2 pi gam W^{-1}) / (2 discount)."""
    log_det = float(np.linalg.slogdet(2 * math.pi * temperature * np.linalg.inv(W))[1])
    return temperature * log_det / (2 * discount)


# ---- discounted occupation


@remembered
def occupation(lq: LQ, law: Law, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of d = discount int e^{-discount t} law(X_t) dt, X_0 = x."""
    L, _ = _moment_system(lq, law)
    n = len(x)
    z = lq.discount * np.linalg.solve(lq.discount * np.eye(len(L)) - L, _moments(x))
    mean = z[1 : n + 1]
    return mean, z[n + 1 :].reshape(n, n) - np.outer(mean, mean)


@remembered
def gradient_in_law(lq: LQ, law: Law, x: np.ndarray) -> np.ndarray:
    """d V(x) in K, k and the lower triangular root of Sigma, by extrapolated differences."""
    n, m = len(x), len(law.k)
    root = np.linalg.cholesky(law.Sigma)
    rows, columns = np.tril_indices(m)
    theta = np.concatenate([law.K.ravel(), law.k, root[rows, columns]])

    def value(theta: np.ndarray) -> float:
        low = np.zeros((m, m))
        low[rows, columns] = theta[m * n + m :]
        shifted = Law(theta[: m * n].reshape(m, n), theta[m * n : m * n + m], low @ low.T)
        return discounted_value_by_moments(lq, shifted, x)

    by_coordinate = []
    for unit in np.eye(len(theta)):
        slopes = [(value(theta + h * unit) - value(theta - h * unit)) / (2 * h) for h in _STEPS]
        one, two = ((4 * b - a) / 3 for a, b in itertools.pairwise(slopes))
        by_coordinate.append((16 * two - one) / 15)
    return np.array(by_coordinate)


_STEPS = (4e-3, 2e-3, 1e-3)
