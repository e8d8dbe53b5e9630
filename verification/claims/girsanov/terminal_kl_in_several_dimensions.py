"""Path and terminal KLs in two dimensions, of noise that mixes and grows with time.

KL(X_T || X_T under P_ref) <= KL(P || P_ref) = 1/2 E int |S^{-1} (b - b_ref)|^2 dt. From a point
the two are equal where b - b_ref = S S' l for a constant l, since the likelihood ratio is then
a function of X_T alone; with feedback in the state they differ.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, bound, expectation
from verification.closed_form.gaussian_law import Normal, chain, kl
from verification.cubature import mean, point_start
from verification.problems.matrix_lq import of_time

SOURCE = '"Score as Action", arXiv 2502.01819, Theorem 3.1; Karatzas & Shreve, 3.5'
WHY_DOUBLE = "ctrl.linear is double precision"

NODES = np.array([0.0, 0.2, 0.65])
START = np.array([0.4, -0.9])
PULL = np.array([(-0.6, 0.25), (0.1, -0.35)])  # of both laws
TILT = np.array([0.7, -0.45])
GAINS = {"constant tilt": np.zeros((2, 2)), "feedback": np.array([(0.5, -0.8), (0.3, 0.2)])}


def noise(t: float) -> np.ndarray:
    """S."""
    return np.array([(0.5, 0.2), (-0.3, 0.7)]) * (1 + 0.9 * t)


def law(gain: np.ndarray, tilt: np.ndarray, pull: np.ndarray) -> Normal:
    """Of all states of an Euler chain after the first, which is a point."""
    F, f, C = [], [], []
    for t, h in zip(NODES[:-1], np.diff(NODES), strict=True):
        square = noise(t) @ noise(t).T
        F.append(np.eye(2) + h * (pull + gain))
        f.append(h * square @ tilt)
        C.append(h * square)
    return chain(Normal(F[0] @ START + f[0], C[0]), list(zip(F[1:], f[1:], C[1:], strict=True)))


def checks(setting: Setting) -> Iterator[Check]:
    """A constant tilt, for which the two are equal, and feedback."""
    S, tilt = of_time(setting, noise), setting.tensor(TILT)
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    brownian = ctrl.noise.gauss_hermite(grid.steps, nodes=3, noise=(2,))
    start, ends = point_start(brownian, list(START)), list[tuple[float, float]]()
    for name, each in GAINS.items():
        gain, pull = setting.tensor(each), setting.tensor(PULL * (name == "feedback"))
        sde = ctrl.ControlledSDE(
            lambda t, x, a, pull=pull: x @ pull.T + a,
            lambda t, x: S(t).expand(len(x), 2, 2),
            "general",
            2,
        )

        def acting(t: Tensor, x: Tensor, gain: Tensor = gain) -> Tensor:
            return x @ gain.T + S(t) @ S(t).T @ tilt

        policy, reference = (
            ctrl.DeterministicPolicy(mean) for mean in (acting, lambda t, x: 0.0 * x)
        )
        problem = ctrl.ControlProblem(sde, float(NODES[-1]))
        paths = ctrl.simulate(problem, policy, start, grid, noise=brownian)
        path = float(mean(ctrl.girsanov.path_kl(sde, policy, reference, paths), paths))
        moved, still = law(each, TILT, pull.numpy()), law(0 * each, 0 * TILT, pull.numpy())
        yield expectation(f"{name}: path KL, against the joint laws", path, kl(moved, still))
        last, other = moved.of(2, 3), still.of(2, 3)
        gaussians = [
            ctrl.linear.Gaussian(setting.tensor(one.mean), setting.tensor(one.covariance))
            for one in (last, other)
        ]
        terminal = float(ctrl.linear.gaussian_kl(*gaussians))
        yield expectation(f"{name}: terminal KL", terminal, kl(last, other))
        ends.append((terminal, path))
        x = paths.states[:, -1]
        average = mean(x, paths)
        covariance = mean((x - average)[:, :, None] * (x - average)[:, None], paths)
        yield expectation(f"{name}: covariance of the last state", covariance, last.covariance)
    (terminal, path), (below, above) = ends
    yield expectation("constant tilt: terminal KL = path KL", terminal, path)
    yield bound("feedback: terminal KL <= path KL", below, above)


MISTAKES = """
shared
    sigma' for its inverse
    sigma transposed
    factor 1/2 dropped
    mean over coordinates for their sum
    Gaussian KL in the other direction
    Gaussian KL without the means
    Gaussian KL, sign of the log-determinant
    control not in units of the noise
    uneven grid treated as uniform
    time at the right end of a step
"""
