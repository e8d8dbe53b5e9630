"""Where each method of policy evaluation ends, under a misspecified value: chain and limit.

    dX = -pull X dt + noise dW, X_0 ~ N(mean, variance); reward rate x^2, terminal reward
    terminal x^2
    J(t, x) = terminal x^2 + (horizon - t) coefficients . (1, x, x^2)

In the monomials m(x) = (1, x, x^2) everything is a matrix: E[m(X')|x] = step m, gram = E m m',
the mean of dM given x is (shift' coefficients + pay) . m, and its variance comes from
``conditional_covariance``.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp


@dataclass(frozen=True)
class Evaluation:
    """The numbers of the problem."""

    pull: float = 1.2
    noise: float = 0.7
    mean: float = 0.6
    variance: float = 0.4
    horizon: float = 1.0
    discount: float = 0.0
    terminal: float = 0.0


def gram(mean: float, variance: float) -> np.ndarray:
    """E m(X) m(X)' of X ~ N(mean, variance)."""
    raw = [1.0, mean]
    for n in range(2, 5):
        raw.append(mean * raw[-1] + (n - 1) * variance * raw[-2])
    return np.array([[raw[i + j] for j in range(3)] for i in range(3)])


def chain(e: Evaluation, nodes: np.ndarray, decay: float) -> dict[str, np.ndarray]:
    """Coefficients at which each method is stationary, on the Euler chain.

    ML: the projection of the true value. CTD(0): the moment equation. CTD(lambda): that of features
    decayed at the rate ``decay``. GMM: the least moments of (horizon - t) m, 1 and x, weighted
    with the identity or the inverse of E int xi xi' dt. Squares: the sum of squared increments.
    """
    true = values(e, nodes)
    project, target = np.zeros((3, 3)), np.zeros(3)
    traces, trace_right, trace = np.zeros((3, 3)), np.zeros(3), np.zeros((3, 3))
    moments, moments_right, covariance = np.zeros((5, 3)), np.zeros(5), np.zeros((5, 5))
    squares, squares_right = np.zeros((3, 3)), np.zeros(3)
    mean, variance = e.mean, e.variance
    for k, h in enumerate(np.diff(nodes)):
        now, after, factor = e.horizon - nodes[k], e.horizon - nodes[k + 1], np.exp(-e.discount * h)
        weight, f, v = np.exp(-e.discount * (nodes[k] - nodes[0])), 1 - e.pull * h, e.noise**2 * h
        step = np.array([[1, 0, 0], [0, f, 0], [v, 0, f**2]])
        g = gram(mean, variance)
        shift = factor * after * step - now * np.eye(3)
        pay = e.terminal * (factor * step[2] - np.eye(3)[2]) + h * np.eye(3)[2]
        project += weight**2 * h * now**2 * g
        target += weight**2 * h * now * g @ (true[k] - [0, 0, e.terminal])
        trace = trace + h * now * g  # E xi m', with the step itself
        traces += weight * trace @ shift.T
        trace_right += weight * trace @ pay
        trace = np.exp(-decay * h) * trace @ step.T
        tests = np.vstack([now * np.eye(3), np.eye(3)[:2]])
        moments += weight * tests @ g @ shift.T
        moments_right += weight * tests @ g @ pay
        covariance += h * tests @ g @ tests.T
        conditional_covariance = np.zeros((3, 3))  # E Cov(m(X') | X)
        conditional_covariance[1:, 1:] = [
            [v, 2 * f * v * g[0, 1]],
            [2 * f * v * g[0, 1], 4 * f**2 * v * g[1, 1] + 2 * v**2],
        ]
        squares += shift @ g @ shift.T + (factor * after) ** 2 * conditional_covariance
        squares_right += (
            shift @ g @ pay + factor**2 * after * e.terminal * conditional_covariance[2]
        )
        mean, variance = f * mean, f**2 * variance + v
    weighted = moments.T @ np.linalg.inv(covariance)
    return {
        "ML": np.linalg.solve(project, target),
        "CTD(0)": np.linalg.solve(moments[:3], -moments_right[:3]),
        "CTD(lambda)": np.linalg.solve(traces, -trace_right),
        "GMM, identity": np.linalg.solve(moments.T @ moments, -moments.T @ moments_right),
        "GMM, covariance": np.linalg.solve(weighted @ moments, -weighted @ moments_right),
        "squares": np.linalg.solve(squares, -squares_right),
    }


def values(e: Evaluation, nodes: np.ndarray) -> np.ndarray:
    """The chain's value at every node, in (1, x, x^2)."""
    backward = [np.array([0, 0, e.terminal])]
    for h in np.diff(nodes)[::-1]:
        constant, _, curvature = backward[-1]
        keep, f, v = np.exp(-e.discount * h), 1 - e.pull * h, e.noise**2 * h
        backward.append(
            np.array([keep * (constant + curvature * v), 0, h + keep * curvature * f**2])
        )
    return np.array(backward[::-1])


def squares_of_the_true_value(e: Evaluation, nodes: np.ndarray) -> float:
    """The factor at which c V has least squared increments (terminal = 0): not 1.

    dM of c V is c (noise - r h) + r h, noise = e^{-discount h} (V(X') - E V(X')).
    """
    true, above, below = values(e, nodes), 0.0, 0.0
    mean, variance = e.mean, e.variance
    for k, h in enumerate(np.diff(nodes)):
        g, f, v = gram(mean, variance), 1 - e.pull * h, e.noise**2 * h
        noise = np.exp(-e.discount * h) ** 2 * true[k + 1][2] ** 2
        above += h**2 * g[2, 2]
        below += h**2 * g[2, 2] + noise * (4 * f**2 * v * g[1, 1] + 2 * v**2)
        mean, variance = f * mean, f**2 * variance + v
    return above / below


def continuous(e: Evaluation, decay: float) -> dict[str, np.ndarray]:
    """Their limits as the steps vanish: integrals over time of exact moments.

    Without discount and terminal reward. The features' generator is
    L (tau m) = -m + tau rate m, with rate m = (0, -pull x, noise^2 - 2 pull x^2).

    Squared increments tend to E int noise^2 |J'|^2 dt, least where J does not depend on x; the
    constant that is left over is the mean reward, by the terms of the next order. Among c V they
    are least at c = h E int r^2 dt / E int noise^2 |V'|^2 dt, to first order.
    """
    k, s2 = e.pull, e.noise**2
    rate = np.array([[0, 0, 0], [0, -k, 0], [s2, 0, -2 * k]])
    square = np.array([0.0, 0.0, 1.0])

    def law(t: float) -> np.ndarray:
        rest = s2 / (2 * k)
        return gram(e.mean * np.exp(-k * t), rest + (e.variance - rest) * np.exp(-2 * k * t))

    points, masses = np.polynomial.legendre.leggauss(40)
    project, target = np.zeros((3, 3)), np.zeros(3)
    moments, right = np.zeros((3, 3)), np.zeros(3)
    reward = above = below = 0.0
    for t, w in zip(e.horizon * (points + 1) / 2, e.horizon * masses / 2, strict=True):
        tau, g = e.horizon - t, law(t)
        curvature = (1 - np.exp(-2 * k * tau)) / (2 * k)
        true = np.array([s2 / (2 * k) * (tau - curvature), 0, curvature])
        project += w * tau**2 * g
        target += w * tau * g @ true
        moments += w * tau * g @ (tau * rate - np.eye(3)).T
        right += w * tau * g @ square
        reward += w * g[0, 2] / e.horizon
        above += w * g[2, 2]
        below += w * s2 * 4 * curvature**2 * g[1, 1]

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        trace, tau = y[:9].reshape(3, 3), e.horizon - t
        moves = -decay * trace + trace @ rate.T + tau * law(t)
        shift = tau * rate - np.eye(3)
        return np.concatenate([moves.ravel(), (trace @ shift.T).ravel(), trace @ square])

    end = solve_ivp(slope, (0, e.horizon), np.zeros(21), rtol=1e-10, atol=1e-13).y[:, -1]
    return {
        "ML": np.linalg.solve(project, target),
        "CTD(0)": np.linalg.solve(moments, -right),
        "CTD(lambda)": np.linalg.solve(end[9:18].reshape(3, 3), -end[18:]),
        "squares": np.array([reward, 0.0, 0.0]),
        "squares of c V, c / h": np.array([above / below]),
    }
