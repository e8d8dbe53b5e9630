"""Girsanov for jump intensities: likelihood ratio and path KL of point processes.

Where a policy moves the intensity l of jumps, and not their sizes, dP/dP_ref of a path has
the factor prod (l / l_ref) over jumps times exp(-int (l - l_ref) dt), and the path KL the
part E int (l log(l / l_ref) - l + l_ref) dt; of constant intensities it is that of Poisson
laws. On every path the log-ratio is that of the scheme's transitions.
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import norm, poisson

import ctrl
from ctrl.jumps import Jumps
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form.jumps import poisson_kl
from verification.cubature import mean
from verification.problems.jumps import NOWHERE, L, controlled, rolled_out

SOURCE = "Bremaud 1981, VI.2, VI.3; Jacod & Shiryaev, III.5"


def towards(intensity: float) -> ctrl.DeterministicPolicy:
    """A policy that adds to the intensity."""
    return ctrl.DeterministicPolicy(lambda t, x: intensity * (1 + 0.5 * x.square()))


def chain_log_ratio(paths: ctrl.Paths, noise: float, extra: float, extra_ref: float) -> np.ndarray:
    """Of the transition laws: Gaussian times Poisson, by scipy."""
    assert paths.jumps is not None
    x, n = paths.states[..., 0].numpy(), paths.jumps.numpy()[..., 0]
    h = np.diff(paths.grid.nodes.numpy())
    before = x[:, :-1]
    continuous = x[:, 1:] - L.size * n
    total = np.zeros(len(x))
    for sign, more in ((1, extra), (-1, extra_ref)):
        a = more * (1 + 0.5 * before**2)
        middle = before + h * (L.pull * before + noise * a)
        each = norm.logpdf(continuous, middle, noise * np.sqrt(h))
        each = each + poisson.logpmf(n, h * (L.base + L.slope * np.maximum(before, 0) + a))
        total = total + sign * each.sum(1)
    return total


def checks(setting: Setting) -> Iterator[Check]:
    """Poisson laws, transitions, and mean 1 of the ratio."""
    grid = ctrl.TimeGrid(setting.tensor([0.0, 0.3, 0.8]))
    constant = ctrl.ControlledSDE(
        lambda t, x, a: 0 * x,
        lambda t, x: 1.0,
        jumps=Jumps(lambda t, x, a: a[:, 0], lambda t, x, a, z: torch.ones_like(x)),
    )
    one, other = (
        ctrl.DeterministicPolicy(lambda t, x, rate=rate: torch.full_like(x, rate))
        for rate in (1.7, 0.6)
    )
    still = ctrl.Paths(setting.tensor([[[0.0], [1.0], [1.0]]]), None, None, grid)
    kl = ctrl.girsanov.path_kl(constant, one, other, still)
    yield expectation("KL of Poisson processes", kl[0], poisson_kl(1.7, 0.6, 0.8))

    noise, extra, extra_ref = 0.5, 0.9, 0.2
    policy, reference = towards(extra), towards(extra_ref)
    sde = controlled(noise)
    problem = ctrl.ControlProblem(sde, 1.0)
    start = setting.tensor([0.4, 0.8, 1.1, 1.6]).repeat(16)[:, None]
    paths = ctrl.simulate(problem, policy, start, grid, generator=setting.generator("paths"))
    ratio = ctrl.girsanov.log_ratio(sde, policy, reference, paths)
    want = chain_log_ratio(paths, noise, extra, extra_ref)
    yield pathwise("log-ratio of the transitions", ratio, want)

    silent = controlled()
    paths = rolled_out(setting, 2)
    back = ctrl.girsanov.log_ratio(silent, NOWHERE, towards(0.4), paths)
    yield expectation("mean 1 of the ratio", mean((-back).exp(), paths), 1.0)
    kl = ctrl.girsanov.path_kl(silent, NOWHERE, towards(0.4), paths)
    yield expectation("KL is the mean of the log-ratio", mean(kl, paths), mean(back, paths))


MISTAKES = """
ctrl.jumps.intensity_kl
    KL without its compensator | ` - rate + reference)` => )
    KL the other way around | rate * ratio.log() - rate + reference
        => reference - reference * (1 + ratio.log()) + rate - reference
ctrl.girsanov.path_kl
    KL of jumps missing | `rates = rates + ` => `_ = `
ctrl.jumps.intensity_log_ratio
    log-ratio without its compensator | ` - (rate - reference) * h` => ``
    sign of the compensator | - (rate - reference) * h => + (rate - reference) * h
    log-ratio of jumps inverted | counts * ratio.log() => -counts * ratio.log()
ctrl.girsanov.log_ratio
    log-ratio of jumps missing | paths.grid) + jumped => paths.grid)
ctrl.girsanov.intensities
    both intensities at the policy's action | kind.intensity_at(t, x, a_ref) => kind.intensity_at(t, x, a)
"""
