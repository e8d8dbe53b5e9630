"""Risk-sensitive values, q-rates and gradients of a linear-quadratic problem.

With q(t, x, a) = d_t V + L^a V + r + risk/2 |sigma' grad V|^2 the optimal pair has
q = temperature log pi, V + int (r - q) dt + risk/2 <V> is a martingale, and V is the
certainty equivalent 1/risk log E exp(risk R). The policy gradient is the mean of
d log pi q under the law tilted by exp(risk R), with drift b + risk sigma sigma' grad V; the
mean under the policy's own law misses risk E int sigma^2 W_x V_x dt, W = dV.

The answers are certainty equivalents 1/risk log E exp(risk R) of a chain, computed from that
definition and extrapolated to vanishing steps; no Riccati equation appears in them.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from scipy.integrate import solve_ivp
from torch import Tensor

import ctrl
from ctrl import linear, q_learning
from ctrl import risk_sensitive as rs
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import risk_sensitive as exact

SOURCE = "Jia 2024, arXiv 2404.12598; Jacobson 1973 for the linear-quadratic answer"
WHY_DOUBLE = "the answers are extrapolated from chains in float64"
PRECISION = torch.float64

AVERSE, SEEKING = -1.1, 0.6
GAIN, OFFSET, STD, START = -0.5, 0.2, 0.45, 0.7  # a policy that is not optimal
TIMES = torch.linspace(0, exact.HORIZON, 5, dtype=torch.float64)


def lq() -> linear.LinearQuadratic:
    """The problem, in double precision as all exact answers are."""
    matrices = (exact.PULL, exact.PUSH, exact.NOISE, exact.STATE, exact.ACTION)
    A, B, sigma, M, N = (torch.tensor([[each]], dtype=torch.float64) for each in matrices)
    p, f, h = (
        torch.tensor([each], dtype=torch.float64) for each in (exact.TILT, exact.DRIFT, exact.LAST)
    )
    H = torch.tensor([[exact.END]], dtype=torch.float64)
    return linear.LinearQuadratic(
        A, B, sigma, M, N, p=p, f=f, H=H, h=h, temperature=exact.TEMPERATURE
    )


def law(gain: Tensor) -> linear.LinearGaussian:
    """The policy N(gain x + OFFSET, STD^2)."""
    offset, variance = gain.new_tensor([OFFSET]), gain.new_tensor([[STD**2]])
    return linear.LinearGaussian(gain.reshape(1, 1), offset, variance)


def at_start(solution: linear.FiniteHorizon) -> np.ndarray:
    """S, e, c at time 0."""
    value = solution.value_at(TIMES[0])
    return torch.stack([value.hessian[0, 0], value.slope[0], value.constant]).detach().numpy()


def one_step(
    solution: linear.FiniteHorizon, risk: float, h: float, x: Tensor, a: Tensor, t: float
) -> np.ndarray:
    """E[dM] / h from (t, x, a), of the optimal pair: shipped increments on quadrature."""
    policy = solution.policy()
    assert isinstance(policy, ctrl.RandomPolicy)
    problem = lq().problem(exact.HORIZON)
    grid = ctrl.TimeGrid(torch.tensor([t, t + h], dtype=torch.float64))
    rule = ctrl.noise.gauss_hermite(grid.steps, nodes=5)
    assert rule.increments is not None
    assert rule.weights is not None
    noise = ctrl.Noise(rule.increments.repeat(len(x), 1, 1))
    start, actions = (each.repeat_interleave(len(rule.weights), 0) for each in (x, a))
    held = ctrl.DeterministicPolicy(lambda t, x: actions)
    paths = ctrl.simulate(problem, held, start, grid, noise=noise)
    q = q_learning.GibbsQ(policy, exact.TEMPERATURE)
    dm = rs.increments(solution.value, q, problem, paths, risk)[:, 0]
    return (dm.view(len(x), -1) @ rule.weights).numpy() / h


def drift_of(sde: ctrl.ControlledSDE, t: float) -> tuple[float, float]:
    """Slope and constant of a linear drift at the policy's mean action."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at_zero, at_one = sde.drift_at(x.new_tensor(t), x, GAIN * x + OFFSET)[:, 0].tolist()
    return at_one - at_zero, at_zero


def moments(sde: ctrl.ControlledSDE, times: np.ndarray) -> np.ndarray:
    """Mean and variance of X at times, under the policy's mean action; [times, 2].

    The drift's slope and constant are analytic in time: polynomials through Chebyshev's nodes.
    """
    nodes = 0.5 * exact.HORIZON * (1 - np.cos(np.pi * (np.arange(12) + 0.5) / 12))
    each = np.array([drift_of(sde, t) for t in nodes])
    slope, constant = (Chebyshev.fit(nodes, one, 11, [0, exact.HORIZON]) for one in each.T)

    def rate(t: float, y: np.ndarray) -> list[float]:
        return [slope(t) * y[0] + constant(t), 2 * slope(t) * y[1] + exact.NOISE**2]

    solved = solve_ivp(
        rate, (0, exact.HORIZON), [START, 0.0], "DOP853", times, rtol=1e-7, atol=1e-8
    )
    return solved.y.T


def gradient_under(sde: ctrl.ControlledSDE, risk: float) -> float:
    """E int d log pi / d gain (q - temperature log pi) dt, X by ``sde``, q the risk-sensitive one.

    The temperature's share has mean 0 here, the entropy not depending on the gain.
    """
    value = rs.evaluate_lq(lq(), law(torch.tensor(GAIN, dtype=torch.float64)), risk, TIMES).value
    nodes, weights = np.polynomial.legendre.leggauss(5)
    times = 0.5 * exact.HORIZON * (nodes + 1)
    normal, masses = np.polynomial.hermite_e.hermegauss(3)
    z = torch.as_tensor(np.stack(np.meshgrid(normal, normal), -1).reshape(-1, 2))
    mass = torch.as_tensor(np.outer(masses, masses).ravel()) / masses.sum() ** 2
    policy, total = ctrl.GaussianPolicy(lambda t, x: GAIN * x + OFFSET, STD), 0.0
    problem = lq().problem(exact.HORIZON)
    for t, weight, (m, v) in zip(times, weights, moments(sde, times), strict=True):
        now, x = z.new_tensor(t), m + v**0.5 * z[:, :1]
        a = GAIN * x + OFFSET + STD * z[:, 1:]
        q = rs.q_rate(problem, value, risk, now, x, a)
        regular = q - exact.TEMPERATURE * policy.log_prob(now, x, a)
        score = ((a - GAIN * x - OFFSET) * x / STD**2)[:, 0]
        total += 0.5 * exact.HORIZON * weight * float(mass @ (score * regular))
    return total


def left_out(risk: float) -> float:
    """risk E int sigma^2 (dW/dx) (dV/dx) dt along the policy's own paths, W = dV / d gain."""
    gain = torch.tensor(GAIN, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(5)
    times = 0.5 * exact.HORIZON * (nodes + 1)

    def slopes(gain: Tensor) -> Tensor:
        value = rs.evaluate_lq(lq(), law(gain), risk, TIMES).value_at(torch.as_tensor(times))
        return torch.stack([value.hessian[:, 0, 0], value.slope[:, 0]])

    V = slopes(gain).numpy()
    W = torch.func.jacrev(slopes)(gain).numpy()
    mean, variance = moments(lq().sde, times).T
    product = (V[0] * mean + V[1]) * (W[0] * mean + W[1]) + V[0] * W[0] * variance
    return risk * exact.NOISE**2 * 0.5 * exact.HORIZON * float(weights @ product)


def checks(setting: Setting) -> Iterator[Check]:
    """Exact values, the martingale in the limit of small steps, and the gradient by quadrature."""
    normals = ctrl.noise.gauss_hermite(TIMES.new_tensor([1.0]), nodes=24)
    assert normals.increments is not None
    assert normals.weights is not None
    returns = 0.3 + 0.5 * normals.increments[:, 0, 0]
    sure = rs.certainty_equivalent(returns, AVERSE, normals.weights)
    yield expectation("certainty equivalent of a normal return", sure, 0.3 + 0.125 * AVERSE)
    weights = rs.tilting_weights(returns, AVERSE, normals.weights)
    yield expectation("its tilted mean", weights @ returns, 0.3 + 0.25 * AVERSE)

    gain = torch.tensor(GAIN, dtype=torch.float64)
    value = rs.evaluate_lq(lq(), law(gain), AVERSE, TIMES)
    want = exact.evaluated(AVERSE, GAIN, OFFSET, STD)
    yield limit("a policy's value, averse", at_start(value), want)
    solution = rs.solve_lq(lq(), AVERSE, TIMES)
    yield limit("optimal value, averse", at_start(solution), exact.optimal(AVERSE))
    policy = solution.policy()
    assert isinstance(policy, ctrl.RandomPolicy)
    t = torch.tensor(0.31, dtype=torch.float64)
    x, a = torch.tensor([[[-0.8], [0.3], [1.4]], [[0.2], [-1.1], [0.9]]], dtype=torch.float64)
    q = rs.q_rate(lq().problem(exact.HORIZON), solution.value, AVERSE, t, x, a)
    yield pathwise("q-rate of the optimal value", q, exact.TEMPERATURE * policy.log_prob(t, x, a))
    slopes, curve = [], []
    for h in (1 / 64, 1 / 128, 1 / 256):
        slopes.append(one_step(solution, AVERSE, h, x[::2], a[::2], 0.31))
        curve.append((h, abs(slopes[-1]).max()))
    once = [2 * b - a for a, b in itertools.pairwise(slopes)]
    rate = (4 * once[1] - once[0]) / 3
    yield limit("E dM / h of the optimal pair", rate, [0.0, 0.0], 1.0, curve=curve)

    truth = exact.slope_in_gain(AVERSE, GAIN, OFFSET, START)
    tilted = gradient_under(rs.tilted_sde(lq().sde, value.value, AVERSE), AVERSE)
    yield limit("policy gradient under the tilted law", tilted, truth)
    plain = gradient_under(lq().sde, AVERSE)
    yield limit("plain policy gradient and what it leaves out", plain + left_out(AVERSE), truth)

    best = at_start(rs.solve_lq(lq(), SEEKING, TIMES))
    yield limit("optimal value, seeking", best, exact.optimal(SEEKING))
    seeking = at_start(rs.evaluate_lq(lq(), law(gain), SEEKING, TIMES))
    want = exact.evaluated(SEEKING, GAIN, OFFSET, STD)
    yield limit("a policy's value, seeking", seeking, want)


MISTAKES = """
ctrl.risk_sensitive.increments
    quadratic variation dropped | ` + 0.5 * risk * moves.square()` => ``
    quadratic variation without 1/2 | 0.5 * risk * moves => risk * moves
    q added, not subtracted | paid - (rates => paid + (rates
ctrl.risk_sensitive.q_rate
    risk term of the q-rate without 1/2 | 0.5 * risk => risk
    risk-neutral q-rate | 0.5 * risk => 0
ctrl.risk_sensitive.noise_of_value
    gradient of V not scaled by the diffusion | "pij,pi->pj", sigma, slope
        => "pij,pi->pj", torch.ones_like(sigma), slope
ctrl.risk_sensitive.tilted_sde
    tilt of the drift with the other sign | risk * noise_of_value => -risk * noise_of_value
    tilt of the drift halved | risk * noise_of_value => 0.5 * risk * noise_of_value
    plain policy gradient: no tilt | risk * noise_of_value => 0 * noise_of_value
ctrl.risk_sensitive._backward
    Riccati equation with risk of the other sign | risk * lq.sigma => -risk * lq.sigma
    slope without the risk term | neutral.slope + times(value.hessian, pushed) => neutral.slope
    constant without 1/2 in the risk term | 0.5 * (slope * pushed) => (slope * pushed)
ctrl.risk_sensitive.certainty_equivalent
    certainty equivalent not divided by risk | .logsumexp(0) / risk => .logsumexp(0)
ctrl.risk_sensitive.tilting_weights
    weights tilted the other way | softmax(risk * => softmax(-risk *
"""
