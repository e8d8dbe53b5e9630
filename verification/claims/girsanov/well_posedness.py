"""Well-posedness of controlled SDEs: moments, and Lipschitz dependence on everything.

b and sigma Lipschitz (L in x, K in a; s in x), |b(0)| <= b0, |sigma(0)| <= sigma0:
additive noise: |X - Y| <= e^{L T} |x - y| + K int e^{L (T - t)} |a - a'| dt on every path;
else E |X - Y|^2 <= e^{(2 L + s^2) T} |x - y|^2, both with equality where all is linear; and
u = (E max |X|^2)^{1/2} obeys u <= |x| + int (L u + b0) dt + 2 (int (s u + sigma0)^2)^{1/2}.
Euler's chain obeys all of it with products of 1 + L h for exponentials.
False without the assumptions: dX = X^2 dt explodes; from x -> 0 dX = X^{1/2} dt tends to
T^2/4, and to 0 from x = 0; and E |X - Y|^2 >= T |x - y| for dX = X^{1/2} dW from x and 0.

Euler's chain obeys the theorem with its own constants (products of 1 + L h for e^{L T}), for any
noise of mean 0 and variance h, and so exactly on quadrature paths. Where an assumption is dropped
the conclusion fails: superlinear drifts explode, and square roots spoil the dependence on the
start, of the drift so much that there are several solutions.

Sources  [SaA] Zhao et al. 2025, "Score as Action", appendix, Theorem 2.1.
         [KS91] Karatzas & Shreve, 5.2.9 and 5.2.13 (constants here: Minkowski for their (a + b)^2).
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import well_posedness as exact
from verification.cubature import mean, point_start
from verification.problems import HORIZON, NODES, grid

SOURCE = '"Score as Action", arXiv 2502.01819, appendix, Theorem 2.1; Karatzas & Shreve 5.2.9'

L, K, S = 0.9, 0.7, 0.5  # Lipschitz: of the drift in state and action, of the diffusion in state
B0, SIGMA0 = 0.35, 0.4  # what drives the state 0
GAIN = 0.6  # Lipschitz constant of the policy in the state, and in its parameter
STEPS = np.diff(NODES)
Function = Callable[[Tensor], Tensor]


def curved_drift(x: Tensor) -> Tensor:
    """Lipschitz with constant L, 0 at 0."""
    return L * torch.sin(x)


def curved_noise(x: Tensor) -> Tensor:
    """Lipschitz with constant S, 0 at 0."""
    return S * torch.sin(x)


def straight_drift(x: Tensor) -> Tensor:
    """The equality in L."""
    return L * x


def straight_noise(x: Tensor) -> Tensor:
    """The equality in S."""
    return S * x


def superlinear(x: Tensor) -> Tensor:
    """A drift that no linear growth bounds."""
    return x.square()


def root(x: Tensor) -> Tensor:
    """A square root on both sides of 0, where its slope is infinite."""
    return x.abs().sqrt()


def paths_of(
    drift: Function,
    noise: Function | float,
    start: float,
    setting: Setting,
    parameter: float = 0.2,
    gain: float = 0.0,
) -> ctrl.Paths:
    """dX = (drift(X) + K a) dt + noise dW on quadrature paths, a = gain sin(X) + GAIN parameter."""
    sde = ctrl.ControlledSDE(
        lambda t, x, a: drift(x) + K * a, lambda t, x: noise(x) if callable(noise) else noise
    )
    policy = ctrl.DeterministicPolicy(lambda t, x: gain * torch.sin(x) + GAIN * parameter)
    rule = ctrl.noise.gauss_hermite(grid(setting).steps, nodes=4)
    begin = point_start(rule, [start])
    return ctrl.simulate(
        ctrl.ControlProblem(sde, HORIZON), policy, begin, grid(setting), noise=rule
    )


def end_of(drift: Function, start: float, time: float, steps: int, setting: Setting) -> float:
    """The last state without noise, on a uniform grid."""
    sde = ctrl.ControlledSDE(lambda t, x, a: drift(x), lambda t, x: 1.0)
    still = ctrl.DeterministicPolicy(lambda t, x: x)
    silent = ctrl.Noise(setting.tensor(np.zeros((1, steps, 1))))
    uniform = ctrl.uniform_grid(time, steps, device=setting.device)
    problem, begin = ctrl.ControlProblem(sde, time), setting.tensor([[start]])
    return float(ctrl.simulate_end(problem, still, begin, uniform, noise=silent))


def checks(setting: Setting) -> Iterator[Check]:
    """The bounds, their equalities, and what happens without the assumptions."""
    x, y = 0.4, 0.15
    # additive noise: on every path
    for name, drift, compare in (("", curved_drift, bound), ("linear: ", straight_drift, pathwise)):
        one, other = (paths_of(drift, SIGMA0, start, setting) for start in (x, y))
        gap = (one.states - other.states)[:, -1, 0].abs()
        most = exact.flow(L, STEPS) * (x - y) * np.ones(len(gap))
        relation = "=" if compare is pathwise else "<="
        yield compare(f"{name}additive noise: |X - Y| {relation} e^(LT) |x - y|", gap, most)

    # another parameter of the policy: its mean moves by GAIN times that, and feeds back
    shift, closed = 0.3, L + K * GAIN
    one, other = (
        paths_of(curved_drift, SIGMA0, x, setting, p, gain=GAIN) for p in (0.2, 0.2 + shift)
    )
    gap = (one.states - other.states)[:, -1, 0].abs()
    most = exact.driven(closed, K * GAIN * shift, STEPS) * np.ones(len(gap))
    yield bound("another parameter of the policy: at most in proportion", gap, most)
    one, other = (paths_of(straight_drift, SIGMA0, x, setting, p) for p in (0.2, 0.2 + shift))
    gap = (one.states - other.states)[:, -1, 0].abs()
    most = exact.driven(L, K * GAIN * shift, STEPS) * np.ones(len(gap))
    yield pathwise("linear: another control moves X by K int e^(L (T - t)) |da| dt", gap, most)

    # noise that depends on the state: in mean square
    for name, drift, noise, compare in (
        ("", curved_drift, curved_noise, bound),
        ("linear: ", straight_drift, straight_noise, expectation),
    ):
        one, other = (paths_of(drift, noise, start, setting) for start in (x, y))
        gap = one.states - other.states
        relation = "<=" if compare is bound else "="
        gap_square = mean(gap[:, -1, 0].square(), one)
        most = exact.mean_square(x - y, STEPS, L=L, s=S)
        text = f"{name}E |X - Y|^2 {relation} e^((2L + s^2) T) |x - y|^2"
        yield compare(text, gap_square, most)
        if compare is bound:
            top = mean(gap[:, :, 0].abs().amax(1).square(), one)
            yield bound("E max |X - Y|^2", top, exact.largest(x - y, STEPS, L=L, s=S))
    one, other = (paths_of(straight_drift, SIGMA0, start, setting) for start in (x, y))
    top = mean((one.states - other.states)[:, :, 0].abs().amax(1).square(), one)
    most = exact.largest(x - y, STEPS, L=L, s=0.0)
    yield expectation("linear: additive noise: E max |X - Y|^2 = e^(2LT) |x - y|^2", top, most)
    ends = [exact.mean_square(1.0, np.full(n, HORIZON / n), L=L, s=S) for n in (256, 512)]
    rate = math.exp((2 * L + S**2) * HORIZON)
    yield limit("the chain's constant tends to e^((2L + s^2) T)", 2 * ends[1] - ends[0], rate)

    # moments
    push = K * GAIN * 0.2
    one = paths_of(curved_drift, lambda x: curved_noise(x) + SIGMA0, x, setting)
    known = {"L": L, "s": S, "b0": push, "sigma0": SIGMA0}
    mean_square = mean(one.states[:, -1, 0].square(), one)
    yield bound("E |X|^2", mean_square, exact.mean_square(x, STEPS, **known))
    top = mean(one.states[:, :, 0].abs().amax(1).square(), one)
    yield bound("E max |X|^2", top, exact.largest(x, STEPS, **known))
    one = paths_of(torch.zeros_like, SIGMA0, 0.001, setting, parameter=0.0)
    top = mean(one.states[:, :, 0].abs().amax(1).square(), one)
    most = exact.largest(0.001, STEPS, L=0.0, s=0.0, sigma0=SIGMA0)
    yield bound("Brownian motion alone: E max |X|^2 <= 4 sigma0^2 T", top, most)

    # and without the assumptions
    ends = [end_of(superlinear, 1.6, 0.3, n, setting) for n in (64, 128, 256)]
    end = (8 * ends[2] - 6 * ends[1] + ends[0]) / 3
    yield limit("dX = X^2 dt before it explodes", end, exact.exploding(1.6, 0.3))
    ends = [end_of(superlinear, 1.6, 1.2, n, setting) for n in (4, 6, 8)]
    grown = np.log(ends)
    yield bound("after it: finer steps, ever larger states", 1.4 * grown[:-1], grown[1:])
    try:
        end_of(superlinear, 1.6, 1.2, 40, setting)
        refused = 0.0
    except ValueError:
        refused = 1.0
    yield pathwise("an explosion is refused, not returned", refused, 1.0)
    ends = [end_of(root, start, HORIZON, 200, setting) for start in (1e-6, 0.0)]
    left = [math.sqrt(ends[0]), ends[1] + 1.0]
    wanted = [math.sqrt(exact.branching(1e-6, HORIZON)), 1.0]
    yield limit("dX = X^(1/2) dt: two solutions from 0", left, wanted)
    for start in (0.1, 0.001):
        one = paths_of(torch.zeros_like, root, start, setting, parameter=0.0)
        uncontrolled_square = mean(one.states[:, -1, 0].square(), one)
        yield bound(
            f"dX = X^(1/2) dW: E |X - 0|^2 >= x^2 + T x, x = {start}",
            start**2 + HORIZON * start,
            uncontrolled_square,
        )


MISTAKES = """
ctrl.solvers.EulerMaruyama.step_into
    noise twice | torch.addcmul(states, sigma, increment => torch.addcmul(states, 2 * sigma, increment
    drift at the new state | sde.drift_at(t, states, action) => sde.drift_at(t, after, action)
verification.closed_form.well_posedness.flow
    Lipschitz constant of the drift halved | 1 + L => 1 + 0.5 * L
verification.closed_form.well_posedness.driven
    Lipschitz constant in the action halved | h * push => h * push / 2
verification.closed_form.well_posedness.mean_square
    mean square: constant of the diffusion halved | h * (s * size => h * (s / 2 * size
    mean square: drift of the square counted once | ((1 + L * h) * size + h * b0) ** 2 => (1 + L * h) * size**2
verification.closed_form.well_posedness.largest
    Doob's 4 forgotten | doob = 2.0 => doob = 1.0
    maximum: level of the diffusion forgotten | (s * size + sigma0) ** 2 => (s * size) ** 2
    maximum: Gronwall's feedback forgotten | h * (L * size + b0) => h * (L * start + b0)
verification.claims.girsanov.well_posedness.curved_drift
    drift with a larger slope than claimed | L * torch.sin(x) => L * torch.sin(4 * x)
    superlinear drift where a Lipschitz one is meant | L * torch.sin(x) => L * x + x**3
verification.claims.girsanov.well_posedness.curved_noise
    diffusion with a larger slope than claimed | S * torch.sin(x) => 4 * S * x
    diffusion that jumps where a Lipschitz one is meant | S * torch.sin(x) => 6 * torch.sign(torch.sin(8 * x))
verification.claims.girsanov.well_posedness.superlinear
    linear drift where x^2 is meant | x.square() => x
verification.claims.girsanov.well_posedness.root
    linear function where x^{1/2} is meant | x.abs().sqrt() => x.abs()
ctrl.simulate.simulate_end
    explosion unnoticed | torch.isfinite(end) => ~torch.isnan(end)
shared
    a step of Euler-Maruyama twice as long
"""
