"""Girsanov's weights: paths of one law as paths of another.

Under P the weights exp(-log dP/dP_ref) have mean 1, and E[w f] = E_ref f for functions f of
the whole path; they turn the mean of the log-ratio into -KL(P_ref || P), the other KL. The
ratio is that of the path, the product over all steps: the last step's alone is biased. A
weight's second moment is 1 + chi^2(P_ref || P), not a KL.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.closed_form.gaussian_law import kl, second_moment_of_ratio
from verification.cubature import gaussian_start, mean
from verification.problems import ornstein_uhlenbeck

SOURCE = "Karatzas & Shreve, Brownian Motion and Stochastic Calculus, Theorem 3.5.1"

P = closed.OrnsteinUhlenbeck()
NODES = (0.0, 0.3, 0.75)
FREQUENCY = 1.3


def whole(each: Tensor) -> Tensor:
    """The log-ratio of a path, from those of its steps."""
    return each.sum(1)


def functions(paths: ctrl.Paths) -> Tensor:
    """Functions of a path, [paths, 4]."""
    middle, end = paths.states[:, 1, 0], paths.states[:, 2, 0]
    return torch.stack([end, end.square(), middle * end, (FREQUENCY * end).cos()], dim=1)


def of_reference() -> np.ndarray:
    """Their means under the reference law, which is Gaussian."""
    law = closed.euler_laws(P, np.array(NODES))[1]
    _, middle, end = law.mean
    covariance = law.covariance
    wave = np.cos(FREQUENCY * end) * np.exp(-0.5 * FREQUENCY**2 * covariance[2, 2])
    return np.array([end, end**2 + covariance[2, 2], middle * end + covariance[1, 2], wave])


def weighted(setting: Setting, nodes: int) -> tuple[ctrl.Paths, Tensor, Tensor]:
    """Paths of the policy, their log-ratio, and their weights as paths of the reference."""
    problem, policy, reference = ornstein_uhlenbeck(P)
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    start, noise = gaussian_start(grid, P.mean, P.std, nodes)
    paths = ctrl.simulate(problem, policy, start, grid, noise=noise)
    ratio = ctrl.girsanov.log_ratio(problem.dynamics, policy, reference, paths)
    each = ctrl.transitions.log_ratio(
        problem.dynamics, ctrl.EulerMaruyama(), policy, reference, paths
    )
    return paths, ratio, ctrl.girsanov.importance_weights(whole(each), paths.weights)


def checks(setting: Setting) -> Iterator[Check]:
    """A linear law by quadrature, which converges faster than any power of its nodes."""
    paths, ratio, weights = weighted(setting, nodes=20)
    yield expectation(
        "mean of the weights before they are normalised", mean((-ratio).exp(), paths), 1.0
    )
    expectations = weights @ functions(paths)
    for name, one, exact in zip(
        ("X_T", "X_T^2", "X_t X_T", "cos(w X_T)"), expectations, of_reference(), strict=True
    ):
        yield expectation(f"E[w f], f = {name}", one, exact)
    laws = closed.euler_laws(P, np.array(NODES))
    yield expectation("E[w log dP/dP_ref] = -KL(P_ref || P)", weights @ ratio, -kl(*laws[::-1]))
    square = mean((-2 * ratio).exp(), paths)
    # heavy tails: 20 nodes give eight digits
    yield limit("E w^2 = 1 + chi^2", square, second_moment_of_ratio(*laws))


MISTAKES = """
ctrl.girsanov.importance_weights
    sign of the log-ratio | weights.log() - log_ratio => weights.log() + log_ratio
    weights forgotten | weights.log() - log_ratio => weights.log()
    quadrature weights forgotten | weights.log() - log_ratio => -log_ratio
    weights clipped | weights.log() - log_ratio => weights.log() - log_ratio.clamp(-1.0, 1.0)
    square root of the weights | weights.log() - log_ratio => weights.log() - 0.5 * log_ratio
verification.claims.girsanov.change_of_measure.whole
    ratio of the last step alone | each.sum(1) => each[:, -1]
    mean over steps for their product | each.sum(1) => each.mean(1)
ctrl.girsanov.log_ratio
    factor 1/2 dropped | time_integral(0.5 * u => time_integral(u
ctrl.transitions.log_ratio
    half of a transition's shift | (mean - mean_ref) / std_ref => 0.5 * (mean - mean_ref) / std_ref
verification.closed_form.gaussian_law.second_moment_of_ratio
    chi-square with the laws exchanged | both = 2 * other - one => both = 2 * one - other
shared
    sign of the stochastic integral
    Brownian motion of P taken for that of P_ref
    state at the right end of a step
"""
