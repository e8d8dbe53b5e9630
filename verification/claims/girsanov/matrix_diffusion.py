"""Girsanov with a diffusion matrix: the control is the least u with sigma u = b - b_ref.

With a diffusion matrix the rate of the path KL is 1/2 (b - b_ref)' (sigma sigma')^{-1}
(b - b_ref) = 1/2 |u|^2, u the least solution of sigma u = b - b_ref; the log-ratio is that
of normal densities with covariance sigma sigma' h, whatever the shape of sigma, and at any
condition number. Where no u exists the KL is infinite, and the code refuses.

What counts is sigma sigma', the covariance of a step, not sigma; where the noise does not reach,
there is no likelihood ratio.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, array, expectation, pathwise
from verification.closed_form import weighted_norm
from verification.closed_form.gaussian_law import log_density
from verification.cubature import mean, point_start
from verification.problems import NoiseKind

SOURCE = "Karatzas & Shreve, Brownian Motion and Stochastic Calculus, 3.5"

CONDITIONS = (3.0, 1e3, 1e6)
SHIFT = (0.37, -0.82)
NODES = (0.0, 0.2, 0.65)
MATRIX = ((0.5, -0.3, 0.4), (0.2, 0.7, -0.6))


def whitened(
    setting: Setting, sigma: Tensor, shift: Tensor, noise: NoiseKind = "general"
) -> Tensor:
    """u of one state of two coordinates."""
    count = sigma.shape[1] if noise == "general" else None
    value = sigma if noise == "general" else sigma[:, 0]
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: value[None], noise, count)
    x = setting.tensor([[0.4, -0.3]])
    return sde.whiten(setting.tensor(0.2), x, shift[None])[0]


def refused(setting: Setting, sigma: list[list[float]], noise: NoiseKind = "general") -> bool:
    """Whether a drift that the noise does not reach has no control."""
    try:
        whitened(setting, setting.tensor(sigma), setting.tensor(SHIFT), noise)
    except ValueError as error:
        return "infinite" in str(error)
    return False


def moving(setting: Setting) -> ctrl.ControlledSDE:
    """Three Brownian motions for two coordinates, the matrix turning with the state."""
    matrix = setting.tensor(MATRIX)

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        return matrix * (1 + 0.3 * x.flip(1).tanh())[:, :, None] + 0.2 * t

    return ctrl.ControlledSDE(lambda t, x, a: a - 0.3 * x.sin(), diffusion, "general", 3)


def densities(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p / p_ref and KL(p || p_ref) of every step of ``moving``, [paths, steps]."""
    ratios, kls = [], []
    for k, h in enumerate(np.diff(NODES)):
        x, after = states[:, k], states[:, k + 1]
        drift, base = 0.8 - 1.1 * x[:, ::-1] - 0.3 * np.sin(x), -0.4 * x - 0.3 * np.sin(x)
        sigma = np.array(MATRIX) * (1 + 0.3 * np.tanh(x[:, ::-1]))[:, :, None] + 0.2 * NODES[k]
        covariance = h * sigma @ sigma.transpose(0, 2, 1)
        one = log_density(after, x + h * drift, covariance)
        ratios.append(one - log_density(after, x + h * base, covariance))
        gap = h * (drift - base)
        kls.append(0.5 * (gap * np.linalg.solve(covariance, gap[..., None])[..., 0]).sum(1))
    return np.stack(ratios, 1), np.stack(kls, 1)


POLICY = ctrl.DeterministicPolicy(lambda t, x: 0.8 - 1.1 * x.flip(1))
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: -0.4 * x)


def by_hand(scales: Tensor) -> float:
    """Sum of (shift / scale)^2."""
    return sum((b / s) ** 2 for b, s in zip(SHIFT, scales.tolist(), strict=True))


def checks(setting: Setting) -> Iterator[Check]:
    """Square and wide matrices, state-dependent ones, and those that do not reach."""
    shift = setting.tensor(SHIFT)
    for columns in (2, 3):
        for condition in CONDITIONS:
            sigma = setting.tensor(weighted_norm.rotated(condition, columns, 0.6, 1.1))
            u = whitened(setting, sigma, shift)
            exact = weighted_norm.energy(sigma.double().tolist(), shift.double().tolist())
            yield expectation(
                f"|u|^2, {columns} Brownian motions, condition number {condition:g}",
                u.square().sum(),
                exact,
            )

    nodes = ctrl.TimeGrid(setting.tensor(NODES))
    sde, noise = moving(setting), ctrl.noise.gauss_hermite(nodes.steps, nodes=3, noise=(3,))
    start = point_start(noise, [0.4, -0.9])
    paths = ctrl.simulate(ctrl.ControlProblem(sde, NODES[-1]), POLICY, start, nodes, noise=noise)
    ratios, kls = densities(array(paths.states))
    ratio = ctrl.girsanov.log_ratio(sde, POLICY, REFERENCE, paths)
    yield pathwise("log-ratio, against normal densities on every path", ratio, ratios.sum(1))
    running = ctrl.girsanov.path_kl(sde, POLICY, REFERENCE, paths)
    yield pathwise("running form, against the KLs of the transitions", running, kls.sum(1))
    yield expectation(
        "mean of the log-ratio, against that of the running form",
        mean(ratio, paths),
        mean(running, paths),
    )

    scales = setting.tensor([0.45, 0.8])
    whole = whitened(setting, torch.diag(scales), shift)
    yield expectation(
        "one motion a coordinate, written as a vector and as a matrix",
        whitened(setting, scales[:, None], shift, "diagonal"),
        whole,
    )
    yield expectation(
        "one motion a coordinate, |u|^2 by hand", whole.square().sum(), by_hand(scales)
    )
    along = whitened(setting, scales[:, None], 1.7 * scales, "scalar")
    yield expectation("one motion for both coordinates, |u|^2", along.square().sum(), 1.7**2)
    yield expectation(
        "drifts that the noise does not reach, refused",
        float(
            refused(setting, [[0.5], [0.3]])
            + refused(setting, [[0.5, 0.25], [0.2, 0.1]])
            + refused(setting, [[0.45], [0.8]], "scalar")
            + refused(setting, [[0.45], [0.0]], "diagonal")
        ),
        4.0,
    )


MISTAKES = """
ctrl.sde.ControlledSDE.whiten
    sigma entry by entry squared | _solve(sigma, shift => _solve(sigma.square() if self.noise_dim else sigma, shift
    the diagonal of the matrix alone | _solve(sigma, shift
        => _solve(sigma.tril().triu() if self.noise_dim else sigma, shift
    transposed matrix | _solve(sigma, shift => _solve(sigma.mT if sigma.shape[-1] == 2 else sigma, shift
    silent coordinates not refused | (silent & (shift != 0)) => (silent & (shift == 0))
    scalar noise taken for one motion a coordinate | sigma = sigma.expand_as(states).reshape(len(states), -1, 1)
        => sigma = torch.diag_embed(sigma.expand_as(states))
ctrl.sde._solve
    transpose missing in the pseudo-inverse [ValueError] | "pji,pj->pi", right
        => "pij,pj->pi", right[..., : right.shape[-2]]
    singular values below 1e-4 dropped [ValueError] | values <= round_off * largest => values <= 1e-4 * largest
    unreachable drifts not refused | missed > 100 * round_off * scale => missed > 1e9 * scale
shared
    sigma' for its inverse
    as many Brownian motions as coordinates
    state at the right end of a step
    factor 1/2 dropped
    sign of the stochastic integral
    diagonal noise not squared
"""
