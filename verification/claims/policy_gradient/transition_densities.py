"""Transition densities: the laws of the next state, when that is the decision (view B).

log_prob is the log-density of the solver's step: it integrates to 1, with the mean and the
variance of the step; log_ratio is the difference of two on every path, and its mean under
the first is transition_kl >= 0; E grad log p = 0 and E (grad log p)^2 is Fisher's
information int |d b / d theta|^2 / sigma^2 dt.

The diffusion depends on time, state and action, so that two policies differ in mean and in
variance; steps are uneven, coordinates two.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from verification.claim import Check, Setting, array, expectation, pathwise
from verification.closed_form import gaussian_transitions as exact
from verification.cubature import mean, point_start

SOURCE = "Kloeden & Platen, section 9.1; Kullback & Leibler 1951; Fisher 1925"

E = exact.Equation()
NEW, OLD = exact.Feedback(0.4, -0.2), exact.Feedback(-0.3, 0.5)
NODES = (0.0, 0.2, 0.5)
START = [0.8, -0.55]


def policy(f: exact.Feedback, tilt: torch.Tensor | float = 0.0) -> ctrl.DeterministicPolicy:
    """a = gain x + level + tilt."""
    return ctrl.DeterministicPolicy(lambda t, x: f.gain * x + f.level + tilt)


SDE = ctrl.ControlledSDE(
    lambda t, x, a: E.pull * x + E.shift + a,
    lambda t, x, a: (E.noise + E.swing * x.square()) * (1 + E.widen * a),
    controls_diffusion=True,
)
FIXED = ctrl.ControlledSDE(SDE.drift, lambda t, x: E.noise * (1 + 0.3 * t))


def _integrals(setting: Setting) -> Iterator[Check]:
    """Integrals over the next state by the trapezoidal rule, which is exact for Gaussians."""
    h = NODES[1]
    before = np.array([[START[0]]])
    centre, variance = (v.item() for v in exact.law(E, NEW, before, h))
    y = setting.tensor(np.linspace(-9, 9, 73)) * variance**0.5 + centre
    states = torch.stack([torch.full_like(y, START[0]), y], dim=1)[..., None]
    grid = ctrl.TimeGrid(setting.tensor(NODES[:2]))
    paths = ctrl.Paths(states=states, actions=None, increments=None, grid=grid, weights=None)
    log_p = ctrl.transitions.log_prob(SDE, ctrl.EulerMaruyama(), policy(NEW), paths)[:, 0]
    mass = log_p.exp() * (y[1] - y[0])
    got = torch.stack([mass.sum(), mass @ y, mass @ (y - centre).square()])
    yield expectation("a density's integral", got[0], 1.0)
    yield expectation("its mean and variance", got[1:], [centre, variance])


def fisher(steps: np.ndarray) -> float:
    """int |d b / d tilt|^2 / sigma^2 dt of FIXED: two coordinates, each with slope 1."""
    total = 0.0
    for t, h in zip(NODES[:-1], steps.tolist(), strict=True):
        total = total + h * 2 / (E.noise * (1 + 0.3 * t)) ** 2
    return total


def _scores(setting: Setting, grid: ctrl.TimeGrid, paths: ctrl.Paths) -> Iterator[Check]:
    """d log p / d tilt, of the whole path, at tilt 0."""
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=4, noise=(2,))
    problem, start = ctrl.ControlProblem(FIXED, NODES[-1]), point_start(noise, START)
    paths = ctrl.simulate(problem, policy(NEW), start, grid, noise=noise)
    tilt = torch.zeros(len(start), 1).to(start).requires_grad_()
    log_p = ctrl.transitions.log_prob(FIXED, ctrl.EulerMaruyama(), policy(NEW, tilt), paths)
    (score,) = torch.autograd.grad(log_p.sum(), tilt)
    information = fisher(np.diff(NODES))
    yield expectation(
        "mean of the score function", mean(score[:, 0], paths), 0.0, scale=information**0.5
    )
    yield expectation(
        "its square: Fisher's information", mean(score[:, 0].square(), paths), information
    )


def checks(setting: Setting) -> Iterator[Check]:
    """Densities by hand, by integration, and in expectation over quadrature paths."""
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    steps = np.diff(NODES)
    solver = ctrl.EulerMaruyama()
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=4, noise=(2,))
    problem = ctrl.ControlProblem(SDE, NODES[-1])
    paths = ctrl.simulate(problem, policy(NEW), point_start(noise, START), grid, noise=noise)
    x = array(paths.states)
    computed = ctrl.transitions.log_prob(SDE, solver, policy(NEW), paths)
    new, old = (
        np.stack([exact.log_density(E, f, x[:, k], x[:, k + 1], h) for k, h in enumerate(steps)], 1)
        for f in (NEW, OLD)
    )
    yield pathwise("log-density, by hand", computed, new)
    ratio = ctrl.transitions.log_ratio(SDE, solver, policy(NEW), policy(OLD), paths)
    yield pathwise("log-ratio, against the difference of two", ratio, new - old)
    kl = ctrl.transitions.transition_kl(SDE, solver, policy(NEW), policy(OLD), paths)
    want = np.stack([exact.divergence(E, NEW, OLD, x[:, k], h) for k, h in enumerate(steps)], 1)
    yield pathwise("KL of transitions, by hand", kl, want)
    # the log-ratio is quadratic in the last step's noise: quadrature is exact
    yield expectation("mean log-ratio is the KL", mean(ratio, paths), mean(kl, paths))
    yield from _integrals(setting)
    yield from _scores(setting, grid, paths)


MISTAKES = r"""
ctrl.transitions.log_prob
    log(2 pi) missing | ` + 0.5 * math.log(2 * math.pi)` => ``
ctrl.solvers.EulerMaruyama.transition
    h for sqrt(h) | * math.sqrt(h) => * h
    h twice in the drift | states + h * sde => states + 2 * h * sde
    action left out of the drift | sde.drift_at(t, states, action) => sde.drift_at(t, states, 0 * action)
    spread + 1 % | sigma.abs() => 1.01 * sigma.abs()
ctrl.transitions._laws
    variance of the next step | nodes[k], nodes[k + 1], x => nodes[k], nodes[-1], x
ctrl.transitions.proposals
    density of the present state | states[:, 1:] => states[:, :-1]
ctrl.transitions.log_ratio
    ratio's quadratic term without its half | 0.5 * shift) => shift)
    sign of the ratio's quadratic term | + 0.5 * shift) => - 0.5 * shift)
    ratio without the change of variance | ` + widening` => ``
    roles of the two variances exchanged | std / std_ref\n => std_ref / std\n
ctrl.transitions.transition_kl
    KL in the other direction | scale = std / std_ref => scale = std_ref / std
    KL without the logarithm | ` - scale.log()` => ``
    KL in units of the other law | (mean - mean_ref) / std_ref) => (mean - mean_ref) / std)
verification.claims.policy_gradient.transition_densities.fisher
    Fisher's information of the first step | total + h => h
shared
    along paths: log-determinant dropped
    factor 1/2 of the normal density dropped
    mean over coordinates of the state for the sum
    along paths: KL without 1/2
"""
