"""Control paid by its KL, Gaussian data and a quadratic reward: the optimum, by other routes.

    maximise E[r(X_T)] - b KL(P || P_pre),   r(x) = -x'Qx/2 + l'x + c,   b = kl_weight

The tilt             dP* proportional to exp(r / b) dP_pre: completed squares, in precisions
V* by Bayes          exp(V*(s, x) / b) = E[exp(r(Y_0) / b) | Y_s = x] = Z p*_s(x) / p_s(x), with p_s
                     and p*_s the data and the tilt noised to s: no transition, no control
V* by Riccati        the HJB equation's coefficients, integrated backwards from the data end
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.integrate import solve_ivp

from verification.closed_form.gaussian_law import Normal, Quadratic, Transition
from verification.closed_form.lq_policies import transition
from verification.closed_form.vp_gaussian import VPGaussian


def tilt(law: Normal, reward: Quadratic, b: float) -> tuple[Normal, float]:
    """exp(reward / b) law, normalised, and the logarithm of its normaliser."""
    precision = np.linalg.inv(law.covariance)
    tilted = np.linalg.inv(precision + reward.Q / b)
    mean = tilted @ (precision @ law.mean + reward.l / b)
    square = mean @ np.linalg.solve(tilted, mean) - law.mean @ precision @ law.mean
    logdet = np.linalg.slogdet(tilted)[1] - np.linalg.slogdet(law.covariance)[1]
    return Normal(mean, tilted), float(0.5 * (square + logdet) + reward.c / b)


def log_density(law: Normal) -> Quadratic:
    """The logarithm of a normal density."""
    precision = np.linalg.inv(law.covariance)
    constant = len(law.mean) * np.log(2 * np.pi) + np.linalg.slogdet(law.covariance)[1]
    square = law.mean @ precision @ law.mean
    return Quadratic(precision, precision @ law.mean, float(-0.5 * (constant + square)))


def optimal_value(p: VPGaussian, reward: Quadratic, b: float, s: float) -> Quadratic:
    """V* at noising time s, by Bayes: b (log Z + log p*_s - log p_s)."""
    tilted, log_z = tilt(Normal(p.mean, p.covariance), reward, b)
    after, before = log_density(p.with_data(tilted).noised(s)), log_density(p.noised(s))
    return Quadratic(
        b * (after.Q - before.Q), b * (after.l - before.l), b * (log_z + after.c - before.c)
    )


def riccati_value(p: VPGaussian, reward: Quadratic, b: float, s: float) -> Quadratic:
    """V* at noising time s: d_s V = drift . grad V + g^2/2 Lap V + g^2/(2b) |grad V|^2."""
    n = len(p.mean)

    def rate(u: float, v: np.ndarray) -> np.ndarray:
        Q, slope = v[: n * n].reshape(n, n), v[n * n : -1]
        (A, a), g2 = p.drift(u), p.beta(u)
        curved = A.T @ Q + Q @ A - g2 / b * Q @ Q
        sloped = A.T @ slope - Q @ a - g2 / b * Q @ slope
        level = a @ slope - 0.5 * g2 * np.trace(Q) + 0.5 * g2 / b * slope @ slope
        return np.concatenate([curved.ravel(), sloped, [level]])

    start = np.concatenate([reward.Q.ravel(), reward.l, [reward.c]])
    end = solve_ivp(rate, (0, s), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return Quadratic(end[: n * n].reshape(n, n), end[n * n : -1], float(end[-1]))


def optimum_from(p: VPGaussian, reward: Quadratic, b: float, s: float) -> Transition:
    """The optimal process from s to the data: every conditional law, tilted by itself."""
    return tilted_transition(p.posterior(s), reward, b)


def optimal_path_kl(p: VPGaussian, reward: Quadratic, b: float, start: Normal) -> float:
    """KL of the optimal paths from the pretrained ones: 1/2 int g^2 E|grad V* / b|^2, nats."""
    tilted, _ = tilt(Normal(p.mean, p.covariance), reward, b)
    optimum, total = p.with_data(tilted), 0.0
    nodes, weights = np.polynomial.legendre.leggauss(80)
    for s, weight in zip(0.5 * p.horizon * (nodes + 1), 0.5 * p.horizon * weights, strict=True):
        law, value = optimum.transition(p.horizon, s).of(start), optimal_value(p, reward, b, s)
        slope = value.l - value.Q @ law.mean
        square = slope @ slope + np.trace(value.Q @ law.covariance @ value.Q)
        total += weight * p.beta(s) * square / (2 * b**2)
    return float(total)


def linear_riccati(
    A: np.ndarray, a: np.ndarray, G: np.ndarray, reward: Quadratic, b: float, to_go: float
) -> Quadratic:
    """V* of dX = (A X + a) dt + G dW, with so much time to go, by the Riccati equation."""
    n, D = len(a), G @ G.T

    def rate(_: float, v: np.ndarray) -> np.ndarray:
        Q, slope = v[: n * n].reshape(n, n), v[n * n : -1]
        curved = A.T @ Q + Q @ A - Q @ D @ Q / b
        sloped = A.T @ slope - Q @ a - Q @ D @ slope / b
        level = a @ slope - 0.5 * np.trace(D @ Q) + 0.5 * slope @ D @ slope / b
        return np.concatenate([curved.ravel(), sloped, [level]])

    start = np.concatenate([reward.Q.ravel(), reward.l, [reward.c]])
    end = solve_ivp(rate, (0, to_go), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return Quadratic(end[: n * n].reshape(n, n), end[n * n : -1], float(end[-1]))


def log_average(
    A: np.ndarray,
    a: np.ndarray,
    G: np.ndarray,
    reward: Quadratic,
    b: float,
    to_go: float,
    x: np.ndarray,
) -> np.ndarray:
    """b log E[exp(r(X_T) / b) | x] by sums over Gauss-Hermite nodes of X_T, for rows of x."""
    n, (F, f, C) = len(a), transition(A, a, G, to_go)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(*[nodes] * n, indexing="ij"), axis=-1).reshape(-1, n)
    mass = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * n), axis=-1), -1).ravel()
    ends = (x @ F.T + f)[:, None] + z @ np.linalg.cholesky(C).T
    return b * np.log(np.exp(reward(ends) / b) @ mass)


class ChainStep(NamedTuple):
    """x' = F x + f + u + std z under the pretrained model, u the control."""

    F: np.ndarray
    f: np.ndarray
    std: float
    score_gain: float


def euler_chain(p: VPGaussian, noising_times: list[float], eta: float) -> list[ChainStep]:
    """Euler-Maruyama steps of the eta family's generation SDE with the exact score."""
    steps = []
    for s, after in pairwise(noising_times):
        spent = p.beta(s) * (s - after)  # g^2 h
        push = 0.5 * (1 + eta**2) * spent
        matrix, vector = p.score(s)
        F = (1 + 0.5 * spent) * np.eye(len(vector)) + push * matrix
        steps.append(ChainStep(F, push * vector, eta * np.sqrt(spent), push))
    return steps


def chain_optimum(
    steps: list[ChainStep], reward: Quadratic, b: float
) -> tuple[list[Quadratic], list[tuple[np.ndarray, np.ndarray]]]:
    """Values at all nodes, and controls u = K x + k, of max E r - b sum |u|^2 / (2 std^2).

    One maximisation of a quadratic a step (linear-quadratic control, backwards).
    """
    values, controls = [reward], []
    for step in reversed(steps):
        Q, slope, c = values[-1]
        variance = step.std**2
        hard = np.linalg.inv(Q + b / variance * np.eye(len(slope)))  # of -u'(.)u/2 + u'gradient
        K, k = -hard @ Q @ step.F, hard @ (slope - Q @ step.f)
        total, offset = step.F + K, step.f + k
        cost = b / variance
        values.append(
            Quadratic(
                total.T @ Q @ total + cost * K.T @ K,
                total.T @ (slope - Q @ offset) - cost * K.T @ k,
                float(
                    c
                    + slope @ offset
                    - 0.5 * offset @ Q @ offset
                    - 0.5 * variance * np.trace(Q)
                    - 0.5 * cost * k @ k
                ),
            )
        )
        controls.append((K, k))
    return values[::-1], controls[::-1]


def chain_regret(
    steps: list[ChainStep],
    values: list[Quadratic],
    optimum: list[tuple[np.ndarray, np.ndarray]],
    controls: list[tuple[np.ndarray, np.ndarray]],
    b: float,
    start: list[float],
) -> float:
    """J* - J: the square of the control's error at every step, in the curvature found there."""
    law, total = Normal(np.array(start), np.zeros((len(start), len(start)))), 0.0
    each = zip(steps, values[1:], optimum, controls, strict=True)
    for step, after, (K_best, k_best), (K, k) in each:
        hardness = after.Q + b / step.std**2 * np.eye(len(k))
        error, offset = K - K_best, k - k_best
        centre = error @ law.mean + offset
        error_covariance = error @ law.covariance @ error.T
        total += 0.5 * (centre @ hardness @ centre + np.trace(hardness @ error_covariance))
        law = Transition(step.F + K, step.f + k, step.std**2 * np.eye(len(k))).of(law)
    return float(total)


def chain_performance(
    steps: list[ChainStep],
    reward: Quadratic,
    b: float,
    controls: list[tuple[np.ndarray, np.ndarray]],
    start: Normal,
) -> float:
    """E r - b sum E|u|^2 / (2 std^2), by moments."""
    law, paid = start, 0.0
    for step, (K, k) in zip(steps, controls, strict=True):
        centre = K @ law.mean + k
        square = centre @ centre + np.trace(K @ law.covariance @ K.T)
        paid += b / (2 * step.std**2) * square
        law = Transition(step.F + K, step.f + k, step.std**2 * np.eye(len(k))).of(law)
    return reward.expectation(law) - float(paid)


def reward_gradient(steps: list[ChainStep], reward: Quadratic, start: np.ndarray) -> np.ndarray:
    """d E[r(X_N)] / d (shift of the score at each step), [steps, dim], without control."""
    mean, carried = start, [np.eye(len(start))]
    for step in steps:
        mean = step.F @ mean + step.f
    for step in reversed(steps[1:]):
        carried.append(carried[-1] @ step.F)
    slope = reward.l - reward.Q @ mean
    gains = [step.score_gain for step in steps]
    return np.array([g * F.T @ slope for g, F in zip(gains, carried[::-1], strict=True)])


def tilted_transition(base: Transition, reward: Quadratic, b: float) -> Transition:
    """Every conditional law of a transition, tilted by itself."""
    covariance = np.linalg.inv(np.linalg.inv(base.C) + reward.Q / b)
    kept = covariance @ np.linalg.inv(base.C)
    return Transition(kept @ base.F, kept @ base.f + covariance @ reward.l / b, covariance)


# No zero, no one, no equal numbers. Q has a negative eigenvalue, but the tilt exists.
REWARD = Quadratic(np.array([[0.9, 0.35], [0.35, -0.25]]), np.array([0.6, -0.4]), 0.23)
KL_WEIGHT = 0.7
